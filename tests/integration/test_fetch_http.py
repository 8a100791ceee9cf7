"""Fetching an engine over HTTP(S) from a server that cuts, lies and stalls."""

import asyncio
import contextlib
import dataclasses
import ssl
import sys

import pytest
import trustme

from edgellm.bundle.manifest import EngineManifest
from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.fetch import Fetcher, open_source
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import parse_source
from edgellm_agent.errors import PreconditionError, TooLargeError
from edgellm_agent.origin import Origin
from tests.support.desired_device import make_layout, make_manager
from tests.support.range_server import Answer, range_server
from tests.support.small_disk import let_free
from tests.support.tiny_bundle import WEIGHTS

BY = Origin("desired", 1)
# What a fetch holds before it writes, a read of the network more.
WINDOW_BYTES = (256 + 64) << 10


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return make_layout(tmp_path_factory.mktemp("layout") / "engine.bundle")


@pytest.fixture
def server(layout):
    with range_server(layout[0].path) as running:
        yield running


@pytest.fixture
def manager(tmp_path):
    made = make_manager(tmp_path / "state")
    yield made
    made.registry.close()


def weights_of(bundle, digest):
    return max(bundle.manifest(digest).layers, key=lambda layer: layer.size_bytes)


def path_of(digest):
    return f"/blobs/{digest.replace(':', '/')}"


def only(path, turn):
    """The turn for one path; other requests go well."""
    return lambda asked, answer: turn(asked, answer) if asked.path == path else answer


async def fetch(manager, server, digest, attempts=1, **settings):
    """Tries so often on one connection; raises what the last attempt raises."""
    options = DesiredSettings(**{"sources": [f"{server.url}/"], "stall_s": 5, **settings})
    async with open_source(options, parse_source(server.url)) as source:
        fetcher = Fetcher(manager, source, digest, BY, options.max_bytes_per_s)
        for _ in range(attempts - 1):
            with contextlib.suppress(SourceError):
                await fetcher.fetch()
        await fetcher.fetch()
        return fetcher


def is_whole(manager, digest):
    return [engine.digest for engine in manager.engines()] == [digest]


async def test_an_engine_comes_whole_and_is_registered(manager, server, layout):
    bundle, digest = layout
    fetcher = await fetch(manager, server, digest)
    assert is_whole(manager, digest)
    assert fetcher.progress() == (bundle.manifest(digest).size_bytes,) * 2
    manager.store.verify(bundle.manifest(digest))


async def test_what_the_device_has_is_not_fetched_again(manager, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    manager.begin_push(bundle.manifest(digest), bundle.config(bundle.manifest(digest)))
    ingest = manager.store.ingest(weights.descriptor, 0)
    ingest.write(WEIGHTS)
    ingest.commit()
    ingest.close()
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)
    assert path_of(weights.digest) not in server.sent
    assert path_of(digest) not in server.sent


async def test_a_connection_that_is_cut_is_gone_on_from_where_it_was_cut(manager, server, layout):
    bundle, digest = layout
    path = path_of(weights_of(bundle, digest).digest)
    cuts = iter([1_000_000, 700_000])

    def cut(asked, answer):
        end = next(cuts, None)
        return answer if end is None else dataclasses.replace(answer, cut_after=end)

    server.always = only(path, cut)
    await fetch(manager, server, digest, attempts=3)
    assert is_whole(manager, digest)
    asked = [request for request in server.asked if request.path == path]
    assert [request.offset > 0 for request in asked] == [False, True, True]
    assert asked[1].headers["if-range"].startswith('"')
    assert asked[1].offset < asked[2].offset
    assert server.sent[path] <= len(WEIGHTS) + 2 * WINDOW_BYTES


async def test_a_server_without_ranges_is_begun_again_with(manager, server, layout):
    bundle, digest = layout
    path = path_of(weights_of(bundle, digest).digest)
    server.ranges = False
    server.always = only(
        path,
        lambda asked, answer: dataclasses.replace(answer, cut_after=None if path in server.sent else 1 << 20),
    )
    await fetch(manager, server, digest, attempts=2)
    assert is_whole(manager, digest)


