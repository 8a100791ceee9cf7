import select
import threading

import pytest

from edgellm.v1 import worker_pb2
from edgellm_agent.worker.intake import Intake
from tests.unit.agent.sequences import make


def submit(number, client="", deadline_s=0.0):
    return worker_pb2.Submit(id=number, client=client, deadline_s=deadline_s)


@pytest.fixture
def gate():
    """Holds every preparation until it is opened."""
    return threading.Event()


@pytest.fixture
def intake(gate):
    def prepare(message, arrived):
        assert gate.wait(10)
        if message.id == 13:
            raise ValueError("unlucky")
        return make(message.id, arrived=arrived)

    made = Intake(prepare)
    yield made
    gate.set()
    made.close()


def taken(intake, count):
    outcomes = []
    while len(outcomes) < count:
        assert select.select([intake.wake_fd], [], [], 10)[0]
        outcomes += intake.take()
    return outcomes


def test_requests_come_out_in_their_order_with_what_was_made_of_them(intake, gate):
    for number in (1, 13, 2):
        intake.submit(submit(number), arrived=7.0)
    assert intake.pending == 3
    gate.set()
    outcomes = taken(intake, 3)
    assert [message.id for message, _ in outcomes] == [1, 13, 2]
    assert outcomes[0][1].timeline.arrived == 7.0
    assert isinstance(outcomes[1][1], ValueError)
    assert intake.pending == 0


def test_a_request_that_was_cancelled_meanwhile_does_not_come_out(intake, gate):
    intake.submit(submit(1), 0.0)
    intake.submit(submit(2), 0.0)
    assert intake.cancel(1)
    assert not intake.cancel(99)
    gate.set()
    assert [message.id for message, _ in taken(intake, 1)] == [2]


def test_the_wake_up_is_over_once_all_is_taken(intake, gate):
    gate.set()
    intake.submit(submit(1), 0.0)
    taken(intake, 1)
    assert not select.select([intake.wake_fd], [], [], 0)[0]


def test_a_flood_of_cancelled_requests_leaves_nothing_to_do(intake, gate):
    intake.submit(submit(1), 0.0)
    for number in range(2, 2000):
        intake.submit(submit(number), 0.0)
        intake.cancel(number)
    assert intake.pending == 1
    assert sum(map(len, intake._turns.values())) <= 1
    gate.set()
    assert [message.id for message, _ in taken(intake, 1)] == [1]


def test_clients_take_turns(intake, gate):
    for number in range(6):
        intake.submit(submit(number, client="greedy"), 0.0)
    intake.submit(submit(6, client="modest"), 0.0)
    gate.set()
    order = [message.id for message, _ in taken(intake, 7)]
    assert order.index(6) <= 2


def test_deadlines_hold_while_a_request_is_prepared(intake):
    intake.submit(submit(1, deadline_s=5), 10.0)
    intake.submit(submit(2), 10.0)
    assert intake.next_deadline() == 15.0
    assert intake.expired(14.0) == []
    assert intake.expired(15.0) == [1]


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


def test_a_panic_is_the_outcome_of_its_request_and_the_next_is_prepared():
    def prepare(message, arrived):
        if message.id == 1:
            raise Panic("at the disco")
        return make(message.id, arrived=arrived)

    intake = Intake(prepare)
    intake.submit(submit(1), 0)
    intake.submit(submit(2), 0)
    (_, failed), (_, made) = taken(intake, 2)
    assert isinstance(failed, RuntimeError)
    assert "at the disco" in str(failed)
    assert made.id == 2
    intake.close()
