"""Makes the MQTT clients of the fleet side: MQTT 5, TLS, one way to say why a broker cannot be used."""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgellm import tls
from edgellm.errors import EdgellmError
from edgellm.fleet.settings import BrokerSettings, password

_KEEPALIVE_S = 30
# Receivers are few, and a broker that comes back may drop what devices tell before they are there: mosquitto
# 2.0.11 forgets shared subscriptions when it restarts.
_RECONNECT_MIN_S, _RECONNECT_MAX_S = 1, 2


class BrokerError(EdgellmError):
    """The broker cannot be reached, or does not let us do what we must."""


class Connection:
    """One paho client that connects, subscribes at every connection, and connects again.

    The callbacks run on paho's thread. `on_message` gets every message; unless `manual_ack` the client
    acknowledges when it returns.

    Args:
        settings: The broker.
        client_id: The broker keeps a session under this name.
        subscriptions: Topic filters, each with its quality of service.
        on_message: Takes each message; must not block for long.
        on_link: Is told when the connection stands (True) or fell (False).
        session_expiry_s: How long the broker keeps messages for us while we are away; 0: not at all.
        receive_maximum: Messages that the broker may send before we acknowledge.
        manual_ack: Whoever takes a message calls `client.ack` once it is safe.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        subscriptions: list[tuple[str, int]],
        *,
        on_message: Callable[[paho.MQTTMessage], None],
        on_link: Callable[[bool], None] = lambda _: None,
        session_expiry_s: int = 0,
        receive_maximum: int = 1000,
        manual_ack: bool = False,
    ) -> None:
        """Raises EdgellmError for a TLS or password file that cannot be used."""
        self._settings = settings
        self._subscriptions = subscriptions
        self._on_link = on_link
        self._changed = threading.Condition()
        self._ready = False
        self._refusal = ""
        self._subscribe_mid: int | None = None
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=manual_ack,
        )
        self.client.suppress_exceptions = True
        self.client.reconnect_delay_set(_RECONNECT_MIN_S, _RECONNECT_MAX_S)
        if settings.username is not None:
            self.client.username_pw_set(settings.username, password(settings))
        if settings.tls:
            self.client.tls_set_context(_tls_context(settings))
        self.client.on_connect = self._connected
        self.client.on_connect_fail = self._unreachable
        self.client.on_disconnect = self._disconnected
        self.client.on_subscribe = self._subscribed
        self.client.on_message = lambda _client, _data, message: on_message(message)
        self._properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        self._properties.SessionExpiryInterval = session_expiry_s
        self._properties.ReceiveMaximum = receive_maximum
        self._clean_start = session_expiry_s == 0

    def start(self) -> None:
        """Begins to connect; an absent broker is tried again until `close`."""
        self.client.connect_async(
            self._settings.host,
            self._settings.port,
            keepalive=_KEEPALIVE_S,
            clean_start=self._clean_start,
            properties=self._properties,
        )
        self.client.loop_start()

    def wait_ready(self, deadline_s: float) -> None:
        """Returns once it is connected and subscribed; raises BrokerError, which says why not."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._refusal, deadline_s)
            if self._ready:
                return
            why = self._refusal or f"no answer within {deadline_s:g} s"
        raise BrokerError(
            f"the broker {self._settings.broker} cannot be used: {why}",
            "check --broker and that it runs, --ca, --cert and --username",
        )

    def publish(self, topic: str, payload: bytes, *, content_type: str) -> paho.MQTTMessageInfo:
        """Publishes a retained message with QoS 1; what it gives can be waited for."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = content_type
        return self.client.publish(topic, payload, qos=1, retain=True, properties=properties)

    def close(self) -> None:
        """Disconnects; what the broker keeps for us stays there until the session expires."""
        self.client.disconnect()
        self.client.loop_stop()

    # On paho's thread.

    def _connected(
        self, client: paho.Client, _data: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            self._refuse(str(reason))
            return
        # Always: a broker without persistence has forgotten us.
        _result, self._subscribe_mid = client.subscribe(
            [(name, _options(qos)) for name, qos in self._subscriptions]
        )
        self._on_link(True)

    def _subscribed(
        self, _client: paho.Client, _data: object, mid: int, reasons: list[ReasonCode], _properties: object
    ) -> None:
        if mid != self._subscribe_mid:
            return
        refused = [
            f"may not subscribe to {name}: {reason}"
            for (name, _qos), reason in zip(self._subscriptions, reasons, strict=False)
            if reason.is_failure
        ]
        if refused:
            self._refuse("; ".join(refused))
            return
        with self._changed:
            self._ready, self._refusal = True, ""
            self._changed.notify_all()

    def _unreachable(self, _client: paho.Client, _data: object) -> None:
        # paho calls this while it handles the error, and does not hand it over.
        self._refuse(f"it cannot be reached: {sys.exc_info()[1] or 'no answer'}")

    def _disconnected(
        self, _client: paho.Client, _data: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        with self._changed:
            if not self._ready and not self._refusal:
                # As a broker does that wants a certificate and gets none.
                self._refuse(f"it closed the connection: {reason}")
            self._ready = False
        self._on_link(False)

    def _refuse(self, why: str) -> None:
        with self._changed:
            self._refusal = why
            self._changed.notify_all()


def _options(qos: int) -> Any:
    return SubscribeOptions(qos=qos)


def _tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    try:
        return tls.client_context(settings.ca, settings.cert, settings.key)
    except ValueError as error:
        raise EdgellmError(str(error), "check --ca, --cert and --key") from None