SIZE = len(WEIGHTS)
LIES = {
    "another beginning": lambda offset: f"bytes {offset + 1}-{SIZE - 1}/{SIZE}",
    "another end": lambda offset: f"bytes {offset}-{SIZE - 2}/{SIZE}",
    "another whole": lambda offset: f"bytes {offset}-{SIZE - 1}/{SIZE + 1}",
    "another unit": lambda offset: f"lines {offset}-{SIZE - 1}/{SIZE}",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_server_that_lies_about_its_range_is_begun_again_with(manager, server, layout, lie):
    bundle, digest = layout
    leave_partial(manager, bundle, digest, WEIGHTS[:1000])
    path = path_of(weights_of(bundle, digest).digest)

    def lies(asked, answer):
        if not asked.offset:
            return answer
        return dataclasses.replace(answer, headers={"Content-Range": lie(asked.offset)})

    server.always = only(path, lies)
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)
    assert [request.offset for request in server.asked if request.path == path] == [1000, 0]


async def test_416_for_a_blob_of_the_right_size_begins_again(manager, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    leave_partial(manager, bundle, digest, WEIGHTS[:1000])
    whole = {"Content-Range": f"bytes */{weights.size_bytes}"}
    server.always = lambda asked, answer: Answer(416, whole, b"") if asked.offset else answer
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)


async def test_a_source_with_a_blob_of_another_size_fails_for_good(manager, server, layout):
    bundle, digest = layout
    leave_partial(manager, bundle, digest, WEIGHTS[:1000])
    path = path_of(weights_of(bundle, digest).digest)
    server.always = only(
        path,
        lambda asked, answer: (
            Answer(416, {"Content-Range": "bytes */5"}, b"") if asked.offset else Answer(200, {}, b"short")
        ),
    )
    with pytest.raises(SourceError, match="5 bytes, the manifest says") as error:
        await fetch(manager, server, digest)
    assert error.value.permanent
    assert manager.engines() == []


def leave_partial(manager, bundle, digest, data):
    """What an earlier attempt left of the weights."""
    manifest = bundle.manifest(digest)
    manager.begin_push(manifest, bundle.config(manifest))
    ingest = manager.store.ingest(weights_of(bundle, digest).descriptor, 0)
    ingest.write(data)
    ingest.close()


async def test_wrong_bytes_of_an_earlier_attempt_are_dropped_and_fetched_again(manager, server, layout):
    bundle, digest = layout
    leave_partial(manager, bundle, digest, b"\0" * 500_000)
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)


def flipped(asked, answer):
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    return dataclasses.replace(answer, body=bytes(body))


async def test_wrong_bytes_once_are_fetched_again(manager, server, layout):
    bundle, digest = layout
    path = path_of(weights_of(bundle, digest).digest)
    times = iter([flipped])

    def wrong_once(asked, answer):
        turn = next(times, None)
        return answer if turn is None else turn(asked, answer)

    server.always = only(path, wrong_once)
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)


