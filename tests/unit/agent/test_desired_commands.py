"""Commands of the fleet: which are obeyed, when, and what is answered."""

import asyncio
from typing import get_args

import pytest

from edgellm.fleet.topics import encode
from edgellm.v1 import fleet_pb2
from edgellm_agent.access import fleet as access
from edgellm_agent.access import rules
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.desired import commands as module
from edgellm_agent.desired.commands import MAX_OUTPUT_BYTES, MAX_WAITING, Commands, last_bytes
from edgellm_agent.desired.settings import CommandName, CommandSettings
from edgellm_agent.errors import EngineError
from tests.support.desired_device import TOPICS, FakeUplink

NOW_S = 1_800_000_000


class Fleet:
    """A device's commands, and a fleet that gives them."""

    def __init__(self, *allow, role="operator", audit=None, **actions):
        self.uplink = FakeUplink()
        self.done = []
        known = {"report": self.report, "restart-engine": self.fail, "logs": self.logs}
        self.commands = Commands(
            CommandSettings(allow=allow),
            {**known, **{name.replace("_", "-"): action for name, action in actions.items()}},
            self.uplink,
            access.Fleet(role, audit),
            wall_ns=lambda: NOW_S * 10**9 + 5,
        )
        self.commands.start()

    async def report(self):
        self.done.append("report")
        return "reported"

    async def fail(self):
        raise EngineError("it does not come back")

    async def logs(self):
        return "ä" * MAX_OUTPUT_BYTES

    def send(self, name, id_="c-1", expires_in_s=60):
        event = fleet_pb2.Event(id=id_, type="edgellm.command.v1")
        event.command.name = name
        if expires_in_s is not None:
            event.command.expires.FromSeconds(NOW_S + expires_in_s)
        self.uplink.send(TOPICS.command_request, encode(event, "json"))

    async def answers(self, count=1):
        await self.uplink.until(lambda: len(self.uplink.sent) >= count)
        assert {topic for topic, _ in self.uplink.sent} == {TOPICS.command_response}
        return [event.command_result for _, event in self.uplink.sent]


@pytest.fixture
async def fleet():
    made = []

    def make(*allow, **actions):
        made.append(Fleet(*allow, **actions))
        return made[-1]

    yield make
    for each in made:
        await each.commands.close()


async def test_a_device_that_allows_nothing_does_not_listen(fleet):
    assert fleet().uplink.callbacks == {}


async def test_an_allowed_command_is_done_and_answered(fleet):
    device = fleet("report")
    device.send("report")
    (answer,) = await device.answers()
    assert (answer.command_id, answer.name, answer.ok, answer.output) == ("c-1", "report", True, "reported")
    ((_, event),) = device.uplink.sent
    assert (event.id, event.type) == ("7-command.result-1", "edgellm.command.result.v1")


@pytest.mark.parametrize("name", ["logs", "shell", "", "REPORT", "x" * 1000])
async def test_another_command_is_refused(fleet, name):
    device = fleet("report")
    device.send(name)
    (answer,) = await device.answers()
    assert not answer.ok
    assert "allowed: report" in answer.error


async def test_a_command_that_fails_says_why(fleet):
    device = fleet("restart-engine")
    device.send("restart-engine")
    (answer,) = await device.answers()
    assert (answer.ok, answer.error) == (False, "it does not come back")


async def test_an_unexpected_failure_tells_nothing_of_its_inside_and_ends_nothing(fleet):
    async def broken():
        raise KeyError("secret")

    device = fleet("logs", "report", logs=broken)
    device.send("logs", "c-1")
    device.send("report", "c-2")
    first, second = await device.answers(2)
    assert "secret" not in first.error
    assert second.ok


@pytest.mark.parametrize(
    ("expires_in_s", "error"),
    [(None, "must be set"), (0, "0 s ago"), (-86_400, "86400 s ago"), (3601, "in 3601 s, more than 3600 s")],
)
async def test_a_command_that_is_not_fresh_is_refused_with_the_devices_time(fleet, expires_in_s, error):
    device = fleet("report")
    device.send("report", expires_in_s=expires_in_s)
    (answer,) = await device.answers()
    assert error in answer.error
    assert expires_in_s is None or "2027-01-15T08:00:00+00:00" in answer.error
    assert device.done == []


async def test_a_command_that_comes_twice_is_done_once(fleet):
    device = fleet("report")
    for _ in range(3):
        device.send("report")
    device.send("report", "c-2")
    await device.answers(2)
    assert device.done == ["report", "report"]
    assert [event.command_result.command_id for _, event in device.uplink.sent] == ["c-1", "c-2"]


