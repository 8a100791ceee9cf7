"""The shipped broker configuration and ACL on a real mosquitto: each allowed and each denied action."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.pki import Authority, Identity
from tests.support.publishing import (
    DEVICE,
    PREFIX,
    is_state,
    publishing,
    receive,
    settings_for,
    until,
    worker_ended,
)

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
SHIPPED = Path(__file__).parents[2] / "deploy" / "mosquitto"
CONTROLLER = "fleet-controller"
OTHER = "edgellm/v1/default/default/jetson-02"
NOT_AUTHORIZED = 0x87


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The shipped configuration with this test's paths; only the listener's line is the test's own."""
    identity, data = authority.issue("broker", "127.0.0.1"), tmp_path_factory.mktemp("mosquitto")
    config = (SHIPPED / "edgellm.conf").read_text("utf-8").replace("listener 8883\n", "")
    for shipped, ours in (
        ("/etc/mosquitto/edgellm.acl", SHIPPED / "edgellm.acl"),
        ("/etc/mosquitto/certs/ca.pem", identity.ca_file),
        ("/etc/mosquitto/certs/broker.pem", identity.cert_file),
        ("/etc/mosquitto/certs/broker.key", identity.key_file),
        ("/var/lib/mosquitto", data),
    ):
        assert shipped in config
        config = config.replace(shipped, str(ours))
    # Options of all listeners come before the first one.
    config = config.replace("per_listener_settings false\n", "")
    with running_broker("mosquitto", config) as running:
        yield running


class Client:
    """A client with a certificate that asks the broker for one thing after the other."""

    def __init__(self, broker: Broker, identity: Identity) -> None:
        self.answers: queue.Queue[int] = queue.Queue()
        self.messages: queue.Queue[str] = queue.Queue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.tls_set_context(identity.context())
        self._client.on_connect = lambda *arguments: self.answers.put(arguments[3].value)
        self._client.on_publish = lambda *arguments: self.answers.put(arguments[3].value)
        self._client.on_subscribe = lambda *arguments: self.answers.put(arguments[3][0].value)
        self._client.on_message = lambda _client, _data, message: self.messages.put(message.topic)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        assert self.answers.get(timeout=10) == 0

    def publish(self, topic: str) -> bool:
        """Whether the broker takes it."""
        self._client.publish(topic, b"x", qos=1)
        answer = self.answers.get(timeout=10)
        # 0x10: taken, and nobody listens.
        assert answer in (0, 0x10, NOT_AUTHORIZED)
        return answer != NOT_AUTHORIZED

    def subscribe(self, topic_filter: str) -> None:
        """mosquitto 2.0.11 grants every subscription and checks each message at its delivery."""
        self._client.subscribe(topic_filter, qos=1)
        assert self.answers.get(timeout=10) < 0x80

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextlib.contextmanager
def client(broker: Broker, authority: Authority, name: str) -> Iterator[Client]:
    opened = Client(broker, authority.issue(name))
    try:
        yield opened
    finally:
        opened.close()


OWN = [
    "state",
    "reported",
    "tele/thermal",
    "tele/power",
    "tele/runtime",
    "evt/throttle",
    "evt/deploy",
    "evt/worker",
    "cmd/resp",
]
FROM_THE_FLEET = ["desired", "cmd/req"]


def test_a_device_writes_its_own_topics_and_no_others(broker: Broker, authority: Authority) -> None:
    with client(broker, authority, DEVICE) as device:
        allowed = {leaf: device.publish(f"{PREFIX}/{leaf}") for leaf in OWN}
        own = {leaf: device.publish(f"{PREFIX}/{leaf}") for leaf in [*FROM_THE_FLEET, "other", "tele/a/b"]}
        others = {leaf: device.publish(f"{OTHER}/{leaf}") for leaf in OWN + FROM_THE_FLEET}
        elsewhere = {topic: device.publish(topic) for topic in ("edgellm/v1", DEVICE, "else/where")}
    assert allowed == dict.fromkeys(OWN, True)
    assert not any((own | others | elsewhere).values())


