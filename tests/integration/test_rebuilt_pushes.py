"""An engine built, signed and pushed again and again, with what strangers push between: no lock-out."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle.quality import QualityReport
from edgellm.bundle.referrers import MAX_ATTESTATIONS
from edgellm.signing import Envelope, Statement, times
from edgellm.signing.attesting import attest_release
from edgellm.signing.dsse import PAYLOAD_TYPE, Signature
from edgellm_agent.errors import UntrustedError
from edgellm_agent.trust.policy import DeviceTrust
from edgellm_agent.trust.settings import TrustSettings
from edgellm_buildhost import provenance
from edgellm_buildhost.quality.attestation import envelope as quality_envelope
from tests.support.desired_device import make_manager
from tests.support.quality_reports import GOOD
from tests.support.signing import DAY_S, NOW_S, Signer, release_envelope
from tests.support.tiny_bundle import make_config, make_files

PUSHES = 40
SIGNER = Signer.make()
OTHER = Signer.make("other")
FIRST_BUILD_S = NOW_S - 10 * DAY_S
SOURCES = provenance.Sources("tiny", {"model.safetensors": "sha256:" + "ab" * 32})


class BuildHost:
    """Builds the same engine to the same place each time; what it says about each build differs."""

    def __init__(self, root):
        self.root = root
        self.times_s = itertools.count(FIRST_BUILD_S)

    def build(self) -> Bundle:
        now_s, files = next(self.times_s), self.root / "files"
        with BundleWriter(self.root / "engine.bundle") as writer:
            digest = writer.add(make_files(files, b"weights"), make_config())
            writer.attest(digest, provenance.envelope("tiny-int4", digest, SOURCES, {}, now_s))
            report = QualityReport.checked({**GOOD, "seconds": now_s - FIRST_BUILD_S})
            writer.attest(digest, quality_envelope("tiny-int4", digest, report))
        shutil.rmtree(files)
        return Bundle.open(self.root / "engine.bundle")

    def signed(self, number: int) -> Bundle:
        built = self.build()
        key, issued_s = SIGNER.private, next(self.times_s)
        more = {"issued_s": issued_s, "expires_s": NOW_S + 90 * DAY_S}
        return attest_release(built, built.variants[0], key, number, **more)[0]


class Device:
    """A manager with its registry on disk, and real keys; `restart` keeps what is on disk."""

    def __init__(self, root):
        self.root = root
        self.start()

    def start(self):
        self.manager = make_manager(self.root)
        self.trust = DeviceTrust(
            TrustSettings(), self.root, "orin-nano-8gb", wall_s=lambda: NOW_S, monotonic_s=lambda: 0.0
        )
        self.manager.trust = self.trust

    async def close(self):
        await self.manager.close()
        await self.trust.close()

    async def restart(self):
        await self.close()
        self.start()

    def push(self, bundle, attestations=None):
        """As `services/push.py` does; the bundle's attestations, or others in their place."""
        (variant,) = bundle.variants
        said = bundle.attestations(variant.digest) if attestations is None else attestations
        self.manager.prepare(variant.manifest, variant.config, said)
        self.manager.begin_push(variant.manifest, variant.config, said)
        for blob, _ in self.manager.store.missing(variant.manifest.blobs()):
            self.manager.store.put(bundle.blob_path(blob.digest).read_bytes())
        return self.manager.commit_push(variant.digest)

    def held(self, bundle):
        return self.manager.registry.attestations(bundle.variants[0].digest)

    def endorsement(self):
        (stored,) = self.manager.engines()
        return self.manager.standing(stored).endorsement


@pytest.fixture
def host(tmp_path):
    return BuildHost(tmp_path)


@pytest.fixture
async def device(tmp_path):
    made = Device(tmp_path / "device")
    yield made
    await made.close()


@pytest.fixture
async def guarded(device):
    device.trust.trust(SIGNER.public)
    return device


def statement(digest, kind, text="x"):
    return Envelope(Statement("tiny-int4", digest, kind, {"text": text}).to_json())


def forged(envelope, key_id):
    """It claims a signature that is none."""
    return Envelope(envelope.payload, PAYLOAD_TYPE, (Signature(key_id, b"\0" * 64),)).to_json()


def test_building_to_the_same_place_leaves_the_last_notes_only(host):
    digests, said = set(), set()
    for _ in range(20):
        bundle = host.build()
        digests.add(bundle.variants[0].digest)
        said.add(bundle.attestations(bundle.variants[0].digest))
    assert len(digests) == 1
    assert {len(notes) for notes in said} == {2}
    assert len(said) == 20


def test_signing_a_bundle_again_and_again_leaves_what_the_key_said_last(host):
    bundle = host.build()
    for number in range(1, 21):
        bundle, _ = attest_release(
            bundle, bundle.variants[0], SIGNER.private, number, issued_s=NOW_S, expires_s=NOW_S + DAY_S
        )
    assert len(bundle.attestations(bundle.variants[0].digest)) == 3


