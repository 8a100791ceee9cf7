"""Who gets through to the agent's methods, how often, and what is written down of it: calls over TLS."""

import asyncio
import socket
import ssl

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from edgellm.v1 import device_pb2, engines_pb2
from edgellm_agent.access.caller import AGENT, Role
from edgellm_agent.access.rules import RULES
from edgellm_agent.errors import PreconditionError
from tests.support.access_pki import DAY, DeviceAuthority, now
from tests.support.guarded import METHODS, REACHED, call, guarded

ACTIVATE = "EngineService/Activate"
# Records are written in order: what came before this one is on disk.
_END = (AGENT, "end", "", "OK")
OURS = sorted(name for name in METHODS if not name.startswith("grpc."))


@pytest.fixture
def authority(tmp_path):
    return DeviceAuthority(tmp_path / "pki")


@pytest.fixture
async def served(short_dir, authority):
    """A server with TLS and a revocation list, and nothing behind its methods."""
    tls = authority.settings(authority.device(), authority.revoke())
    async with guarded(short_dir, tls) as served:
        yield served


def detail(error, kind):
    status = rpc_status.from_call(error)
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


async def until(probe):
    for _ in range(500):
        if value := probe():
            return value
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


class TestRoles:
    @pytest.mark.parametrize("role", list(Role))
    async def test_every_method_is_open_to_the_roles_of_its_rule_and_closed_before_its_code_to_all_others(
        self, served, authority, role
    ):
        async with served.channel(authority.client("alice", str(role))) as channel:
            ended = {name: await call(channel, name) for name in OURS}
        let_through = {name for name, error in ended.items() if error.details() == REACHED}
        assert let_through == {name for name in OURS if role >= RULES[name].role}
        refused = [error for name, error in ended.items() if name not in let_through]
        assert {error.code() for error in refused} <= {grpc.StatusCode.PERMISSION_DENIED}
        assert {name for name, _ in served.behind.reached} == {n.split("/")[1] for n in let_through}
        assert {str(caller) for _, caller in served.behind.reached} == {
            f"Caller(name='certificate alice', role={role!r})"
        }

    async def test_health_is_told_to_a_viewer(self, served, authority):
        async with served.channel(authority.client("alice", "viewer")) as channel:
            assert await call(channel, "grpc.health.v1.Health/Check") is None
            assert await call(channel, "grpc.health.v1.Health/Watch") is None

    async def test_what_the_server_can_do_is_told_to_a_viewer(self, served, authority):
        name = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        async with served.channel(authority.client("alice", "viewer")) as channel:
            assert await call(channel, name) is None

    async def test_a_refusal_says_what_it_takes_and_what_to_do(self, served, authority):
        async with served.channel(authority.client("alice", "app")) as channel:
            error = await call(channel, ACTIVATE)
        assert error.details() == f"certificate alice has the role app; {ACTIVATE} needs operator"
        assert "ask whoever runs the device" in detail(error, error_details_pb2.ErrorInfo).metadata["hint"]

    @pytest.mark.parametrize("path", ["/edgellm.v1.EngineService/Format", "/x", "/evil.Service/Method"])
    async def test_an_unknown_method_is_open_to_nobody(self, served, authority, path):
        async with served.channel(authority.client("alice", "admin")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(path)(b"", timeout=10)
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


class TestTls:
    async def connects(self, served, files):
        async with served.channel(files) as channel:
            return await call(channel, "DeviceService/GetInfo", timeout_s=20)

    async def test_a_client_without_a_certificate_gets_no_connection(self, served, authority):
        credentials = grpc.ssl_channel_credentials(authority.ca_file.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{served.port}", credentials) as channel:
            error = await call(channel, "DeviceService/GetInfo", timeout_s=20)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert served.behind.reached == []

    async def test_plain_text_gets_no_connection(self, served):
        async with grpc.aio.insecure_channel(f"localhost:{served.port}") as channel:
            error = await call(channel, "DeviceService/GetInfo", timeout_s=20)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert served.behind.reached == []

    @pytest.mark.parametrize(
        "times", [{"begins": now() - 9 * DAY, "expires": now() - DAY}, {"begins": now() + DAY / 2}]
    )
    async def test_a_certificate_that_is_not_valid_now_gets_no_connection(self, served, authority, times):
        error = await self.connects(served, authority.client("alice", "admin", **times))
        assert error.details() != REACHED
        assert error.code() is grpc.StatusCode.UNAVAILABLE

    async def test_a_certificate_of_another_authority_gets_no_connection(self, served, authority, tmp_path):
        foreign = DeviceAuthority(tmp_path / "foreign").client("alice", "admin")
        trusting = type(foreign)(authority.ca_file, foreign.cert_file, foreign.key_file, foreign.certificate)
        error = await self.connects(served, trusting)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert served.behind.reached == []

    async def test_a_certificate_without_a_role_is_told_so(self, served, authority):
        error = await self.connects(served, authority.client("alice"))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "edgellm pki issue" in detail(error, error_details_pb2.ErrorInfo).metadata["hint"]

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
    @pytest.mark.parametrize(("version", "taken"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
    async def test_tls_before_1_2_is_refused(self, served, authority, version, taken):
        context = authority.client("alice", "admin").context()
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]

        def connect():
            plain = socket.create_connection(("localhost", served.port), timeout=5)
            with plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
                return wrapped.version()

        if taken:
            assert await asyncio.to_thread(connect) == version.replace("_", ".")
        else:
            with pytest.raises(OSError, match=r"(?i)protocol|alert|version|reset|EOF"):
                await asyncio.to_thread(connect)

    async def test_a_revoked_certificate_is_refused_at_the_next_call_of_an_open_connection(
        self, served, authority
    ):
        alice = authority.client("alice", "admin")
        async with served.channel(alice) as channel:
            assert (await call(channel, ACTIVATE)).details() == REACHED
            authority.revoke(alice)
            error = await call(channel, ACTIVATE)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details() == "certificate alice has been revoked"
        assert (await self.connects(served, alice)).code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_a_renewed_certificate_is_shown_without_a_restart_and_a_bad_one_is_not(
        self, short_dir, authority
    ):
        device, new = authority.device(), authority.device()
        alice = authority.client("alice", "viewer")
        context = alice.context()

        def shown(port):
            plain = socket.create_connection(("localhost", port), timeout=5)
            with plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
                return wrapped.getpeercert(binary_form=True)

        def der(files):
            return ssl.PEM_cert_to_DER_cert(files.cert_file.read_text())

        old = der(device)
        async with guarded(short_dir, authority.settings(device)) as served:
            assert await asyncio.to_thread(shown, served.port) == old
            new.cert_file.replace(device.cert_file)
            # The key has not been written yet: the old pair goes on.
            assert await asyncio.to_thread(shown, served.port) == old
            new.key_file.replace(device.key_file)
            assert await asyncio.to_thread(shown, served.port) == der(device) != old
            assert (await self.connects(served, alice)).details() == REACHED

    async def test_a_port_without_tls_does_not_start(self, short_dir):
        async with guarded(short_dir) as served:
            with pytest.raises(PreconditionError, match=r"\[tls\]"):
                await served.server.start(short_dir / "b.sock", "127.0.0.1:1")

    async def test_a_port_that_is_taken_is_told(self, short_dir, authority):
        tls = authority.settings(authority.device())
        taken = socket.create_server(("127.0.0.1", 0), reuse_port=True)
        with taken, pytest.raises(PreconditionError, match="cannot listen on"):
            async with guarded(short_dir, tls, port=taken.getsockname()[1]):
                pass
        assert sorted(path.name for path in short_dir.iterdir()) == ["audit"]


class TestLimits:
    async def test_a_caller_with_too_many_calls_is_told_when_to_come_again(self, short_dir, authority):
        tls = authority.settings(authority.device())
        async with guarded(short_dir, tls, max_calls=2) as served:
            served.behind.hold = asyncio.Event()
            alice = authority.client("alice", "viewer")
            async with served.channel(alice) as one, served.channel(alice) as two:
                held = [asyncio.create_task(call(one, "DeviceService/GetInfo")) for _ in range(2)]
                await until(lambda: len(served.behind.reached) == 2)
                # Another connection does not help.
                error = await call(two, "DeviceService/GetInfo")
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert detail(error, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
                async with served.channel(authority.client("bob", "viewer")) as other:
                    free = asyncio.create_task(call(other, "DeviceService/GetInfo"))
                    await until(lambda: len(served.behind.reached) == 3)
                    served.behind.hold.set()
                    assert {(await task).details() for task in (*held, free)} == {REACHED}

    async def test_calls_whose_client_went_away_no_longer_count(self, short_dir):
        async with guarded(short_dir, max_calls=1) as served:
            served.behind.hold = asyncio.Event()
            async with served.channel() as channel:
                gone = asyncio.create_task(call(channel, "DeviceService/GetInfo"))
                await until(lambda: len(served.behind.reached) == 1)
                gone.cancel()
            served.behind.hold.set()
            async with served.channel() as channel:

                async def let_in():
                    return (await call(channel, "DeviceService/GetInfo")).details() == REACHED

                for _ in range(100):
                    if await let_in():
                        return
                    await asyncio.sleep(0.01)
                raise AssertionError("it is still counted")


class TestAudit:
    async def test_changes_and_refusals_are_written_down_and_looks_are_not(self, served, authority):
        admin, app = authority.client("alice", "admin"), authority.client("nav", "app")
        async with served.channel(admin) as one, served.channel(app) as two:
            await call(one, "DeviceService/GetInfo")
            await call(one, ACTIVATE, engines_pb2.ActivateRequest(engine="tiny"))
            await call(two, ACTIVATE, engines_pb2.ActivateRequest(engine="evil"))
            await call(one, "DeviceService/ReadAudit", device_pb2.ReadAuditRequest())
        await served.audit.note(*_END)
        assert (await served.records())[:-1] == [
            ("certificate alice", "admin", ACTIVATE, "tiny", "UNAVAILABLE"),
            ("certificate nav", "app", ACTIVATE, "", "PERMISSION_DENIED"),
            ("certificate alice", "admin", "DeviceService/ReadAudit", "", "UNAVAILABLE"),
        ]

    async def test_a_stranger_is_written_down_by_its_address(self, served, authority):
        async with served.channel(authority.client("alice")) as channel:
            await call(channel, ACTIVATE)
        await served.audit.note(*_END)
        (caller, role, method, _, outcome), _ = await served.records()
        assert caller.startswith(("ipv4:127.0.0.1:", "ipv6:"))
        assert (role, method, outcome) == ("", ACTIVATE, "UNAUTHENTICATED")

    async def test_a_call_that_its_client_cancelled_is_written_down_too(self, short_dir):
        async with guarded(short_dir) as served:
            served.behind.hold = asyncio.Event()
            async with served.channel() as channel:
                gone = asyncio.create_task(call(channel, "EngineService/Rollback"))
                await until(lambda: served.behind.reached)
                gone.cancel()
                for _ in range(500):
                    if found := await served.records():
                        break
                    await asyncio.sleep(0.01)
        ((_, _, method, _, outcome),) = found
        assert (method, outcome) == ("EngineService/Rollback", "CANCELLED")
