"""A whole agent with all its doors: the socket, TLS, HTTP, and the log of who came through them."""

import os
import subprocess
import sys

import grpc
import pytest

from edgellm.v1 import device_pb2, device_pb2_grpc, engines_pb2, engines_pb2_grpc
from tests.conftest import push
from tests.support.access_pki import DeviceAuthority
from tests.support.agents import running_agent
from tests.support.http import ask, free_port


@pytest.fixture
def authority(tmp_path):
    return DeviceAuthority(tmp_path / "pki")


def tls_settings(authority, port):
    device = authority.device()
    return (
        f'listen = "127.0.0.1:{port}"\n[tls]\nca_file = "{authority.ca_file}"\n'
        f'cert_file = "{device.cert_file}"\nkey_file = "{device.key_file}"\n'
    )


def records(channel, limit=0):
    stub = device_pb2_grpc.DeviceServiceStub(channel)
    return [answer.record for answer in stub.ReadAudit(device_pb2.ReadAuditRequest(limit=limit), timeout=10)]


def test_each_door_knows_its_callers(short_dir, authority):
    port = free_port()
    with running_agent(short_dir, tls_settings(authority, port)) as agent:
        alice = authority.client("alice", "operator").channel_credentials()
        with (
            grpc.secure_channel(f"localhost:{port}", alice) as far,
            grpc.insecure_channel(agent.target) as near,
        ):
            said = [
                device_pb2_grpc.DeviceServiceStub(channel).WhoAmI(device_pb2.WhoAmIRequest(), timeout=10)
                for channel in (far, near)
            ]
            with pytest.raises(grpc.RpcError) as error:
                records(far)
    assert (said[0].caller, said[0].role) == ("certificate alice", "operator")
    assert said[1].caller.startswith("uid ")
    assert said[1].role == "admin"
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_port_without_tls_is_refused_at_the_start_with_what_to_do(tmp_path):
    config = tmp_path / "agent.toml"
    begin = f'state_dir = "{tmp_path}/state"\nsocket = "{tmp_path}/a.sock"\n'
    config.write_text(begin + 'listen = "127.0.0.1:7077"\n')
    command = [sys.executable, "-m", "edgellm_agent", "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "[tls]" in done.stderr
    assert not (tmp_path / "state").exists()


def test_a_bad_certificate_file_is_told_before_anything_is_made(tmp_path, authority):
    config = tmp_path / "agent.toml"
    text = tls_settings(authority, 7077)
    authority.ca_file.write_text("no PEM")
    config.write_text(f'state_dir = "{tmp_path}/state"\nsocket = "{tmp_path}/a.sock"\n{text}')
    command = [sys.executable, "-m", "edgellm_agent", "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "tls ca_file" in done.stderr) == (1, True)
    assert not (tmp_path / "state").exists()


def test_a_push_leaves_its_lines_and_they_outlive_the_agent(short_dir, tiny):
    with running_agent(short_dir) as agent:
        digest = push(agent, tiny)
        agent.stop()
        agent.start()
        with grpc.insecure_channel(agent.target) as channel:
            engines = engines_pb2_grpc.EngineServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                engines.RemoveEngine(engines_pb2.RemoveEngineRequest(engine="none"), timeout=10)
            found = records(channel)
            last = records(channel, limit=1)
    assert [(r.method, r.subject, r.outcome) for r in found] == [
        ("EngineService/Prepare", digest, "OK"),
        ("EngineService/Commit", digest, "OK"),
        ("EngineService/Activate", digest, "OK"),
        ("EngineService/RemoveEngine", "none", "NOT_FOUND"),
    ]
    assert [r.sequence for r in found] == [1, 2, 3, 4]
    # Reading is written down, too, once it is over.
    assert [(r.method, r.sequence) for r in last] == [("DeviceService/ReadAudit", 5)]


def test_the_client_says_who_one_is_and_what_one_did(agent):
    with agent.client() as client:
        client.pin()
        told = client.whoami()
        (record,) = client.audit()
    assert (told.caller, told.role) == (f"uid {os.geteuid()}", "admin")
    assert (record.caller, record.role) == (told.caller, told.role)
    assert (record.method, record.subject, record.outcome) == ("EngineService/PinEngine", "pinned", "OK")


def test_whoever_reads_a_log_that_was_changed_is_told_so_after_what_there_is(agent):
    with grpc.insecure_channel(agent.target) as channel:
        engines = engines_pb2_grpc.EngineServiceStub(channel)
        for pinned in (True, False, True):
            engines.PinEngine(engines_pb2.PinEngineRequest(pinned=pinned), timeout=10)
        (file,) = (agent.state / "audit").glob("*.jsonl")
        file.write_text(file.read_text().replace("unpinned", "pinned"))
        answers = device_pb2_grpc.DeviceServiceStub(channel).ReadAudit(
            device_pb2.ReadAuditRequest(), timeout=10
        )
        assert [next(answers).record.subject for _ in range(3)] == ["pinned", "pinned", "pinned"]
        with pytest.raises(grpc.RpcError) as error:
            next(answers)
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
    assert "line 3 of" in error.value.details()


def test_http_asks_for_the_key_that_is_in_the_file_now(short_dir):
    key, port = short_dir / "key", free_port()
    key.write_text("first\n")
    key.chmod(0o600)
    with running_agent(short_dir, f'[http]\nlisten = "127.0.0.1:{port}"\napi_key_file = "{key}"'):
        assert ask(port, "/v1/models", authorization="Bearer first").status == 200
        key.write_text("the second\n")
        assert ask(port, "/v1/models", authorization="Bearer first").status == 401
        assert ask(port, "/v1/models", authorization="Bearer the second").status == 200
