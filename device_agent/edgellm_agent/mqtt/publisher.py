"""What the device tells its fleet, and when: state, telemetry, events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from pathlib import Path

from edgellm.fleet.topics import DeviceTopics, encode, envelope, state_event, telemetry_events
from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.events import Happening
from edgellm_agent.mqtt.backlog import Backlog
from edgellm_agent.mqtt.base import MAX_PAYLOAD_BYTES, Answer, OnMessage, Publication, Records
from edgellm_agent.mqtt.catch_up import CatchUp
from edgellm_agent.mqtt.connection import Connection
from edgellm_agent.mqtt.deadband import Deadband
from edgellm_agent.mqtt.outbox import Message
from edgellm_agent.mqtt.session import SessionCounter
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.base import Clock

log = logging.getLogger(__name__)

# Live telemetry that is not acknowledged; more, and the broker counts as too slow for it.
_LIVE_WINDOW = 9
# The field of `fleet_pb2.Event`, and the kind in its id, of each happening.
_KINDS: dict[str, str] = {"GovernorChanged": "governor", "EngineChanged": "engine", "WorkerEnded": "worker"}


class MqttPublisher:
    """The agent's `Uplink`, from `start` to `close`; everything is called on one event loop.

    Live telemetry goes out directly. What finds no broker, or a slow one, is thinned out, kept in the
    backlog and sent later; events always go through it. The state is published at each connection and
    whenever it changes.
    """

    def __init__(
        self,
        settings: MqttSettings,
        sampler: Records,
        *,
        device: str,
        state_dir: Path,
        agent_version: str,
        profile: str = "",
        active_engine: str = "",
        clock: Clock | None = None,
    ) -> None:
        """Prepare to publish `sampler`'s records as `device`.

        Raises ValueError for a device name that cannot be in a topic, or a password or TLS file that cannot
        be used.
        """
        self._settings = settings
        self._sampler = sampler
        self._topics = DeviceTopics(settings.tenant, settings.group, device)
        self._agent_version = agent_version
        self._profile = profile
        self._active_engine = active_engine
        self._clock = clock or Clock()
        self._run = self._counter(state_dir / "mqtt-run", lone=True).take()
        self._connection = Connection(
            settings,
            self._topics.source.replace("/", "-"),
            counter=self._counter(state_dir / "mqtt-session"),
            will=self._will,
            on_up=self._up,
            on_down=self._down,
        )
        self._backlog = Backlog(state_dir / "outbox.db", settings.outbox_bytes, self._wake)
        self._catch_up = CatchUp(
            self._backlog, self._connection.publish, messages_per_s=settings.catch_up_messages_per_s
        )
        self._deadband = Deadband(settings.deadband, max_silence_s=settings.max_silence_s)
        self._sequences: Counter[str] = Counter()
        self._retained: dict[str, bytes] = {}
        # Live telemetry on its way, by a number of its own: what a lost connection leaves of it is kept.
        self._live: dict[int, Message] = {}
        self._sent = 0
        self._keep_next_ns = 0
        self._connections = 0
        self._revision = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def topics(self) -> DeviceTopics:
        """Names of this device's topics."""
        return self._topics

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us."""
        return self._connection.session is not None

    def start(self) -> None:
        """Begin to connect and publish; an absent broker is no error and is tried again."""
        self._backlog.start()
        self._catch_up.start()
        self._connection.start()
        self._task = asyncio.create_task(self._publish_records(), name="telemetry-mqtt")

    def update_state(self, *, active_engine: str) -> None:
        """Tell the manifest digest of the engine that serves now; empty if none does."""
        if active_engine != self._active_engine:
            self._active_engine = active_engine
            self._publish_state(online=True)

    def happened(self, happening: Happening) -> None:
        """Tell the fleet; a listener for `Events`."""
        kind = _KINDS[happening.DESCRIPTOR.name]
        event = self.new_event(kind)
        getattr(event, kind).CopyFrom(happening)
        self.publish_event(self._topics.event(kind), event)

    def new_event(self, kind: str) -> fleet_pb2.Event:
        """An envelope with the next id of its kind in this run; its data is empty."""
        self._sequences[kind] += 1
        return envelope(self._topics, kind, self._run, self._sequences[kind], self._clock.wall_ns())

    def publish_event(self, topic: str, event: fleet_pb2.Event, *, correlation_data: bytes = b"") -> None:
        """Send it at least once, with the same id each time: it survives outages and restarts.

        Raises ValueError for a payload above `MAX_PAYLOAD_BYTES`.
        """
        payload = self._encode(event)
        self._backlog.add_event(Message(topic, payload, True, self._clock.wall_ns(), correlation_data))

    def publish_retained(self, topic: str, event: fleet_pb2.Event) -> None:
        """Make this the topic's value, now and at each new connection; only the last one counts.

        Raises ValueError for a payload above `MAX_PAYLOAD_BYTES`.
        """
        self._retained[topic] = self._encode(event)
        self._connection.publish(Publication(topic, self._retained[topic], retain=True))

    def on_message(self, topic_filter: str, callback: OnMessage) -> None:
        """Subscribe, now and at each new connection; `callback` (see `Uplink`) must not block."""
        self._connection.subscribe(topic_filter, callback)

    def part(self) -> telemetry_pb2.Uplink:
        """The way to the broker, as a part of a record."""
        part = telemetry_pb2.Uplink(connected=self.connected, connections_total=self._connections)
        self._backlog.fill(part)
        return part

    async def close(self, deadline_s: float = 5.0) -> None:
        """Say goodbye and disconnect, so that no will is sent; what waits is on disk then.

        Waits at most three times `deadline_s`.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._say_goodbye(deadline_s)
        await self._catch_up.close()
        self._keep_live()
        await self._backlog.close(deadline_s)
        await self._connection.close(deadline_s)

    def _wake(self) -> None:
        self._catch_up.wake()

    def _counter(self, path: Path, *, lone: bool = False) -> SessionCounter:
        return SessionCounter(path, wall_s=lambda: self._clock.wall_ns() / 1e9, lone=lone)

    def _encode(self, event: fleet_pb2.Event) -> bytes:
        payload = encode(event, self._settings.encoding)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"event {event.id} has {len(payload)} bytes, more than {MAX_PAYLOAD_BYTES}")
        return payload

    def _up(self, session: int) -> None:
        self._connections += 1
        self._publish_state(online=True)
        for topic, payload in self._retained.items():
            self._connection.publish(Publication(topic, payload, retain=True))
        # Whoever watches begins with all figures, however little they move.
        self._deadband.reset()
        self._catch_up.connected()
        log.debug("mqtt.born session=%d run=%d", session, self._run)

    def _down(self) -> None:
        self._catch_up.disconnected()
        self._keep_live()

    async def _publish_records(self) -> None:
        async for record in self._sampler.records(self._settings.interval_s):
            try:
                self._publish_record(record)
            except Exception:  # one record that cannot be sent must not end the stream
                log.exception("mqtt.publish_failed sequence=%d", record.sequence)

    def _publish_record(self, record: telemetry_pb2.Telemetry) -> None:
        live = self.connected and len(self._live) < _LIVE_WINDOW
        if not live:
            if record.monotonic_ns < self._keep_next_ns:
                return
            self._keep_next_ns = record.monotonic_ns + round(self._settings.offline_interval_s * 1e9)
        names = self._deadband.take(record)
        for name, event in telemetry_events(self._topics, self._run, record, names):
            topic, payload = self._topics.telemetry(name), encode(event, self._settings.encoding)
            message = Message(topic, payload, False, self._clock.wall_ns())
            if not live or not self._send_live(message):
                self._backlog.add_telemetry(message)

    def _send_live(self, message: Message) -> bool:
        self._sent += 1
        number = self._sent
        publication = Publication(
            message.topic,
            message.payload,
            qos=self._settings.qos,
            expiry_s=self._settings.message_expiry_s,
        )

        def done(_answer: Answer) -> None:
            self._live.pop(number, None)

        if not self._connection.publish(publication, done):
            return False
        self._live[number] = message
        return True

    def _keep_live(self) -> None:
        for message in self._live.values():
            self._backlog.add_telemetry(message)
        self._live.clear()

    async def _say_goodbye(self, deadline_s: float) -> None:
        heard = asyncio.Event()
        if self._publish_state(online=False, heard=heard):
            with contextlib.suppress(asyncio.TimeoutError):  # lost with the connection: the will tells it
                await asyncio.wait_for(heard.wait(), deadline_s)

    def _publish_state(self, *, online: bool, heard: asyncio.Event | None = None) -> bool:
        session = self._connection.session
        if session is None:
            return False
        self._revision += 1
        event = state_event(
            self._topics,
            self._state(session, online=online),
            run=self._run,
            revision=self._revision,
            time_ns=self._clock.wall_ns(),
        )
        state = Publication(self._topics.state, self._encode(event), retain=True)
        return self._connection.publish(state, lambda _: heard.set() if heard is not None else None)

    def _will(self, session: int) -> Publication:
        event = state_event(
            self._topics, self._state(session, online=False), run=self._run, revision=0, time_ns=None
        )
        return Publication(self._topics.state, self._encode(event), retain=True)

    def _state(self, session: int, *, online: bool) -> fleet_pb2.DeviceState:
        return fleet_pb2.DeviceState(
            online=online,
            session=session,
            agent_version=self._agent_version,
            profile=self._profile,
            # An agent that is away serves none, and a will could not know which was the last.
            active_engine=self._active_engine if online else "",
        )