def test_a_device_reads_what_the_fleet_tells_it_and_nothing_else(
    broker: Broker, authority: Authority
) -> None:
    with (
        client(broker, authority, CONTROLLER) as controller,
        client(broker, authority, "jetson-02") as other,
        client(broker, authority, DEVICE) as device,
    ):
        device.subscribe("#")
        for leaf in FROM_THE_FLEET:
            assert controller.publish(f"{OTHER}/{leaf}")
        for leaf in OWN:
            assert other.publish(f"{OTHER}/{leaf}")
            assert device.publish(f"{PREFIX}/{leaf}")
        for leaf in FROM_THE_FLEET:
            assert controller.publish(f"{PREFIX}/{leaf}")
        heard = [device.messages.get(timeout=10) for _ in FROM_THE_FLEET]
        # Published last, so whatever else was to come would have come before.
        assert device.messages.empty()
    assert heard == [f"{PREFIX}/desired", f"{PREFIX}/cmd/req"]


def test_a_controller_reads_all_and_writes_only_wishes_and_commands(
    broker: Broker, authority: Authority
) -> None:
    with (
        client(broker, authority, CONTROLLER) as controller,
        client(broker, authority, DEVICE) as device,
    ):
        controller.subscribe("edgellm/v1/+/+/+/#")
        for leaf in OWN:
            assert device.publish(f"{PREFIX}/{leaf}")
        heard = [controller.messages.get(timeout=10) for _ in OWN]
        assert [controller.publish(f"{PREFIX}/{leaf}") for leaf in FROM_THE_FLEET] == [True, True]
        assert not any(controller.publish(f"{PREFIX}/{leaf}") for leaf in OWN)
    assert heard == [f"{PREFIX}/{leaf}" for leaf in OWN]


def test_several_controllers_share_one_subscription(broker: Broker, authority: Authority) -> None:
    with (
        client(broker, authority, CONTROLLER) as first,
        client(broker, authority, CONTROLLER) as second,
        client(broker, authority, DEVICE) as device,
    ):
        for controller in (first, second):
            controller.subscribe("$share/fleet/edgellm/v1/+/+/+/evt/+")
        for _ in range(20):
            assert device.publish(f"{PREFIX}/evt/worker")
        first.subscribe("edgellm/v1/+/+/+/cmd/resp")
        second.subscribe("edgellm/v1/+/+/+/cmd/resp")
        assert device.publish(f"{PREFIX}/cmd/resp")
        shares = [_until_response(controller) for controller in (first, second)]
    assert sum(shares) == 20
    assert all(shares)


def _until_response(controller: Client) -> int:
    count = 0
    while not controller.messages.get(timeout=10).endswith("cmd/resp"):
        count += 1
    return count


def test_a_certificate_without_a_role_may_do_nothing(broker: Broker, authority: Authority) -> None:
    with client(broker, authority, "nobody") as nobody:
        assert not any(nobody.publish(f"{PREFIX}/{leaf}") for leaf in OWN + FROM_THE_FLEET)


async def test_the_agent_itself_works_under_the_shipped_rules(
    broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    reader, device = authority.issue(CONTROLLER), authority.issue(DEVICE)
    heard: list[bytes] = []
    with listening(
        broker, f"{PREFIX}/#", prepare=lambda client: client.tls_set_context(reader.context())
    ) as listener:
        async with publishing(settings_for(broker, tls=device.settings()), tmp_path) as publisher:
            publisher.on_message(publisher.topics.desired, lambda _, payload, __: heard.append(payload))
            await receive(listener, is_state(online=True))
            publisher.happened(worker_ended(1))
            await receive(listener, lambda message: message.leaf == "worker" and message.payload[:1] == b"{")
            await until(lambda: publisher.part().queued_bytes == 0)


async def test_an_agent_with_the_certificate_of_another_device_is_told_that_it_is_refused(
    broker: Broker, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = authority.issue("jetson-02")
    async with publishing(settings_for(broker, tls=other.settings()), tmp_path) as publisher:
        publisher.happened(worker_ended(1))
        await until(lambda: "evt/worker reason=Not authorized" in caplog.text)
        # Kept: somebody may correct the certificate.
        assert publisher.part().queued_events == 1
    assert caplog.text.count("mqtt.publish_refused topic=edgellm/v1/default/default/jetson-01/state") == 1
