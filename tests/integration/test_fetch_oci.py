"""Fetching an engine from a real OCI registry: Debian's docker-registry."""

import base64
import contextlib
import json
import shutil
import ssl
import subprocess
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import trustme

from edgellm.bundle.manifest import MANIFEST_MEDIA_TYPE
from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.fetch import Fetcher, open_source
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import parse_source
from edgellm_agent.origin import Origin
from tests.support.desired_device import make_layout, make_manager
from tests.support.range_server import Answer, range_server
from tests.support.registry_server import need_registry, push_with_http, registry_server
from tests.support.tiny_bundle import WEIGHTS
from tests.support.token_service import ISSUER, SERVICE, TokenSigner

BY = Origin("desired", 1)
REPOSITORY = "fleet/tiny"


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return make_layout(tmp_path_factory.mktemp("layout") / "engine.bundle")


@pytest.fixture(scope="module")
def registry(tmp_path_factory, layout):
    need_registry()
    with registry_server(tmp_path_factory.mktemp("plain")) as running:
        with httpx.Client(base_url=running.url, trust_env=False) as client:
            push_with_http(client, REPOSITORY, *layout)
        yield running


@pytest.fixture
def manager(tmp_path):
    made = make_manager(tmp_path / "state")
    yield made
    made.registry.close()


async def fetch(manager, source, digest, *more_sources, attempts=1, **settings):
    options = DesiredSettings(sources=[source, *more_sources], **settings)
    async with open_source(options, parse_source(source)) as blobs:
        fetcher = Fetcher(manager, blobs, digest, BY, None)
        for _ in range(attempts - 1):
            with contextlib.suppress(SourceError):
                await fetcher.fetch()
        await fetcher.fetch()


def is_whole(manager, digest):
    return [engine.digest for engine in manager.engines()] == [digest]


async def test_an_engine_comes_from_a_registry(manager, registry, layout):
    bundle, digest = layout
    await fetch(manager, registry.source(REPOSITORY), digest)
    assert is_whole(manager, digest)
    assert manager.store.read(digest) == bundle.manifest(digest).to_json()


async def test_a_blob_goes_on_where_it_ends_on_the_device(manager, registry, layout):
    bundle, digest = layout
    manifest = bundle.manifest(digest)
    weights = max(manifest.layers, key=lambda layer: layer.size_bytes)
    manager.begin_push(manifest, bundle.config(manifest))
    ingest = manager.store.ingest(weights.descriptor, 0)
    ingest.write(WEIGHTS[:2_000_001])
    ingest.close()
    restarts = []
    original = type(ingest).restart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ingest), "restart", lambda self: (restarts.append(1), original(self)))
        await fetch(manager, registry.source(REPOSITORY), digest)
    assert is_whole(manager, digest)
    assert restarts == []


async def test_what_the_registry_does_not_have_may_come_later(manager, registry, layout, tmp_path):
    bundle, digest = layout
    with pytest.raises(SourceError, match="404") as error:
        await fetch(manager, registry.source("fleet/other"), digest)
    assert not error.value.permanent
    with httpx.Client(base_url=registry.url, trust_env=False) as client:
        push_with_http(client, "fleet/other", bundle, digest)
    await fetch(manager, registry.source("fleet/other"), digest)
    assert is_whole(manager, digest)


def copy_with_skopeo(bundle, target):
    """The index is written anew (`--preserve-digests` refuses ours), the engine's manifest byte for byte."""
    copy = ["skopeo", "copy", "--all", "--dest-tls-verify=false", f"oci:{bundle.path}", f"docker://{target}"]
    copied = subprocess.run(copy, capture_output=True, text=True, timeout=60, check=False)
    assert copied.returncode == 0, copied.stderr


def manifest_at(url, repository, digest):
    with httpx.Client(base_url=url, trust_env=False) as client:
        return client.get(f"/v2/{repository}/manifests/{digest}", headers={"Accept": MANIFEST_MEDIA_TYPE})


async def test_skopeo_brings_an_engine_to_a_registry_unchanged(manager, registry, layout):
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo (apt-get install skopeo)")
    bundle, digest = layout
    copy_with_skopeo(bundle, f"{registry.authority}/fleet/by-skopeo:1")
    answer = manifest_at(registry.url, "fleet/by-skopeo", digest)
    assert answer.headers["Content-Type"] == MANIFEST_MEDIA_TYPE
    assert answer.content == bundle.manifest(digest).to_json()
    await fetch(manager, registry.source("fleet/by-skopeo"), digest)
    assert is_whole(manager, digest)


def credentials(path, authority):
    auth = base64.b64encode(b"device:secret").decode()
    path.write_text(json.dumps({"auths": {authority: {"auth": auth}}}))
    path.chmod(0o600)
    return path


class TokenService:
    """Gives tokens to who knows the password; what it was asked is kept."""

    def __init__(self, signer):
        self.signer = signer
        self.asked = []
        self.actions = ("pull",)

    def __call__(self, asked, _answer):
        query = parse_qs(urlsplit(asked.path).query)
        self.asked.append((query, asked.headers.get("authorization", "")))
        if asked.headers.get("authorization") != "Basic " + base64.b64encode(b"device:secret").decode():
            return Answer(401, {}, b"{}")
        token = self.signer.token(REPOSITORY, *self.actions)
        return Answer(200, {}, json.dumps({"token": token}).encode())


