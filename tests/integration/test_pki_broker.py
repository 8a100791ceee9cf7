"""A board's certificate of `edgellm pki` is its identity at a real broker, and a revoked one is none."""

from __future__ import annotations

import queue
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgellm import tls
from edgellm.pki.authority import Authority, Holder
from tests.support.broker import Broker, find_mosquitto, running_broker

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki")


def options(authority: Authority) -> str:
    """Of a broker that takes the common name for the user."""
    holder = authority.issue_device("broker", ["127.0.0.1"])
    lines = (
        "persistence false",
        f"cafile {holder.ca_file}",
        f"certfile {holder.cert_file}",
        f"keyfile {holder.key_file}",
        f"crlfile {authority.folder / 'crl.pem'}",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
    )
    return "\n".join(lines)


def accepted(broker: Broker, holder: Holder) -> bool:
    """Whether the broker lets a client with that certificate in."""
    answers: queue.Queue[bool] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.tls_set_context(tls.client_context(holder.ca_file, holder.cert_file, holder.key_file))
    client.on_connect = lambda *arguments: answers.put(not arguments[3].is_failure)
    # A broker that does not want the certificate just hangs up.
    client.on_disconnect = lambda *_: answers.put(False)
    client.connect_async(broker.host, broker.port)
    client.loop_start()
    try:
        return answers.get(timeout=15)
    finally:
        client.disconnect()
        client.loop_stop()


def test_the_common_name_of_a_board_is_its_user_name(authority):
    board = authority.issue_device("jetson-01")
    with running_broker("mosquitto", options(authority)) as broker:
        assert accepted(broker, board)
        assert "u'jetson-01'" in broker.log


def test_a_revoked_board_is_not_let_in(authority):
    board, other = authority.issue_device("jetson-01"), authority.issue_device("jetson-02")
    authority.revoke("jetson-01")
    with running_broker("mosquitto", options(authority)) as broker:
        assert not accepted(broker, board)
        assert accepted(broker, other)
