"""The fleet's commands over TLS, with a certificate or a password of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner

from edgellm.cli.main import app
from tests.support.broker import Broker, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@dataclass(frozen=True)
class Secured:
    """A broker that wants a certificate of its authority, and a password besides."""

    url: str
    folder: Path


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Secured]:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    authority, stranger = trustme.CA(), trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("controller")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.crt")
    for name, certificate in (("server", server), ("client", client)):
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "wrong").write_text("other\n")
    # mosquitto's own tool writes the hash; "-b" takes the password from the command line.
    subprocess.run(["mosquitto_passwd", "-b", "-c", tmp_path / "users", "me", "secret"], check=True)
    broker = Broker("mosquitto", tmp_path)
    (tmp_path / "broker.conf").write_text(
        f"listener {broker.port} 127.0.0.1\nallow_anonymous false\nlog_dest stderr\nuser root\n"
        f"password_file {tmp_path}/users\ncafile {tmp_path}/ca.crt\nrequire_certificate true\n"
        f"certfile {tmp_path}/server.crt\nkeyfile {tmp_path}/server.key\n"
    )
    broker.start()
    yield Secured(f"mqtts://127.0.0.1:{broker.port}", tmp_path)
    broker.stop()


def connect(secured: Secured, **changes: str | None):
    options = {
        "ca": "ca.crt", "cert": "client.crt", "key": "client.key",
        "username": "me", "password-file": "password",
    } | changes  # fmt: skip
    words = ["fleet", "connect", secured.url]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", value if name == "username" else str(secured.folder / value)]
    return CliRunner().invoke(app, words)


def test_a_certificate_and_a_password_that_the_broker_knows_are_let_in_and_kept(secured: Secured):
    assert "answers" in connect(secured).stdout
    done = CliRunner().invoke(app, ["fleet", "watch", "--once", "--no-record"])
    assert done.stdout.splitlines()[-1] == "0 devices, 0 online", done.stderr


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ca": "stranger.crt"}, "certificate verify failed"),
        ({"password-file": "wrong"}, "Not authorized"),
        ({"ca": "nothing.crt"}, "nothing.crt"),
        ({"key": "server.key"}, "cannot be used"),
    ],
)
def test_what_is_wrong_with_the_way_is_said(secured: Secured, changes: dict[str, str], message: str):
    done = connect(secured, **changes)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (secured.folder / "home").exists()


def test_without_a_certificate_there_is_no_way_in(secured: Secured):
    done = connect(secured, cert=None, key=None)
    assert done.exit_code == 1
    assert "it closed the connection" in done.stderr