async def test_commands_are_done_one_at_a_time_and_few_wait(fleet):
    begun, go_on = asyncio.Event(), asyncio.Event()
    at_once, most = 0, 0

    async def slow():
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        begun.set()
        await go_on.wait()
        at_once -= 1
        return ""

    device = fleet("logs", logs=slow)
    device.send("logs", "first")
    await asyncio.wait_for(begun.wait(), 5)
    for number in range(MAX_WAITING + 1):
        device.send("logs", f"c-{number}")
    (refused,) = await device.answers()
    assert (refused.command_id, refused.error) == (f"c-{MAX_WAITING}", "8 commands are waiting already")
    go_on.set()
    answers = await device.answers(MAX_WAITING + 2)
    assert all(answer.ok for answer in answers[1:])
    assert most == 1


async def test_a_command_that_hangs_ends_at_its_deadline(fleet, monkeypatch):
    monkeypatch.setattr(module, "_DEADLINE_S", 0.01)
    device = fleet("logs", "report", logs=asyncio.Event().wait)
    device.send("logs", "c-1")
    device.send("report", "c-2")
    first, second = await device.answers(2)
    assert "not done within" in first.error
    assert second.ok


async def test_a_long_output_is_cut_to_its_end_and_to_whole_characters(fleet):
    device = fleet("logs")
    device.send("logs")
    (answer,) = await device.answers()
    assert answer.ok
    assert set(answer.output) == {"ä"}
    assert len(answer.output.encode()) == MAX_OUTPUT_BYTES
    assert last_bytes("aä", 1) == ""
    assert last_bytes("äa", 2) == "a"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"\xff\xff",
        b"{}",
        b"x" * 10_000,
        b'{"id": "x"}',
        b'{"command": {"name": "report"}}',
        b'{"id": "a b", "command": {"name": "report"}}',
        b'{"id": "' + b"x" * 500 + b'", "command": {}}',
    ],
)
async def test_what_cannot_be_answered_is_ignored(fleet, payload, caplog):
    device = fleet("report")
    device.uplink.send(TOPICS.command_request, payload)
    assert "command.ignored" in caplog.text
    assert device.uplink.sent == []


async def test_an_expiry_beyond_any_calendar_is_refused(fleet):
    device = fleet("report")
    event = fleet_pb2.Event(id="c-1")
    event.command.name = "report"
    event.command.expires.seconds = 2**62
    device.uplink.send(TOPICS.command_request, encode(event, "protobuf"))
    (answer,) = await device.answers()
    assert "more than 3600 s ahead" in answer.error


async def test_the_answer_carries_what_the_request_wants_back(fleet):
    device = fleet("report")
    order = fleet_pb2.Event(id="c-9")
    order.command.name = "report"
    order.command.expires.FromSeconds(NOW_S + 60)
    device.uplink.send(TOPICS.command_request, encode(order, "json"), b"ask-1")
    await device.answers(1)
    assert device.uplink.correlated == [b"ask-1"]


@pytest.mark.parametrize(
    ("role", "done"),
    [("viewer", ["report"]), ("app", ["report"]), ("operator", ["report", "restart-engine", "logs"])],
)
async def test_what_is_allowed_is_still_bounded_by_the_fleets_role(fleet, role, done):
    async def restart():
        return ""

    device = fleet("report", "restart-engine", "logs", role=role, restart_engine=restart)
    for number, name in enumerate(("report", "restart-engine", "logs")):
        device.send(name, f"c-{number}")
    answers = await device.answers(3)
    assert {answer.name for answer in answers if answer.ok} == set(done)
    for answer in answers:
        assert answer.ok or answer.error.startswith(f"fleet has the role {role}; ")


async def test_what_the_fleet_changes_or_is_refused_is_written_down(fleet, tmp_path):
    audit = AuditLog(tmp_path / "audit")
    await audit.start()
    device = fleet("report", "restart-engine", audit=audit)
    device.send("report", "c-1")
    device.send("restart-engine", "c-2")
    await device.answers(2)
    low = fleet("logs", role="app", audit=audit)
    low.send("logs")
    await low.answers()
    await audit.close()
    assert [(r.caller, r.role, r.method, r.subject, r.outcome) for r in await audit.last(9)] == [
        ("fleet", "operator", "EngineService/Activate", "command restart-engine", "INTERNAL"),
        ("fleet", "app", "DeviceService/WatchLogs", "", "PERMISSION_DENIED"),
    ]


def test_every_command_has_a_method_in_the_table_of_rules():
    assert module.METHODS.keys() == set(get_args(CommandName))
    assert set(module.METHODS.values()) <= rules.RULES.keys()
