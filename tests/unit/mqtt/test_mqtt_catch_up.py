"""Catching up: in order, in a window, at a rate, events before telemetry; and dials that are spread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.mqtt.backoff import Backoff
from edgellm_agent.mqtt.base import Answer, Done, Publication
from edgellm_agent.mqtt.catch_up import CatchUp
from edgellm_agent.mqtt.outbox import Message, Stored
from tests.support import virtual_time


class Shelf:
    """A backlog in memory, with the same three calls."""

    def __init__(self, events: int, telemetry: int, topic: str | None = None) -> None:
        kinds = [True] * events + [False] * telemetry
        self.stored = [
            Stored(key, Message(topic or f"{'evt' if is_event else 'tele'}/{key}", b"%d" % key, is_event, 0))
            for key, is_event in enumerate(kinds, start=1)
        ]
        self._taken = 0
        self.urgent: list[Stored] = []

    async def take(self, limit: int) -> list[Stored]:
        if self.urgent:
            return [self.urgent.pop()]
        left = [entry for entry in self.stored if entry.key > self._taken][:limit]
        if left:
            self._taken = left[-1].key
        return left

    def rewind(self) -> None:
        self._taken = 0

    def forget(self, key: int) -> None:
        self.stored = [entry for entry in self.stored if entry.key != key]


class Wire:
    """What went out, when, and who waits for an answer."""

    def __init__(self, answer: Callable[[Done], None] = lambda done: done(Answer.TAKEN)) -> None:
        self.sent: list[tuple[float, str]] = []
        self.keys: list[int] = []
        self.waiting: list[Done] = []
        self.up = True
        self.broken = 0
        self._answer = answer

    def publish(self, message: Publication, done: Done) -> bool:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("a mistake")
        assert (message.qos, message.retain, message.expiry_s) == (1, False, None)
        if not self.up:
            return False
        loop = asyncio.get_running_loop()
        self.sent.append((loop.time(), message.topic))
        self.keys.append(int(message.payload or b"0"))
        self.waiting.append(done)
        loop.call_soon(self._answer, done)
        return True

    @property
    def topics(self) -> list[str]:
        return [topic for _, topic in self.sent]


def catching_up(shelf: Shelf, wire: Wire, rate: float = 10.0) -> CatchUp:
    return CatchUp(shelf, wire.publish, messages_per_s=rate)  # type: ignore[arg-type]


def test_kept_telemetry_goes_out_at_the_rate_and_events_at_once() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=20, telemetry=50), Wire()
        catch_up = catching_up(shelf, wire, rate=10.0)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        await catch_up.close()
        assert wire.topics == [f"evt/{n}" for n in range(1, 21)] + [f"tele/{n}" for n in range(21, 71)]
        times = [at for at, topic in wire.sent if topic.startswith("tele")]
        assert times[0] < 0.01
        assert times[-1] == pytest.approx(4.9, abs=0.01)
        assert {at for at, topic in wire.sent if topic.startswith("evt")} == {0.0}
        assert shelf.stored == []

    virtual_time.run(main())


def test_a_broker_that_does_not_answer_gets_a_window_and_no_more() -> None:
    async def main() -> None:
        wire = Wire(answer=lambda done: None)
        catch_up = catching_up(Shelf(events=100, telemetry=0), wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        assert len(wire.sent) == 8
        # Each answer makes room for one.
        wire.waiting[0](True)
        await asyncio.sleep(1)
        assert len(wire.sent) == 9
        await catch_up.close()

    virtual_time.run(main())


def test_what_was_not_acknowledged_goes_first_with_the_next_connection() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=12, telemetry=0), Wire(answer=lambda done: None)
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(1)
        wire.waiting[0](True)
        wire.up = False
        catch_up.disconnected()
        await asyncio.sleep(1)
        before = len(wire.sent)
        wire.up, wire._answer = True, lambda done: done(Answer.TAKEN)
        catch_up.connected()
        await asyncio.sleep(1)
        assert wire.topics[before:] == [f"evt/{number}" for number in range(2, 13)]
        await catch_up.close()

    virtual_time.run(main())


def test_what_the_broker_refuses_stays_and_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        shelf = Shelf(events=3, telemetry=0)
        wire = Wire()
        wire._answer = lambda done: done(Answer.REFUSED if done is wire.waiting[0] else Answer.TAKEN)
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        assert wire.topics == ["evt/1", "evt/2", "evt/3"]
        assert [entry.message.topic for entry in shelf.stored] == ["evt/1"]
        await catch_up.close()

    virtual_time.run(main())


def test_an_event_that_comes_while_telemetry_drains_waits_for_one_batch_at_most() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=0, telemetry=100), Wire()
        catch_up = catching_up(shelf, wire, rate=10.0)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(2.05)
        shelf.urgent.append(Stored(1000, Message("evt/late", b"", True, 0)))
        catch_up.wake()
        await asyncio.sleep(2)
        (at,) = [at for at, topic in wire.sent if topic == "evt/late"]
        assert at < 2.05 + 0.25
        await catch_up.close()

    virtual_time.run(main())


@given(st.randoms(use_true_random=False))
def test_dials_are_random_below_a_bound_that_doubles_up_to_a_minute(random: object) -> None:
    backoff = Backoff(uniform=random.uniform)  # type: ignore[attr-defined]
    for bound in (1, 2, 4, 8, 16, 32, 60, 60):
        assert 0.25 <= backoff.next_s() <= bound
    backoff.reset()
    assert backoff.next_s() <= 1


def test_a_thousand_boards_do_not_dial_at_once() -> None:
    import random

    draw = random.Random(7)
    fleet = [Backoff(uniform=draw.uniform) for _ in range(1000)]
    for _ in range(6):
        waits = [board.next_s() for board in fleet]
    # Within a bound of 32 s: no second in which more than twice the even share dials.
    busiest = max(sum(second <= wait < second + 1 for wait in waits) for second in range(32))
    assert busiest < 2 * 1000 / 32


def test_events_that_nobody_hears_are_kept_and_sent_again_when_somebody_listens() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=5, telemetry=2, topic="evt"), Wire(lambda done: done(Answer.UNHEARD))
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(600)
        # Telemetry is for whoever is there; of the events only the first one asks, less and less often.
        assert [entry.message.is_event for entry in shelf.stored] == [True] * 5
        assert set(wire.keys[7:]) == {1}
        assert 5 <= len(wire.keys) - 7 <= 8
        wire._answer = lambda done: done(Answer.TAKEN)
        await asyncio.sleep(700)
        assert shelf.stored == []
        assert wire.keys[-5:] == [1, 2, 3, 4, 5]
        await catch_up.close()

    virtual_time.run(main())


def test_of_events_that_nobody_ever_hears_the_newest_thousand_are_kept() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=1100, telemetry=0), Wire(lambda done: done(Answer.UNHEARD))
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        assert [entry.key for entry in shelf.stored] == list(range(101, 1101))
        await catch_up.close()

    virtual_time.run(main())


def test_what_nobody_hears_on_one_topic_is_sent_again_only_for_that_topic() -> None:
    async def main() -> None:
        def answer(done: Done) -> None:
            topic = wire.topics[wire.waiting.index(done)]
            done(Answer.UNHEARD if topic in unheard else Answer.TAKEN)

        unheard = {"evt/1", "evt/2"}
        shelf, wire = Shelf(events=2, telemetry=0), Wire(answer)
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(1)
        # Each topic asks for itself: nobody wants the first one, ever.
        unheard.remove("evt/2")
        await asyncio.sleep(30)
        assert [entry.key for entry in shelf.stored] == [1]
        sent = len(wire.topics)
        shelf.stored.append(Stored(3, Message("evt/2", b"", True, 0)))
        catch_up.wake()
        await asyncio.sleep(1)
        assert wire.topics[sent:] == ["evt/2"]
        await catch_up.close()

    virtual_time.run(main())


def test_a_message_that_cannot_be_sent_holds_no_other_back() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=3, telemetry=1), Wire()
        wire.broken = 1
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        assert [entry.key for entry in shelf.stored] == [1]
        catch_up.connected()
        await asyncio.sleep(60)
        assert shelf.stored == []
        await catch_up.close()

    virtual_time.run(main())


def test_a_backlog_that_fails_once_does_not_end_the_sending() -> None:
    async def main() -> None:
        shelf, wire = Shelf(events=1, telemetry=0), Wire()
        take, failures = shelf.take, [RuntimeError("no thread can be had")]

        async def fail_once(limit: int) -> list[Stored]:
            if failures:
                raise failures.pop()
            return await take(limit)

        shelf.take = fail_once  # type: ignore[method-assign]
        catch_up = catching_up(shelf, wire)
        catch_up.start()
        catch_up.connected()
        await asyncio.sleep(60)
        assert shelf.stored == []
        await catch_up.close()

    virtual_time.run(main())
