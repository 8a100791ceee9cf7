"""Connections to an MQTT broker, one after the other: between paho's thread and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgellm.fleet.topics import CONTENT_TYPES
from edgellm_agent.mqtt.backoff import Backoff
from edgellm_agent.mqtt.base import (
    MAX_PAYLOAD_BYTES,
    Answer,
    Done,
    MessageProperties,
    OnMessage,
    Publication,
)
from edgellm_agent.mqtt.credentials import RenewedContext, read_password, why_unreachable
from edgellm_agent.mqtt.session import SessionCounter
from edgellm_agent.mqtt.settings import MqttSettings

log = logging.getLogger(__name__)

_NO_MATCHING_SUBSCRIBERS = 0x10
# More than all windows together; what paho queues beyond its own window of 20.
_MAX_QUEUED = 64
# Messages to us that may wait for the event loop.
_MAX_INBOUND = 64
# A connection that stood this long ends the back-off: two agents with one name throw each other out at once.
_STABLE_S = 10.0


class Connection:
    """Owns paho's client and its thread, from `start` to `close`.

    paho's callbacks touch only the session counter, the back-off and the log, and hand everything else to
    the event loop, in order.
    """

    def __init__(
        self,
        settings: MqttSettings,
        client_id: str,
        *,
        counter: SessionCounter,
        will: Callable[[int], Publication],
        on_up: Callable[[int], None],
        on_down: Callable[[], None],
        backoff: Backoff | None = None,
    ) -> None:
        """Prepare to connect.

        `will` gives the last will of a session, on paho's thread; `on_up` is told each session that begins,
        `on_down` its end. Raises ValueError for a password or TLS file that cannot be used.
        """
        self._settings = settings
        self._five = settings.protocol == "5"
        self._counter = counter
        self._will = will
        self._on_up = on_up
        self._on_down = on_down
        self._backoff = backoff or Backoff()
        # The number of the connection that stands; None while there is none.
        self._session: int | None = None
        self._closing = False
        self._waiting: dict[int, tuple[Publication, Done | None]] = {}
        self._refused: set[tuple[str, str]] = set()
        self._subscriptions: dict[str, OnMessage] = {}
        self._inbound: queue.Queue[paho.MQTTMessage] = queue.Queue(_MAX_INBOUND)
        self._loop: asyncio.AbstractEventLoop | None = None
        # The filters of subscriptions by paho's number.
        self._asked: dict[int, str] = {}
        # On paho's thread: the outage that was told last, and since when we are connected.
        self._outage = ""
        self._since_s: float | None = None
        self._client = self._new_client(client_id)

    @property
    def session(self) -> int | None:
        """The number of the connection that stands."""
        return self._session

    def start(self) -> None:
        """Begin to connect; an absent broker is no error and is tried again."""
        self._loop = asyncio.get_running_loop()
        self._client.loop_start()

    def publish(self, message: Publication, done: Done | None = None) -> bool:
        """Send a message; False, and nothing more, where there is no connection."""
        if self._session is None:
            return False
        info = self._client.publish(
            message.topic, message.payload, message.qos, message.retain, self._publish_properties(message)
        )
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._waiting[info.mid] = (message, done)
        return True

    def subscribe(self, topic_filter: str, callback: OnMessage) -> None:
        """Take messages with QoS 1, in this connection and all that follow; `callback` must not block."""
        self._subscriptions[topic_filter] = callback
        if self._session is not None:
            self._ask_for(topic_filter)

    async def close(self, deadline_s: float) -> None:
        """Disconnect, so that no will is sent."""
        self._closing = True
        self._session = None
        self._client.disconnect()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._client.loop_stop), deadline_s)

    def _new_client(self, client_id: str) -> paho.Client:
        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            # MQTT 3.1.1 knows no expiry: a session that is kept is kept for ever.
            clean_session=None if self._five else True,
        )
        client.on_log = _on_log
        client.suppress_exceptions = True
        client.max_queued_messages_set(_MAX_QUEUED)
        if settings.username is not None:
            client.username_pw_set(settings.username, read_password(settings.password_file))
        if settings.tls is not None:
            client.tls_set_context(RenewedContext.of(settings.tls))
        client.on_pre_connect = self._on_pre_connect
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.connect_async(
            settings.host,
            settings.port,
            keepalive=settings.keepalive_s,
            clean_start=settings.session_expiry_s == 0 if self._five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=self._connect_properties(),
        )
        return client

    # On paho's thread.

    def _on_pre_connect(self, client: paho.Client, _userdata: object) -> None:
        will = self._will(self._counter.last + 1)
        properties = self._content_type(PacketTypes.WILLMESSAGE, will.payload)
        client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        self._since_s = None

    def _on_socket_open(self, _client: paho.Client, _userdata: object, _socket: object) -> None:
        # From here on the broker may know the will, so its number is used up; a refused dial uses up none.
        self._counter.take()

    def _on_connect(
        self, client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            self._tell_outage(f"refused: {reason}")
            return
        # paho would send again what was not acknowledged, and an old state would replace the new one; what
        # must not be lost waits in the outbox.
        client.drop_out_messages()
        self._outage = ""
        self._since_s = time.monotonic()
        self._hand_over(self._up, self._counter.last)

    def _on_connect_fail(self, client: paho.Client, _userdata: object) -> None:
        # paho calls this where it has caught the error, and tells it nowhere else.
        self._tell_outage(why_unreachable(sys.exc_info()[1]))
        self._wait_before_dialing(client)

    def _on_disconnect(
        self, client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if self._since_s is not None:
            if time.monotonic() - self._since_s >= _STABLE_S:
                self._backoff.reset()
        elif not self._closing and not self._outage.startswith("refused"):
            hint = "; does it want another client certificate?" if self._settings.tls is not None else ""
            self._tell_outage(f"closed by the broker before it answered{hint}")
        self._wait_before_dialing(client)
        self._hand_over(self._down, str(reason))

    def _on_publish(
        self, _client: paho.Client, _userdata: object, mid: int, reason: ReasonCode, _properties: object
    ) -> None:
        self._hand_over(self._published, (mid, reason))

    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        reasons: list[ReasonCode],
        _properties: object,
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                self._hand_over(self._subscription_refused, (mid, str(reason)))

    def _on_message(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        if len(message.payload) > MAX_PAYLOAD_BYTES:
            log.warning("mqtt.message_too_long topic=%s bytes=%d", message.topic, len(message.payload))
            return
        try:
            self._inbound.put_nowait(message)
        except queue.Full:
            log.warning("mqtt.message_dropped topic=%s waiting=%d", message.topic, _MAX_INBOUND)
            return
        self._hand_over(self._dispatch, None)

    def _tell_outage(self, what: str) -> None:
        # An outage is one line, not one per dial; another reason is another line.
        if what != self._outage:
            self._outage = what
            host, port = self._settings.host, self._settings.port
            log.warning("mqtt.unreachable host=%s port=%d reason=%s", host, port, what)

    def _wait_before_dialing(self, client: paho.Client) -> None:
        wait_s = self._backoff.next_s()
        client.reconnect_delay_set(wait_s, wait_s)  # type: ignore[arg-type]  # it only adds and compares them

    def _hand_over(self, callback: Callable[..., None], argument: Any) -> None:
        assert self._loop is not None  # noqa: S101 - paho's thread starts after it is set
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(callback, argument)

    # On the event loop.

    def _up(self, session: int) -> None:
        if self._closing:
            return
        self._session = session
        self._waiting.clear()
        self._asked.clear()
        for topic_filter in self._subscriptions:
            self._ask_for(topic_filter)
        host, port = self._settings.host, self._settings.port
        log.info("mqtt.connected host=%s port=%d session=%d", host, port, session)
        self._on_up(session)

    def _down(self, reason: str) -> None:
        if self._session is None:
            return
        log.warning("mqtt.disconnected session=%d reason=%s", self._session, reason)
        self._session = None
        self._waiting.clear()
        self._on_down()

    def _published(self, answered: tuple[int, ReasonCode]) -> None:
        mid, reason = answered
        # Absent: it belongs to the connection before.
        message, done = self._waiting.pop(mid, (None, None))
        if message is None:
            return
        if reason.is_failure and (message.topic, str(reason)) not in self._refused:
            self._refused.add((message.topic, str(reason)))
            log.error("mqtt.publish_refused topic=%s reason=%s", message.topic, reason)
        if done is not None:
            done(_answer(reason))

    def _ask_for(self, topic_filter: str) -> None:
        _, mid = self._client.subscribe(topic_filter, qos=1)
        if mid is not None:
            self._asked[mid] = topic_filter

    def _subscription_refused(self, answer: tuple[int, str]) -> None:
        mid, reason = answer
        log.error("mqtt.subscription_refused filter=%s reason=%s", self._asked.get(mid, "?"), reason)

    def _dispatch(self, _nothing: None) -> None:
        message = self._inbound.get_nowait()
        properties = _received(message)
        for topic_filter, callback in list(self._subscriptions.items()):
            if not paho.topic_matches_sub(topic_filter, message.topic):
                continue
            try:
                callback(message.topic, bytes(message.payload), properties)
            except Exception:
                log.exception("mqtt.message_failed topic=%s", message.topic)

    def _connect_properties(self) -> Properties | None:
        if not self._five:
            return None
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._settings.session_expiry_s
        # Room for a topic and its properties.
        properties.MaximumPacketSize = MAX_PAYLOAD_BYTES + 4096
        return properties

    def _publish_properties(self, message: Publication) -> Properties | None:
        properties = self._content_type(PacketTypes.PUBLISH, message.payload)
        if properties is not None:
            if message.expiry_s is not None:
                properties.MessageExpiryInterval = message.expiry_s
            if message.correlation_data:
                properties.CorrelationData = message.correlation_data
        return properties

    def _content_type(self, packet: int, payload: bytes) -> Properties | None:
        if not self._five:
            return None
        properties = Properties(packet)  # type: ignore[no-untyped-call]
        # By the payload, not by the settings: the outbox may hold what was encoded before they changed.
        properties.ContentType = CONTENT_TYPES["json" if payload[:1] == b"{" else "protobuf"]
        return properties


def _answer(reason: ReasonCode) -> Answer:
    if reason.is_failure:
        return Answer.REFUSED
    return Answer.UNHEARD if reason.value == _NO_MATCHING_SUBSCRIBERS else Answer.TAKEN


def _received(message: paho.MQTTMessage) -> MessageProperties:
    sent = message.properties
    return MessageProperties(
        retain=message.retain,
        content_type=getattr(sent, "ContentType", None),
        response_topic=getattr(sent, "ResponseTopic", None),
        correlation_data=getattr(sent, "CorrelationData", None),
    )


def _on_log(_client: paho.Client, _userdata: object, _level: int, text: str) -> None:
    # paho calls every failed dial and every clean stop an error; only a callback of ours that raised is one.
    log.log(
        logging.ERROR if text.startswith("Caught exception") else logging.DEBUG, "mqtt.paho text=%s", text
    )