@pytest.fixture
def authority(tmp_path):
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


@pytest.fixture
def guarded(tmp_path, authority, layout):
    """A registry over TLS that wants tokens, and the service that gives them."""
    need_registry()
    signer = TokenSigner(tmp_path)
    service = TokenService(signer)
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issued.configure_cert(tls)
    with range_server(tmp_path, tls) as tokens:
        tokens.always = service
        auth = {
            "token": {
                "realm": f"{tokens.url}/token",
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(signer.bundle),
            }
        }
        files = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
        with registry_server(tmp_path / "guarded", http={"tls": files}, auth=auth) as running:
            bearer = {"Authorization": f"Bearer {signer.token(REPOSITORY, 'push', 'pull')}"}
            context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
            with httpx.Client(
                base_url=running.url, headers=bearer, verify=context, trust_env=False
            ) as client:
                push_with_http(client, REPOSITORY, *layout)
            yield running, service


async def test_a_registry_that_wants_a_token_gets_one(manager, guarded, layout, tmp_path):
    running, service = guarded
    file = credentials(tmp_path / "auth.json", running.authority)
    source = running.source(REPOSITORY)
    assert source.startswith("oci://")
    await fetch(manager, source, layout[1], ca_file=tmp_path / "ca.pem", credentials_file=file)
    assert is_whole(manager, layout[1])
    (query, _), *_ = service.asked
    assert query == {"service": [SERVICE], "scope": [f"repository:{REPOSITORY}:pull"]}
    assert len(service.asked) == 1


async def test_without_a_password_the_token_service_refuses_for_good(manager, guarded, layout, tmp_path):
    running, _ = guarded
    with pytest.raises(SourceError, match="token service refuses") as error:
        await fetch(manager, running.source(REPOSITORY), layout[1], ca_file=tmp_path / "ca.pem")
    assert error.value.permanent


async def test_a_token_that_does_not_suffice_fails_for_good(manager, guarded, layout, tmp_path):
    running, service = guarded
    service.actions = ("push",)
    file = credentials(tmp_path / "auth.json", running.authority)
    source = running.source(REPOSITORY)
    with pytest.raises(SourceError, match="401") as error:
        await fetch(manager, source, layout[1], ca_file=tmp_path / "ca.pem", credentials_file=file)
    assert error.value.permanent


async def test_a_password_is_not_carried_to_a_plain_token_service_that_is_not_listed(
    manager, layout, tmp_path
):
    bundle, digest = layout
    with range_server(bundle.path) as tokens, range_server(bundle.path) as front:
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}/token",service="s"'}
        front.always = lambda asked, answer: Answer(401, challenge, b"")
        tokens.always = lambda asked, answer: Answer(200, {}, b'{"token": "t"}')
        file = credentials(tmp_path / "auth.json", f"localhost:{front.port}")
        source = f"oci+http://localhost:{front.port}/{REPOSITORY}"
        with pytest.raises(SourceError, match="neither https nor allowed") as error:
            await fetch(manager, source, digest, credentials_file=file)
        assert error.value.permanent
        assert tokens.asked == []
        with pytest.raises(SourceError, match="401"):
            await fetch(manager, source, digest, f"{tokens.url}/token", credentials_file=file)
        assert tokens.asked[0].headers["authorization"].startswith("Basic ")
        assert front.asked[-1].headers["authorization"] == "Bearer t"


async def test_a_token_that_is_none_is_refused(manager, layout):
    bundle, digest = layout
    with range_server(bundle.path) as server:
        challenge = {"WWW-Authenticate": f'Bearer realm="{server.url}/token"'}

        def answer(asked, _answer):
            if asked.path.startswith("/token"):
                return Answer(200, {}, b'{"token": "two\\r\\nlines"}')
            return Answer(401, challenge, b"")

        server.always = answer
        source = f"oci+http://localhost:{server.port}/{REPOSITORY}"
        with pytest.raises(SourceError, match="gives no token"):
            await fetch(manager, source, digest, f"{server.url}/token")


async def test_blobs_in_another_place_are_fetched_there_without_the_token(
    manager, layout, tmp_path, authority
):
    """As from registries over object storage."""
    bundle, digest = layout
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(tls)
    with range_server(bundle.path, tls) as storage, range_server(bundle.path, tls) as front:

        def answer(asked, _answer):
            if asked.path.startswith("/token"):
                return Answer(200, {}, b'{"access_token": "abc"}')
            if asked.headers.get("authorization") != "Bearer abc":
                return Answer(401, {"WWW-Authenticate": f'Bearer realm="{front.url}/token"'}, b"")
            kind, name = asked.path.rsplit("/", 2)[1:]
            if kind == "manifests":
                return Answer(200, {}, bundle.manifest(name).to_json())
            return Answer(307, {"Location": f"{storage.url}/blobs/{name.replace(':', '/')}?signed=1"}, b"")

        front.always = answer
        source = f"oci://localhost:{front.port}/{REPOSITORY}"
        await fetch(manager, source, digest, ca_file=tmp_path / "ca.pem")
    assert is_whole(manager, digest)
    assert storage.asked
    assert not any("authorization" in request.headers for request in storage.asked)
