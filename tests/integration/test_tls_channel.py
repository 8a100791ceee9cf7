"""HOST:PORT is spoken to over TLS with a certificate on both sides, made by `edgellm pki`."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import pytest

from edgellm.client import Client
from edgellm.devices import Device, TlsFiles
from edgellm.errors import DeviceUnreachableError, EdgellmError
from edgellm.pki.authority import Authority, Holder
from tests.support.fake_device import FakeDevice, serve
from tests.support.twins import connected

BOARD = "jetson-01"


def two_years_ago() -> datetime:
    return datetime.now(timezone.utc) - timedelta(days=730)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOGNAME", "alice")
    return tmp_path / "home"


@pytest.fixture
def authority(home: Path) -> Authority:
    """In the folder where a client looks by itself; `alice` may operate the board."""
    Authority.create(home / "pki", now=two_years_ago)
    made = Authority(home / "pki")
    made.issue_client("alice", "operator")
    return made


@pytest.fixture
def board(authority: Authority) -> Holder:
    return authority.issue_device(BOARD)


@pytest.fixture(params=["sync", "async"])
def connect(request):
    return functools.partial(connected, request.param)


@contextmanager
def serving(holder: Holder | None):
    """The port of a device that shows this certificate, and wants one; without TLS if there is none."""
    credentials = holder and grpc.ssl_server_credentials(
        [(holder.key_file.read_bytes(), holder.cert_file.read_bytes())], holder.ca_file.read_bytes(), True
    )
    server, port = serve(FakeDevice(), "127.0.0.1:0", credentials)
    try:
        yield port
    finally:
        server.stop(grace=None).wait()


async def test_a_board_is_known_by_its_name_whatever_its_address_is(connect, board):
    with serving(board) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}")) as client:
            assert (await client.info()).device == "fake-01"


async def test_a_board_without_an_entry_in_the_book_is_known_by_its_address(connect, authority):
    holder = authority.issue_device(BOARD, ["127.0.0.1"])
    with serving(holder) as port:
        async with connect(f"127.0.0.1:{port}") as client:
            assert (await client.info()).device == "fake-01"


async def test_a_proxy_of_the_environment_is_not_asked(connect, board, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with serving(board) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}")) as client:
            assert (await client.info()).device == "fake-01"


async def test_another_boards_certificate_is_refused(connect, board):
    with serving(board) as port:
        async with connect(Device("jetson-02", f"127.0.0.1:{port}")) as client:
            with pytest.raises(DeviceUnreachableError, match="certificate is another device's"):
                await client.info()


async def test_the_name_to_look_for_can_be_given(connect, board):
    with serving(board) as port:
        device = Device("porch", f"127.0.0.1:{port}", tls=TlsFiles(server_name=BOARD))
        async with connect(device) as client:
            assert (await client.info()).device == "fake-01"


async def test_a_board_of_another_authority_is_refused(connect, authority, tmp_path):
    Authority.create(tmp_path / "other")
    with serving(Authority(tmp_path / "other").issue_device(BOARD)) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}")) as client:
            with pytest.raises(DeviceUnreachableError, match="from another authority") as error:
                await client.info()
    assert "ca.pem" in error.value.hint


async def test_a_board_whose_certificate_has_expired_is_refused(connect, authority):
    holder = Authority(authority.folder, now=two_years_ago).issue_device(BOARD)
    with serving(holder) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}")) as client:
            with pytest.raises(DeviceUnreachableError, match="its certificate has expired") as error:
                await client.info()
    assert "pki renew" in error.value.hint


async def test_a_client_of_another_authority_is_told_what_may_be_wrong(connect, board, tmp_path):
    Authority.create(tmp_path / "other")
    stranger = Authority(tmp_path / "other").issue_client("alice", "admin")
    files = TlsFiles(board.ca_file, stranger.cert_file, stranger.key_file)
    with serving(board) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}", tls=files)) as client:
            with pytest.raises(DeviceUnreachableError) as error:
                await client.info()
    assert "from the device's authority, and not revoked" in error.value.hint


async def test_what_does_not_speak_tls_is_named_as_such(connect, authority):
    with serving(None) as port:
        async with connect(Device(BOARD, f"127.0.0.1:{port}")) as client:
            with pytest.raises(DeviceUnreachableError, match="does not speak TLS"):
                await client.info()


async def test_a_renewed_certificate_is_taken_by_the_next_client(connect, authority, board):
    past = Authority(authority.folder, now=two_years_ago)
    past.revoke("alice")
    past.issue_client("bob", "operator")
    device = functools.partial(
        Device, BOARD, tls=TlsFiles(None, authority.folder / "bob.pem", authority.folder / "bob.key")
    )
    with serving(board) as port:
        with pytest.raises(EdgellmError, match=r"bob\.pem has expired") as error:
            Client(device(target=f"127.0.0.1:{port}"))
        assert "pki renew bob" in error.value.hint
        authority.renew("bob")
        async with connect(device(target=f"127.0.0.1:{port}")) as client:
            assert (await client.info()).device == "fake-01"


def test_without_any_certificate_the_way_to_one_is_shown(home):
    with pytest.raises(EdgellmError, match="wants a certificate") as error:
        Client(Device(BOARD, "192.0.2.7:7400"))
    assert "pki issue" in error.value.hint
    assert "ssh://" in error.value.hint


def test_the_only_certificate_of_a_client_is_taken_and_a_boards_never(home, authority, board, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody-else")
    Client(Device(BOARD, "192.0.2.7:7400")).close()
    authority.issue_client("bob", "viewer")
    with pytest.raises(EdgellmError, match=r"which certificate .* alice, bob$"):
        Client(Device(BOARD, "192.0.2.7:7400"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ca_file": "missing.pem"}, "no file .*missing"),
        ({"ca_file": "garbage.pem"}, "tls files .*garbage"),
        ({"cert_file": "alice.pem", "key_file": "jetson-01.key"}, "tls files .*KEY_VALUES_MISMATCH|mismatch"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_before_anything_is_sent(authority, board, files, words):
    (authority.folder / "garbage.pem").write_text("garbage")
    paths = {name: authority.folder / file for name, file in files.items()}
    with pytest.raises(EdgellmError, match=words):
        Client(Device(BOARD, "192.0.2.7:7400", tls=TlsFiles(**paths)))
