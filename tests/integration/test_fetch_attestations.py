"""What is attached to an engine comes with it: from a registry, from a server of files."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest

from edgellm.bundle import digest as digests
from edgellm.bundle.attach import attach
from edgellm.bundle.manifest import INDEX_MEDIA_TYPE, MANIFEST_MEDIA_TYPE, Descriptor, canonical_json
from edgellm.bundle.referrers import EMPTY, Referrer
from edgellm.signing import Envelope, Statement
from edgellm.signing.statements import PROVENANCE_TYPE
from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.fetch import Fetcher, open_source
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import parse_source
from edgellm_agent.origin import Origin
from edgellm_agent.trust.policy import DeviceTrust
from edgellm_agent.trust.settings import TrustSettings
from tests.support.desired_device import StillManager, make_layout, make_manager
from tests.support.range_server import Answer, range_server
from tests.support.registry_server import need_registry, push_with_http, registry_server
from tests.support.signing import NOW_S, Signer

REPOSITORY = "fleet/tiny"
SIGNER = Signer.make()


@pytest.fixture
def layout(tmp_path):
    """A signed engine, and what is attached to it."""
    bundle, digest = make_layout(tmp_path / "engine.bundle")
    attached = [SIGNER.release(digest), Envelope(b"{}").to_json()]
    return attach(bundle, digest, attached), digest, attached


async def attestations(source, digest):
    async with open_source(DesiredSettings(sources=[source]), parse_source(source)) as blobs:
        return [envelope async for envelope in blobs.attestations(digest)]


class Recording(StillManager):
    """Keeps what it was told is attached."""

    def prepare(self, manifest, config, *, attestations=(), **more):
        self.prepared = list(attestations)
        return super().prepare(manifest, config, **more)

    def begin_push(self, manifest, config, *, attestations=(), **more):
        self.begun = list(attestations)
        super().begin_push(manifest, config, **more)


async def test_what_is_attached_is_judged_and_kept_with_the_engine(layout, tmp_path):
    bundle, digest, attached = layout
    manager = make_manager(tmp_path / "state", Recording)
    with range_server(bundle.path) as server:
        settings = DesiredSettings(sources=[server.url])
        async with open_source(settings, parse_source(server.url)) as blobs:
            await Fetcher(manager, blobs, digest, Origin("desired", 1), None).fetch()
    assert manager.prepared == manager.begun == attached
    manager.registry.close()


async def test_a_server_of_files_has_it_in_the_bundle_s_index(layout):
    bundle, digest, attached = layout
    with range_server(bundle.path) as server:
        assert await attestations(server.url, digest) == attached
        assert await attestations(server.url, "sha256:" + "00" * 32) == []


async def test_a_server_of_blobs_without_an_index_has_none(layout):
    bundle, digest, _ = layout
    (bundle.path / "index.json").unlink()
    with range_server(bundle.path) as server:
        assert await attestations(server.url, digest) == []


@pytest.mark.parametrize("status", [400, 403, 404, 405])
async def test_a_source_that_has_no_list_has_no_attestations(layout, status):
    bundle, digest, _ = layout
    with range_server(bundle.path) as server:
        server.always = lambda asked, answer: Answer(status, {}, b"no")
        assert await attestations(server.url, digest) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_source_that_fails_for_now_is_asked_again_later(layout, status):
    """Else a device would refuse a signed engine as unsigned, because a server was busy."""
    bundle, digest, _ = layout
    with range_server(bundle.path) as server:
        server.always = lambda asked, answer: Answer(status, {}, b"busy")
        with pytest.raises(SourceError, match=str(status)) as error:
            await attestations(server.url, digest)
        assert not error.value.permanent


def replaced(name, body):
    """A wrong turn: other bytes for one blob."""
    return lambda asked, answer: Answer(200, {}, body) if asked.path.endswith(name) else answer


@pytest.mark.parametrize("what", ["list", "manifest", "envelope"])
@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b"[" * 9999, b" " * (5 << 20)])
async def test_what_does_not_have_its_digest_is_passed_over(layout, what, body):
    bundle, digest, attached = layout
    first, _ = bundle.referrers(digest)
    (entry,) = json.loads((bundle.path / "index.json").read_bytes())["manifests"]
    name = {"list": entry["digest"], "manifest": first.descriptor.digest, "envelope": first.envelope.digest}
    with range_server(bundle.path) as server:
        server.always = replaced(name[what].removeprefix("sha256:"), body)
        assert await attestations(server.url, digest) == ([] if what == "list" else attached[1:])


@pytest.mark.parametrize(
    "body", [b"", b"7", b'{"manifests":7}', b'{"manifests":[7]}', b"\xff", b"[" * 9999, b" " * (5 << 20)]
)
async def test_a_malformed_index_has_no_attestations(layout, body):
    bundle, digest, _ = layout
    with range_server(bundle.path) as server:
        server.always = replaced("/index.json", body)
        assert await attestations(server.url, digest) == []


async def test_a_list_of_itself_is_not_followed_for_ever(layout):
    bundle, digest, _ = layout
    nested = {"mediaType": INDEX_MEDIA_TYPE, "size": 9}
    many = [{**nested, "digest": f"sha256:{number:064x}"} for number in range(500)]
    with range_server(bundle.path) as server:
        server.always = replaced("/index.json", canonical_json({"manifests": many}))
        assert await attestations(server.url, digest) == []
        assert len(server.asked) == 5


def pile_up(bundle, digest, envelopes):
    """As in a registry, which keeps what was attached to each build of an engine."""
    subject = Descriptor(MANIFEST_MEDIA_TYPE, digest, len(bundle.manifest(digest).raw))
    index = json.loads((bundle.path / "index.json").read_bytes())
    for envelope in envelopes:
        referrer = Referrer.build(subject, envelope)
        for data in (envelope, referrer.raw):
            (bundle.path / "blobs/sha256" / digests.hex_of(digests.of_bytes(data))).write_bytes(data)
        index["manifests"].append(referrer.index_entry())
    (bundle.path / "index.json").write_bytes(canonical_json(index))


def note(digest, number):
    return Envelope(Statement("tiny-int4", digest, PROVENANCE_TYPE, {"build": number}).to_json()).to_json()


async def test_of_a_very_long_list_the_end_is_read(layout):
    bundle, digest, _ = layout
    notes = [note(digest, number) for number in range(300)]
    pile_up(bundle, digest, notes)
    with range_server(bundle.path) as server:
        # In the order of the index, which names the list of the bundle's own first.
        assert await attestations(server.url, digest) == [*notes[-254:], *layout[2]]


@pytest.mark.parametrize("place", ["first", "last"])
async def test_a_device_finds_the_release_among_the_notes_of_many_builds(tmp_path, place):
    bundle, digest = make_layout(tmp_path / "engine.bundle")
    notes = [note(digest, number) for number in range(40)]
    releases = [SIGNER.release(digest, release=number) for number in range(1, 41)]
    pile_up(bundle, digest, [*releases, *notes] if place == "first" else [*notes, *releases])
    manager = make_manager(tmp_path / "state")
    manager.trust = trust = DeviceTrust(
        TrustSettings(), tmp_path / "state", "orin-nano-8gb", wall_s=lambda: NOW_S, monotonic_s=lambda: 0.0
    )
    trust.trust(SIGNER.public)
    with range_server(bundle.path) as server:
        settings = DesiredSettings(sources=[server.url])
        async with open_source(settings, parse_source(server.url)) as blobs:
            await Fetcher(manager, blobs, digest, Origin("desired", 1), None).fetch()
    assert set(manager.registry.attestations(digest)) == {notes[-1], releases[-1]}
    (stored,) = manager.engines()
    assert manager.standing(stored).endorsement.release == 40
    await trust.close()
    manager.registry.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    need_registry()
    with registry_server(tmp_path_factory.mktemp("registry")) as running:
        yield running


def put_manifest(client, repository, reference, data, media_type):
    put = client.put(
        f"/v2/{repository}/manifests/{reference}", content=data, headers={"Content-Type": media_type}
    )
    put.raise_for_status()


def push_attestations(client, repository, bundle, digest):
    """As the distribution specification says for a registry without the referrers API."""
    referrers = bundle.referrers(digest)
    for data in (EMPTY, *bundle.attestations(digest)):
        begun = client.post(f"/v2/{repository}/blobs/uploads/").raise_for_status()
        where = httpx.URL(begun.headers["Location"])
        client.put(
            where, params={**where.params, "digest": digests.of_bytes(data)}, content=data
        ).raise_for_status()
    for item in referrers:
        put_manifest(client, repository, item.descriptor.digest, item.raw, MANIFEST_MEDIA_TYPE)
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_MEDIA_TYPE,
        "manifests": [item.index_entry() for item in referrers],
    }
    tag = digest.replace(":", "-")
    put_manifest(client, repository, tag, canonical_json(index), INDEX_MEDIA_TYPE)


def has_referrers_api(client, repository, digest):
    return client.get(f"/v2/{repository}/referrers/{digest}").status_code != 404


def copy_with_skopeo(bundle, target):
    copy = ["skopeo", "copy", "--all", "--dest-tls-verify=false", f"oci:{bundle.path}", f"docker://{target}"]
    copied = subprocess.run(copy, capture_output=True, text=True, timeout=60, check=False)
    assert copied.returncode == 0, copied.stderr


async def test_a_registry_without_the_api_has_it_under_the_fallback_tag(layout, registry):
    bundle, digest, attached = layout
    with httpx.Client(base_url=registry.url, trust_env=False) as client:
        push_with_http(client, REPOSITORY, bundle, digest)
        assert await attestations(registry.source(REPOSITORY), digest) == []
        push_attestations(client, REPOSITORY, bundle, digest)
        # The test would say nothing about the tag if this registry had the API.
        assert not has_referrers_api(client, REPOSITORY, digest)
    assert await attestations(registry.source(REPOSITORY), digest) == attached


async def test_a_bundle_that_skopeo_copied_to_the_fallback_tag_brings_its_attestations(layout, registry):
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo (apt-get install skopeo)")
    bundle, digest, attached = layout
    for tag in ("1", digest.replace(":", "-")):
        copy_with_skopeo(bundle, f"{registry.authority}/fleet/skopeo:{tag}")
    assert sorted(await attestations(registry.source("fleet/skopeo"), digest)) == sorted(attached)


async def test_a_registry_with_the_api_is_asked_for_attestations_only(layout):
    bundle, digest, attached = layout
    index = canonical_json({"manifests": [item.index_entry() for item in bundle.referrers(digest)]})
    raw = {item.descriptor.digest: item.raw for item in bundle.referrers(digest)}

    def answer(asked, _answer):
        kind, name = asked.path.partition("?")[0].rsplit("/", 2)[1:]
        match kind:
            case "referrers":
                return Answer(200, {}, index)
            case "manifests" if name in raw:
                return Answer(200, {}, raw[name])
            case "blobs":
                return Answer(200, {}, bundle.blob_path(name).read_bytes())
        return Answer(404, {}, b"")

    with range_server(bundle.path) as server:
        server.always = answer
        assert await attestations(f"oci+http://localhost:{server.port}/{REPOSITORY}", digest) == attached
        assert server.asked[0].path == (
            f"/v2/{REPOSITORY}/referrers/{digest}?artifactType=application%2Fvnd.dsse.envelope.v1%2Bjson"
        )
        assert not any(asked.path.endswith(digest.replace(":", "-")) for asked in server.asked)