async def test_an_engine_can_be_built_and_pushed_any_number_of_times(device, host):
    for _ in range(PUSHES):
        bundle = host.build()
        stored = device.push(bundle)
    assert set(device.held(bundle)) == set(bundle.attestations(stored.digest))
    await device.restart()
    await device.manager.activate(stored.digest)


async def test_an_engine_can_be_built_signed_and_pushed_any_number_of_times(guarded, host):
    for number in range(1, PUSHES + 1):
        bundle = host.signed(number)
        stored = guarded.push(bundle)
        assert set(guarded.held(bundle)) == set(bundle.attestations(stored.digest))
    await guarded.restart()
    await guarded.manager.activate(stored.digest)
    assert guarded.endorsement().release == PUSHES


async def test_signed_pushes_to_a_device_that_does_not_know_the_key_yet_count_once_it_does(device, host):
    for number in range(1, PUSHES + 1):
        device.push(host.signed(number))
    device.trust.trust(SIGNER.public)
    assert device.endorsement().release == PUSHES


async def test_unsigned_rebuilds_of_a_signed_engine_leave_its_signature(guarded, host):
    guarded.push(host.signed(7))
    for _ in range(PUSHES):
        guarded.push(host.build())
    assert guarded.endorsement().release == 7


JUNK = {
    "no envelope": lambda digest, n: b"junk %d" % n,
    "no statement": lambda digest, n: Envelope(b"%d" % n).to_json(),
    "unsigned releases": lambda digest, n: release_envelope(digest, release=1000 + n).to_json(),
    "unknown kinds": lambda digest, n: statement(digest, f"urn:junk:{n}").to_json(),
    "releases by a stranger": lambda digest, n: OTHER.release(digest, release=1000 + n),
    "releases of strangers": lambda digest, n: Signer.make().release(digest, release=1000 + n),
    "forged releases": lambda digest, n: forged(
        release_envelope(digest, release=1000 + n), SIGNER.public.key_id
    ),
    "forged kinds": lambda digest, n: forged(statement(digest, f"urn:junk:{n}"), SIGNER.public.key_id),
    "real releases of other engines": lambda digest, n: SIGNER.release(f"sha256:{n:064x}", release=1000 + n),
    "real releases for other boards": lambda digest, n: SIGNER.release(
        digest, release=1000 + n, profiles=["agx-thor"]
    ),
    "real releases that expired": lambda digest, n: SIGNER.release(
        digest, release=1000 + n, issued=times.to_text(NOW_S - 9 - n), expires=times.to_text(NOW_S)
    ),
    "older real releases": lambda digest, n: SIGNER.release(
        digest, release=6, issued=times.to_text(NOW_S - DAY_S - n)
    ),
}


@pytest.mark.parametrize("kind", JUNK)
async def test_nothing_that_others_push_displaces_the_signature_that_an_engine_stands_on(guarded, host, kind):
    bundle = host.signed(7)
    stored = guarded.push(bundle)
    await guarded.manager.activate(stored.digest)
    before = guarded.endorsement()
    for push in range(PUSHES):
        guarded.push(bundle, [JUNK[kind](stored.digest, 16 * push + n) for n in range(MAX_ATTESTATIONS)])
    held = guarded.held(bundle)
    assert set(held) >= set(bundle.attestations(stored.digest))
    assert len(held) <= MAX_ATTESTATIONS
    await guarded.restart()
    assert guarded.endorsement() == before
    await guarded.manager.activate(stored.digest)


async def test_an_envelope_stripped_of_a_signature_takes_nobody_s_signature_away(guarded, host):
    guarded.trust.trust(OTHER.public)
    bundle = host.build()
    both = release_envelope(bundle.variants[0].digest).signed(SIGNER.private).signed(OTHER.private)
    guarded.push(bundle, [both.to_json()])
    for signature in both.signatures:
        guarded.push(bundle, [Envelope(both.payload, PAYLOAD_TYPE, (signature,)).to_json()])
    assert set(guarded.endorsement().signed_by) == {"other", "release"}


async def test_a_push_that_nobody_stands_for_leaves_nothing_behind(guarded, host):
    bundle = host.signed(7)
    guarded.push(
        bundle, [OTHER.release(bundle.variants[0].digest), SIGNER.release(bundle.variants[0].digest)]
    )
    held = guarded.held(bundle)
    guarded.trust.revoke("release", list)
    with pytest.raises(UntrustedError, match="revoked here"):
        guarded.push(bundle)
    assert guarded.held(bundle) == held


def test_what_the_tests_call_a_rebuild_is_one(host):
    """The same digest, and no two notes alike: else the tests above would push one thing forty times."""
    notes = [json.loads(data)["payload"] for _ in range(2) for data in _said(host.build())]
    assert len(set(notes)) == 4


def _said(bundle):
    return bundle.attestations(bundle.variants[0].digest)
