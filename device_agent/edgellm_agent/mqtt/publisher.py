"""Publishes the device's state and telemetry to an MQTT broker, which may be absent at any time."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgellm.fleet.topics import CONTENT_TYPES, DeviceTopics, encode, state_event, telemetry_events
from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.mqtt.session import SessionCounter
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.sampler import Sampler

log = logging.getLogger(__name__)

_RECONNECT_MIN_S, _RECONNECT_MAX_S = 1, 60
# Unacknowledged messages; more than one round of telemetry and a state never wait.
_MAX_QUEUED = 16


class MqttPublisher:
    """Owns the connection and the task that publishes, from `start` to `close`.

    Telemetry is the latest or nothing: what cannot go out now is not kept. The state is published at each
    connection and whenever it changes. paho runs a thread of its own; its callbacks touch only the session
    counter and hand everything else to the event loop.
    """

    def __init__(
        self,
        settings: MqttSettings,
        sampler: Sampler,
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
        self._counter = SessionCounter(state_dir / "mqtt-session", wall_s=lambda: self._clock.wall_ns() / 1e9)
        self._revision = 0
        # The number of the connection that stands; None while there is none.
        self._session: int | None = None
        self._in_flight: list[paho.MQTTMessageInfo] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._outage_logged = False
        self._client = self._new_client()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us."""
        return self._session is not None

    def start(self) -> None:
        """Begin to connect and publish; an absent broker is no error and is tried again."""
        self._loop = asyncio.get_running_loop()
        self._client.loop_start()
        self._task = asyncio.create_task(self._publish_records(), name="telemetry-mqtt")

    def update_state(self, *, active_engine: str) -> None:
        """Tell the manifest digest of the engine that serves now; empty if none does."""
        if active_engine != self._active_engine:
            self._active_engine = active_engine
            self._publish_state(online=True)

    async def close(self, deadline_s: float = 5.0) -> None:
        """Say goodbye and disconnect, so that no will is sent; waits at most twice `deadline_s`."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        farewell = self._publish_state(online=False)
        if farewell is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # lost with the connection: the will tells it
                await asyncio.to_thread(farewell.wait_for_publish, deadline_s)
        self._session = None
        self._client.disconnect()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._client.loop_stop), deadline_s)

    def _new_client(self) -> paho.Client:
        settings, five = self._settings, self._settings.protocol == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._topics.source.replace("/", "-"),
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            clean_session=None if five else True,
        )
        client.on_log = _on_log
        client.suppress_exceptions = True
        client.max_queued_messages_set(_MAX_QUEUED)
        client.reconnect_delay_set(_RECONNECT_MIN_S, _RECONNECT_MAX_S)
        if settings.username is not None:
            client.username_pw_set(settings.username, _password(settings.password_file))
        if settings.tls is not None:
            client.tls_set_context(_tls_context(settings))
        client.on_pre_connect = self._on_pre_connect
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        # We subscribe to nothing and keep no queue, so the broker need not remember us either.
        client.connect_async(
            settings.host,
            settings.port,
            keepalive=settings.keepalive_s,
            clean_start=True if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
        )
        return client

    # On paho's thread.

    def _on_pre_connect(self, client: paho.Client, _userdata: object) -> None:
        state = self._state(self._counter.last + 1, online=False)
        will = state_event(self._topics, state, run=state.session, revision=0, time_ns=None)
        client.will_set(
            self._topics.state,
            encode(will, self._settings.encoding),
            qos=1,
            retain=True,
            properties=self._properties(PacketTypes.WILLMESSAGE),
        )

    def _on_socket_open(self, _client: paho.Client, _userdata: object, _socket: object) -> None:
        # From here on the broker may know the will, so its number is used up; a refused dial uses up none.
        self._counter.take()

    def _on_connect(
        self, client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            log.warning("mqtt.refused reason=%s", reason)
            return
        # paho would send again what was not acknowledged, and an old state would replace the new one.
        client.drop_out_messages()
        self._outage_logged = False
        self._hand_over(self._connected, self._counter.last)

    def _on_connect_fail(self, _client: paho.Client, _userdata: object) -> None:
        if not self._outage_logged:
            self._outage_logged = True
            log.warning("mqtt.unreachable host=%s port=%d", self._settings.host, self._settings.port)

    def _on_disconnect(
        self, _client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        self._hand_over(self._disconnected, str(reason))

    def _hand_over(self, callback: Callable[..., None], argument: Any) -> None:
        assert self._loop is not None  # noqa: S101 - paho's thread starts after it is set
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(callback, argument)

    # On the event loop.

    def _connected(self, session: int) -> None:
        if self._task is None:
            return  # closing
        self._session = session
        self._in_flight = []
        self._publish_state(online=True)
        host, port = self._settings.host, self._settings.port
        log.info("mqtt.connected host=%s port=%d session=%d", host, port, session)

    def _disconnected(self, reason: str) -> None:
        if self._session is not None:
            log.warning("mqtt.disconnected session=%d reason=%s", self._session, reason)
        self._session = None

    async def _publish_records(self) -> None:
        async for record in self._sampler.records(self._settings.interval_s):
            try:
                self._publish_record(record)
            except Exception:  # one record that cannot be sent must not end the stream
                log.exception("mqtt.publish_failed sequence=%d", record.sequence)

    def _publish_record(self, record: telemetry_pb2.Telemetry) -> None:
        if self._session is None:
            return
        if any(_waits(info) for info in self._in_flight):
            # The network is slower than we are: this record is left out rather than queued.
            log.debug("mqtt.skipped sequence=%d", record.sequence)
            return
        properties = self._properties(PacketTypes.PUBLISH, expiry_s=self._settings.message_expiry_s)
        self._in_flight = [
            self._client.publish(
                self._topics.telemetry(name),
                encode(event, self._settings.encoding),
                qos=self._settings.qos,
                properties=properties,
            )
            for name, event in telemetry_events(self._topics, self._session, record)
        ]

    def _publish_state(self, *, online: bool) -> paho.MQTTMessageInfo | None:
        if self._session is None:
            return None
        self._revision += 1
        event = state_event(
            self._topics,
            self._state(self._session, online=online),
            run=self._session,
            revision=self._revision,
            time_ns=self._clock.wall_ns(),
        )
        payload = encode(event, self._settings.encoding)
        properties = self._properties(PacketTypes.PUBLISH)
        return self._client.publish(self._topics.state, payload, qos=1, retain=True, properties=properties)

    def _state(self, session: int, *, online: bool) -> fleet_pb2.DeviceState:
        return fleet_pb2.DeviceState(
            online=online,
            session=session,
            agent_version=self._agent_version,
            profile=self._profile,
            # An agent that is away serves none, and a will could not know which was the last.
            active_engine=self._active_engine if online else "",
        )

    def _properties(self, packet: int, expiry_s: int | None = None) -> Properties | None:
        if self._settings.protocol != "5":
            return None
        properties = Properties(packet)  # type: ignore[no-untyped-call]
        properties.ContentType = CONTENT_TYPES[self._settings.encoding]
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        return properties


def _on_log(_client: paho.Client, _userdata: object, _level: int, text: str) -> None:
    # paho calls every failed dial and every clean stop an error; only a callback of ours that raised is one.
    log.log(
        logging.ERROR if text.startswith("Caught exception") else logging.DEBUG, "mqtt.paho text=%s", text
    )


def _waits(info: paho.MQTTMessageInfo) -> bool:
    """Tell whether a message is still on its way; one that was lost is not."""
    try:
        return not info.is_published()
    except (ValueError, RuntimeError):
        return False


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"mqtt password_file {path} cannot be read: {error}") from error


def _tls_context(settings: MqttSettings) -> ssl.SSLContext:
    tls = settings.tls
    assert tls is not None  # noqa: S101
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file is not None:
            # With a password given, OpenSSL does not ask the terminal for that of an encrypted key.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except OSError as error:  # ssl.SSLError is one
        files = [str(path) for path in (tls.ca_file, tls.cert_file, tls.key_file) if path is not None]
        raise ValueError(f"mqtt tls files {', '.join(files)} cannot be used: {error}") from error
    return context
