"""TLS to a real mosquitto: who is trusted, who is not, and what the log says then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from edgellm_agent.mqtt.credentials import load_tls
from edgellm_agent.mqtt.settings import MqttSettings, MqttTlsSettings
from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.pki import Authority, Identity
from tests.support.publishing import DEVICE, PREFIX, is_state, publishing, receive, settings_for, until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
YESTERDAY = datetime.now(timezone.utc) - timedelta(days=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def tls_broker(identity: Identity, *lines: str) -> Iterator[Broker]:
    options = (
        "persistence false",
        f"cafile {identity.ca_file}",
        f"certfile {identity.cert_file}",
        f"keyfile {identity.key_file}",
        "tls_version tlsv1.2",
        *(lines or ("allow_anonymous true",)),
    )
    with running_broker("mosquitto", "\n".join(options)) as broker:
        yield broker


MUTUAL = ("require_certificate true", "use_identity_as_username true", "allow_anonymous false")


@contextlib.asynccontextmanager
async def refused(
    settings: MqttSettings, state_dir: Path, caplog: pytest.LogCaptureFixture, why: str
) -> AsyncIterator[None]:
    """The device is not connected, says why, once, and never speaks without TLS."""

    def told() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        return [line for line in lines if line.startswith("mqtt.unreachable")]

    async with publishing(settings, state_dir) as publisher:
        await until(lambda: bool(told()))
        assert not publisher.connected
        yield
    assert len(told()) == 1
    assert why in told()[0]


async def test_a_device_with_a_certificate_is_heard(authority: Authority, tmp_path: Path) -> None:
    device, reader = authority.issue(DEVICE), authority.issue("reader")
    with tls_broker(authority.issue("broker", "127.0.0.1"), *MUTUAL) as broker:
        with listening(
            broker, f"{PREFIX}/#", prepare=lambda client: client.tls_set_context(reader.context())
        ) as listener:
            async with publishing(settings_for(broker, tls=device.settings()), tmp_path):
                await receive(listener, is_state(online=True))
        assert f"as edgellm-default-default-{DEVICE}" in broker.log
        assert f"u'{DEVICE}'" in broker.log


async def test_a_password_is_checked_and_a_wrong_one_is_told(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passwords = tmp_path / "passwords"
    await asyncio.to_thread(
        subprocess.run, ["mosquitto_passwd", "-b", "-c", passwords, DEVICE, "s3cret "], check=True, timeout=20
    )
    good, wrong = tmp_path / "good", tmp_path / "wrong"
    good.write_text("s3cret \n")
    wrong.write_text("secret\n")
    identity = authority.issue("broker", "127.0.0.1")
    tls = MqttTlsSettings(ca_file=authority.ca_file)
    with tls_broker(identity, "allow_anonymous false", f"password_file {passwords}") as broker:
        settings = settings_for(broker, tls=tls, username=DEVICE, password_file=wrong)
        async with refused(settings, tmp_path / "state", caplog, "refused: Not authorized"):
            pass
        settings = settings_for(broker, tls=tls, username=DEVICE, password_file=good)
        async with publishing(settings, tmp_path / "state") as publisher:
            await until(lambda: publisher.connected)
    assert "s3cret" not in caplog.text


async def test_a_broker_of_another_authority_is_not_trusted(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority(tmp_path / "stranger").issue("broker", "127.0.0.1")
    with tls_broker(stranger) as broker:
        settings = settings_for(broker, tls=MqttTlsSettings(ca_file=authority.ca_file))
        why = "the broker's certificate is not trusted: self-signed certificate in certificate chain"
        async with refused(settings, tmp_path, caplog, why):
            assert "New client connected" not in broker.log


async def test_an_expired_certificate_is_not_trusted(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tls_broker(authority.issue("old-broker", "127.0.0.1", expires=YESTERDAY)) as broker:
        settings = settings_for(broker, tls=MqttTlsSettings(ca_file=authority.ca_file))
        async with refused(settings, tmp_path, caplog, "not trusted: certificate has expired"):
            assert "New client connected" not in broker.log


async def test_a_certificate_of_another_host_is_not_trusted(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tls_broker(authority.issue("elsewhere", "broker.example")) as broker:
        settings = settings_for(broker, tls=MqttTlsSettings(ca_file=authority.ca_file))
        async with refused(settings, tmp_path, caplog, "not trusted: IP address mismatch"):
            assert "New client connected" not in broker.log


async def test_a_broker_without_tls_is_not_spoken_to(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_broker("mosquitto") as broker:
        settings = settings_for(broker, tls=MqttTlsSettings(ca_file=authority.ca_file))
        async with refused(settings, tmp_path, caplog, "reason="):
            assert "New client connected" not in broker.log


@pytest.mark.parametrize("certificate", ["none", "of a stranger", "expired"])
async def test_a_device_without_a_good_certificate_is_told_what_may_be_wrong(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, certificate: str
) -> None:
    tls = MqttTlsSettings(ca_file=authority.ca_file)
    if certificate == "of a stranger":
        stranger = Authority(tmp_path / "stranger").issue(DEVICE)
        tls = tls.model_copy(update={"cert_file": stranger.cert_file, "key_file": stranger.key_file})
    elif certificate == "expired":
        tls = authority.issue("expired", expires=YESTERDAY).settings()
    with tls_broker(authority.issue("broker", "127.0.0.1"), *MUTUAL) as broker:
        settings = settings_for(broker, tls=tls)
        async with refused(settings, tmp_path / "state", caplog, "does it want another client certificate?"):
            assert "New client connected" not in broker.log


def test_tls_below_1_2_is_not_spoken(authority: Authority) -> None:
    context = load_tls(MqttTlsSettings(ca_file=authority.ca_file))
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_a_renewed_certificate_is_taken_at_the_next_connection(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tls_broker(authority.issue("broker", "127.0.0.1"), *MUTUAL) as broker:
        expired = authority.issue("renewed", expires=YESTERDAY)
        async with publishing(settings_for(broker, tls=expired.settings()), tmp_path) as publisher:
            await until(lambda: "mqtt.unreachable" in caplog.text)
            # The same files; the agent is not told.
            authority.issue("renewed")
            await until(lambda: publisher.connected, deadline_s=40)


async def test_files_that_are_gone_for_a_while_are_told_and_do_not_end_the_dialing(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = authority.issue("half-written")
    with tls_broker(authority.issue("broker", "127.0.0.1"), *MUTUAL) as broker:
        async with publishing(settings_for(broker, tls=device.settings()), tmp_path) as publisher:
            await until(lambda: publisher.connected)
            key = device.key_file.read_bytes()
            device.key_file.unlink()
            broker.stop()
            broker.start()
            await until(lambda: "half-written.key cannot be used" in caplog.text, deadline_s=40)
            device.key_file.write_bytes(key)
            await until(lambda: publisher.connected, deadline_s=40)
