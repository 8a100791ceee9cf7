"""A device that publishes to a real broker, in this process or in one that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards
from tests.support.broker import Broker, Listener, Received, listening

DEVICE = "jetson-01"
PREFIX = f"edgellm/v1/default/default/{DEVICE}"
ENGINE = "sha256:" + "a" * 64


def settings_for(broker: Broker, **changes: object) -> MqttSettings:
    """Everything goes out, ten times a second."""
    options: dict[str, object] = {
        "host": broker.host,
        "port": broker.port,
        "protocol": broker.protocols[0],
        "interval_s": 0.1,
        "offline_interval_s": 0.1,
        "max_silence_s": 0,
        "keepalive_s": 5,
        "catch_up_messages_per_s": 2000,
    }
    return MqttSettings.model_validate(options | changes)


@contextlib.asynccontextmanager
async def publishing(
    settings: MqttSettings, state_dir: Path, device: str = DEVICE, clock: Clock | None = None
) -> AsyncIterator[MqttPublisher]:
    """The telemetry of an Orin Nano's files, ten times a second."""
    root = state_dir / "root"
    _count_from_zero(state_dir / "mqtt-run")
    sampler = Sampler(
        SysfsSource(root if root.exists() else boards.build(root, boards.ORIN_NANO)),
        lambda: telemetry_pb2.Runtime(state="serving", engine=ENGINE),
        interval_s=0.1,
        clock=clock,
    )
    publisher = MqttPublisher(
        settings,
        sampler,
        device=device,
        state_dir=state_dir,
        agent_version="0.1.0",
        profile="orin-nano-8gb",
        clock=clock,
    )
    sampler.start()
    publisher.start()
    try:
        yield publisher
    finally:
        await asyncio.wait_for(publisher.close(), 16)
        await asyncio.wait_for(sampler.close(), 2)


def _count_from_zero(runs: Path) -> None:
    """Small numbers are easier to read; a device that knows no run yet takes one from the clock."""
    runs.parent.mkdir(parents=True, exist_ok=True)
    if not runs.exists():
        runs.write_text("0\n")


async def until(happened: Callable[[], bool], deadline_s: float = 15.0) -> None:
    """Wait for something that nobody announces; raises AssertionError at the deadline."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + deadline_s
    while not happened():
        assert loop.time() < end_s, f"did not happen within {deadline_s} s"
        await asyncio.sleep(0.01)


async def receive(listener: Listener, wanted: Callable[[Received], bool], deadline_s: float = 15) -> Received:
    """The first wanted message, without holding up the event loop."""
    return await asyncio.to_thread(listener.wait_for, wanted, deadline_s)


def is_state(*, online: bool, session: int | None = None) -> Callable[[Received], bool]:
    """A birth, a farewell or a will."""

    def wanted(message: Received) -> bool:
        state = message.event.state
        return message.leaf == "state" and state.online == online and session in (None, state.session)

    return wanted


def is_live(publisher: MqttPublisher, leaf: str) -> Callable[[Received], bool]:
    """Telemetry of a record that came after now; what came before may have been kept for the connection."""
    latest = publisher._sampler.latest  # type: ignore[attr-defined]
    assert publisher.connected
    after = 0 if latest is None else latest.sequence
    run = publisher._run
    return lambda m: m.leaf == leaf and m.event.run == run and m.event.sequence > after


def is_leaf(leaf: str) -> Callable[[Received], bool]:
    """A message whose topic ends so."""
    return lambda message: message.leaf == leaf


def retained(broker: Broker, topic: str) -> Received:
    """What a reader that comes late finds."""
    with listening(broker, topic) as late:
        return late.wait_for(lambda _: True)


def worker_ended(number: int) -> fleet_pb2.WorkerEnded:
    """Something to tell, told apart by its number."""
    return fleet_pb2.WorkerEnded(engine=ENGINE, reason="signal 9", restarts_total=number)


class Receiver:
    """The receiving side of a fleet, reduced to its rule: an id counts once."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.seen: dict[str, Received] = {}

    def take(self, messages: list[Received]) -> None:
        for message in messages:
            self.ids.append(message.event.id)
            self.seen.setdefault(message.event.id, message)

    async def collect(self, listener: Listener, count: int, deadline_s: float = 30.0) -> None:
        """Until so many different ones have come."""

        def enough() -> bool:
            self.take(listener.drain())
            return len(self.seen) >= count

        await until(enough, deadline_s)


@contextlib.asynccontextmanager
async def agent_process(
    settings: MqttSettings, state_dir: Path, events: int = 0
) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent that can be killed; it tells `events` and then says so on its output when all is on disk."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.publishing",
        settings.model_dump_json(),
        str(state_dir),
        str(events),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _main(settings: str, state_dir: str, events: str) -> None:
    async with publishing(MqttSettings.model_validate_json(settings), Path(state_dir)) as publisher:
        publisher.update_state(active_engine=ENGINE)
        for number in range(int(events)):
            publisher.happened(worker_ended(number))
            if number % 100 == 99:
                # As much as may wait in memory is not told at once.
                await until(lambda: not publisher._backlog._events)
        await until(lambda: not publisher._backlog._events)
        print("told", flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