async def test_wrong_bytes_twice_fail_for_good_and_leave_nothing_of_them(manager, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    server.always = only(path_of(weights.digest), flipped)
    with pytest.raises(SourceError, match=weights.digest) as error:
        await fetch(manager, server, digest)
    assert error.value.permanent
    assert manager.store.status(weights.digest) == 0
    assert not manager.store.has(weights.digest)
    assert manager.engines() == []


async def test_a_manifest_with_another_digest_is_not_believed(manager, server, layout):
    _, digest = layout
    server.always = only(path_of(digest), flipped)
    with pytest.raises(SourceError, match="manifest does not have the digest") as error:
        await fetch(manager, server, digest)
    assert error.value.permanent
    assert manager.registry.engines() == []


async def test_a_manifest_that_does_not_end_is_not_read_to_its_end(manager, server, layout):
    _, digest = layout
    server.always = only(path_of(digest), lambda asked, answer: Answer(200, {}, b"x" * (6 << 20)))
    with pytest.raises(SourceError, match="more than"):
        await fetch(manager, server, digest)


async def test_a_config_that_is_longer_than_it_says_is_not_read_to_its_end(manager, server, layout):
    bundle, digest = layout
    config = bundle.manifest(digest).config
    endless = {"Content-Length": str(4 << 20)}
    server.always = only(path_of(config.digest), lambda asked, answer: Answer(200, endless, b"x" * (4 << 20)))
    with pytest.raises(SourceError, match="engine config does not have the digest") as error:
        await fetch(manager, server, digest)
    assert error.value.permanent


@pytest.mark.parametrize("status", [500, 502, 503, 429, 404])
async def test_what_may_pass_is_not_for_good(manager, server, layout, status):
    _, digest = layout
    server.turns = [lambda asked, answer: Answer(status, {"Retry-After": "7"}, b"no")]
    with pytest.raises(SourceError, match=str(status)) as error:
        await fetch(manager, server, digest)
    assert not error.value.permanent
    assert error.value.retry_after_s == (0 if status == 404 else 7)
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_source_that_refuses_the_device_fails_for_good(manager, server, layout, status):
    _, digest = layout
    server.always = lambda asked, answer: Answer(status, {}, b"no")
    with pytest.raises(SourceError, match="credentials_file") as error:
        await fetch(manager, server, digest)
    assert error.value.permanent


async def test_a_source_that_nobody_answers_at_may_come_back(manager, layout, server):
    _, digest = layout
    with range_server(server.root) as gone:
        pass
    with pytest.raises(SourceError, match="ConnectError") as error:
        await fetch(manager, gone, digest)
    assert not error.value.permanent


async def test_a_transfer_that_stalls_is_cut_and_what_came_is_kept(manager, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    server.always = only(
        path_of(weights.digest), lambda asked, answer: dataclasses.replace(answer, stall_after=1 << 20)
    )
    with pytest.raises(SourceError, match=r"nothing came for 0\.3 s"):
        await fetch(manager, server, digest, stall_s=0.3)
    server.always = None
    server.released.set()
    assert manager.store.status(weights.digest) >= (1 << 20) - WINDOW_BYTES
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)


async def test_a_source_that_sends_a_byte_now_and_then_is_as_good_as_silent(manager, server, layout):
    bundle, digest = layout
    path = path_of(weights_of(bundle, digest).digest)
    server.always = only(path, lambda asked, answer: dataclasses.replace(answer, trickle=True))
    with pytest.raises(SourceError, match=r"only \d+ bytes came in 0\.3 s"):
        await fetch(manager, server, digest, stall_s=0.3)


async def test_a_compressed_answer_is_not_taken(manager, server, layout):
    _, digest = layout
    server.always = lambda asked, answer: dataclasses.replace(answer, headers={"Content-Encoding": "gzip"})
    with pytest.raises(SourceError, match="gzip"):
        await fetch(manager, server, digest)
    assert server.asked[0].headers["accept-encoding"] == "identity"


async def test_a_redirect_to_another_plain_server_is_not_followed(manager, server, layout):
    _, digest = layout
    with range_server(server.root) as other:
        server.always = lambda asked, answer: Answer(302, {"Location": other.url + asked.path}, b"")
        with pytest.raises(SourceError, match="not https") as error:
            await fetch(manager, server, digest)
    assert error.value.permanent
    assert other.asked == []


async def test_redirects_end(manager, server, layout):
    _, digest = layout
    server.always = lambda asked, answer: Answer(302, {"Location": asked.path + "x"}, b"")
    with pytest.raises(SourceError, match="5 redirects"):
        await fetch(manager, server, digest)
    assert len(server.asked) == 6


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def certificate(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority, tmp_path):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


async def test_over_tls_the_server_must_be_who_the_authorities_say(manager, layout, certificate, ca_file):
    bundle, digest = layout
    with range_server(bundle.path, certificate) as server:
        with pytest.raises(SourceError, match="certificate verify failed"):
            await fetch(manager, server, digest)
        await fetch(manager, server, digest, ca_file=ca_file)
    assert is_whole(manager, digest)


async def test_a_redirect_never_leads_from_tls_to_a_plain_server(
    manager, layout, certificate, ca_file, server
):
    bundle, digest = layout
    with range_server(bundle.path, certificate) as safe:
        safe.always = lambda asked, answer: Answer(307, {"Location": server.url + asked.path}, b"")
        with pytest.raises(SourceError, match="not https"):
            await fetch(manager, safe, digest, ca_file=ca_file)
    assert server.asked == []


async def test_a_password_stays_with_its_server(manager, layout, certificate, ca_file, tmp_path):
    bundle, digest = layout
    with range_server(bundle.path, certificate) as store, range_server(bundle.path, certificate) as front:

        def ask_then_send_on(asked, answer):
            if "authorization" not in asked.headers:
                return Answer(401, {"WWW-Authenticate": 'Basic realm="engines"'}, b"")
            return Answer(307, {"Location": store.url + asked.path}, b"")

        front.always = ask_then_send_on
        credentials = tmp_path / "auth.json"
        credentials.write_text(
            f'{{"auths": {{"localhost:{front.port}": {{"auth": "ZGV2aWNlOnNlY3JldA=="}}}}}}'
        )
        credentials.chmod(0o600)
        await fetch(manager, front, digest, ca_file=ca_file, credentials_file=credentials)
        assert is_whole(manager, digest)
        assert {request.headers.get("authorization") for request in store.asked} == {None}
        # Where it was sent on to may not ask for it either.
        realm = {"WWW-Authenticate": f'Bearer realm="{store.url}/token"'}
        store.always = lambda asked, answer: Answer(401, realm, b"")
        other = make_manager(tmp_path / "other")
        with pytest.raises(SourceError, match="401"):
            await fetch(other, front, digest, ca_file=ca_file, credentials_file=credentials)
        other.registry.close()
        assert {request.headers.get("authorization") for request in store.asked} == {None}


async def test_credentials_that_others_can_read_are_not_used(manager, server, layout, tmp_path):
    _, digest = layout
    credentials = tmp_path / "auth.json"
    credentials.write_text('{"auths": {}}')
    credentials.chmod(0o644)
    server.always = lambda asked, answer: Answer(401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")
    with pytest.raises(SourceError, match="chmod 600"):
        await fetch(manager, server, digest, credentials_file=credentials)


async def test_an_engine_for_another_runtime_is_refused_before_a_blob_is_fetched(tmp_path, server, layout):
    bundle, digest = layout
    manager = make_manager(tmp_path / "state", tensorrt="10.3")
    with pytest.raises(PreconditionError, match="onnxruntime"):
        await fetch(manager, server, digest)
    manager.registry.close()
    assert manager.registry is not None
    manifest = bundle.manifest(digest)
    asked = {request.path for request in server.asked}
    assert asked >= {path_of(digest), path_of(manifest.config.digest)}
    assert not asked & {path_of(layer.digest) for layer in manifest.layers}
    assert list((tmp_path / "state").rglob("ingest/*")) == []


async def test_an_engine_that_does_not_fit_on_the_disk_is_refused_before_a_blob_is_fetched(
    manager, server, layout, monkeypatch
):
    bundle, digest = layout
    let_free(monkeypatch, lambda: 1 << 20)
    with pytest.raises(TooLargeError, match="are free on the device's disk"):
        await fetch(manager, server, digest)
    assert path_of(weights_of(bundle, digest).digest) not in server.sent


async def test_two_blobs_come_at_once_and_no_more(manager, server, layout):
    _, digest = layout
    under_way, most = 0, 0
    transfer = Fetcher._transfer

    async def counted(self, blob, **options):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await transfer(self, blob, **options)
        finally:
            under_way -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fetcher, "_transfer", counted)
        await fetch(manager, server, digest)
    assert most == 2


async def test_a_fetch_that_is_cancelled_leaves_what_came_to_the_next(manager, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    server.always = only(
        path_of(weights.digest), lambda asked, answer: dataclasses.replace(answer, stall_after=1 << 20)
    )
    task = asyncio.create_task(fetch(manager, server, digest))
    assert await asyncio.to_thread(server.stalled.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.always = None
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)
    assert server.sent[path_of(weights.digest)] <= len(WEIGHTS) + (1 << 20)


KILLED = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from tests.integration.test_fetch_http import fetch
from tests.support.desired_device import make_manager
asyncio.run(fetch(make_manager(Path(sys.argv[1])), SimpleNamespace(url=sys.argv[2]), sys.argv[3], stall_s=60))
"""


async def test_a_process_that_is_killed_in_a_fetch_loses_no_more_than_a_window(tmp_path, server, layout):
    bundle, digest = layout
    weights = weights_of(bundle, digest)
    path = path_of(weights.digest)
    server.always = only(path, lambda asked, answer: dataclasses.replace(answer, stall_after=2 << 20))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path / "state"), server.url, digest
    )
    partial = tmp_path / "state" / "ingest" / weights.digest.removeprefix("sha256:")
    assert await asyncio.to_thread(server.stalled.wait, 30)
    while not partial.exists() or partial.stat().st_size < (2 << 20) - WINDOW_BYTES:
        assert process.returncode is None
        await asyncio.sleep(0.01)
    process.kill()
    await process.wait()
    server.released.set()
    server.always = None
    manager = make_manager(tmp_path / "state")
    manager.library.forget_old_pushes()
    await fetch(manager, server, digest)
    assert is_whole(manager, digest)
    manager.registry.close()
    assert server.sent[path] <= len(WEIGHTS) + WINDOW_BYTES
    assert EngineManifest.parse(manager.store.read(digest)).digest == digest


async def test_a_bound_on_the_rate_is_kept(manager, server, layout, monkeypatch):
    _, digest = layout
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("edgellm_agent.desired.fetch.asyncio.sleep", sleep)
    await fetch(manager, server, digest, max_bytes_per_s=1 << 20)
    assert max(slept) == pytest.approx(3.0, abs=0.6)
