"""Keys from the command line to a device and back, over real gRPC."""

from __future__ import annotations

import asyncio
import json
import threading

import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from edgellm.cli.main import app
from edgellm.v1 import trust_pb2, trust_pb2_grpc
from edgellm_agent.services.trust import TrustServicer
from edgellm_agent.trust.policy import DeviceTrust, Held
from edgellm_agent.trust.settings import TrustSettings
from tests.support.signing import NOW_S, Signer

ENGINE = "sha256:" + "ab" * 32


class TrustServer:
    """A device's trust behind a Unix socket, in a thread of its own."""

    def __init__(self, root):
        self.target = f"unix://{root}/a.sock"
        self.held: list[Held] = []
        self._root = root
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        trust = DeviceTrust(TrustSettings(), self._root, "orin-nano-8gb")
        trust.start()
        server = grpc.aio.server()
        trust_pb2_grpc.add_TrustServiceServicer_to_server(TrustServicer(trust, lambda: self.held), server)
        server.add_insecure_port(self.target)
        await server.start()
        self._ready.set()
        await self._end.wait()
        await server.stop(0)
        await trust.close()


@pytest.fixture
def device(short_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    with TrustServer(short_dir) as server:
        run("device", "add", "jetson-01", server.target)
        yield server


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def failure(*args):
    result = CliRunner().invoke(app, [*(str(arg) for arg in args), "--json"])
    assert result.exit_code == 1
    return json.loads(result.stderr)["error"]


def keys():
    return json.loads(run("key", "list", "--device", "jetson-01", "--json"))["keys"]


def test_a_key_is_made_trusted_listed_and_revoked(device):
    assert "knows no key" in run("key", "list", "--device", "jetson-01")
    made = json.loads(run("key", "generate", "ci", "--not-before", "2026-01-01", "--days", "365", "--json"))
    assert made["not_after"] == "2027-01-01T00:00:00Z"
    assert made["key_id"] in run("key", "trust", "ci", "--device", "jetson-01")
    (key,) = keys()
    assert (key["name"], key["key_id"], key["revoked_at"]) == ("ci", made["key_id"], None)
    assert key["not_before"] == "2026-01-01T00:00:00+00:00"
    assert "2026-01-01 to 2027-01-01" in run("key", "list", "--device", "jetson-01")
    assert "no longer trusts ci" in run("key", "revoke", "ci", "--device", "jetson-01")
    assert keys()[0]["revoked_at"] is not None
    error = failure("key", "trust", "ci", "--device", "jetson-01")
    assert error["code"] == "FAILED_PRECONDITION"
    assert "never trusted again" in error["message"]


def test_revoking_names_the_engines_for_which_nobody_stands_any_more(device, tmp_path):
    signer = Signer.make("ci")
    (tmp_path / "ci.pub.json").write_bytes(signer.public.to_json())
    run("key", "trust", tmp_path / "ci.pub.json", "--device", "jetson-01")
    device.held = [Held(ENGINE, [signer.release(ENGINE)])]
    revoked = json.loads(run("key", "revoke", "ci", "--device", "jetson-01", "--json"))
    assert revoked["engines"] == [ENGINE]


def test_an_unknown_key_cannot_be_revoked(device):
    error = failure("key", "revoke", "nobody", "--device", "jetson-01")
    assert (error["code"], error["message"]) == (
        "NOT_FOUND",
        "no key 'nobody' on this device; known: none",
    )


@pytest.mark.parametrize(
    "key",
    [
        trust_pb2.Key(),
        trust_pb2.Key(name="a", public_pem="hello"),
        trust_pb2.Key(name="a/../b", public_pem=Signer.make().public.pem),
        trust_pb2.Key(name="a", public_pem="x" * 100_000),
        trust_pb2.Key(name="a", public_pem=Signer.make().private.to_pem(None).decode()),
        trust_pb2.Key(name="a", public_pem=Signer.make().public.pem, not_after=Timestamp(seconds=2**60)),
        trust_pb2.Key(
            name="a",
            public_pem=Signer.make().public.pem,
            not_before=Timestamp(seconds=NOW_S),
            not_after=Timestamp(seconds=NOW_S),
        ),
    ],
)
def test_a_key_that_is_none_is_an_invalid_argument_and_nothing_is_kept(device, key):
    with grpc.insecure_channel(device.target) as channel:
        stub = trust_pb2_grpc.TrustServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.TrustKey(trust_pb2.TrustKeyRequest(key=key), timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "PRIVATE KEY" not in refused.value.details()
    assert keys() == []


def test_what_a_caller_says_about_revocation_and_origin_is_the_device_s_to_say(device):
    key = trust_pb2.Key(
        name="a",
        public_pem=Signer.make().public.pem,
        key_id="00",
        provisioned=True,
        revoked_at=Timestamp(seconds=NOW_S),
    )
    with grpc.insecure_channel(device.target) as channel:
        stub = trust_pb2_grpc.TrustServiceStub(channel)
        trusted = stub.TrustKey(trust_pb2.TrustKeyRequest(key=key), timeout=10).key
    assert not trusted.provisioned
    assert not trusted.HasField("revoked_at")
    assert len(trusted.key_id) == 64
