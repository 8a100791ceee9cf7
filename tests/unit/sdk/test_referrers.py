"""What is attached to an engine lies beside it in the bundle, and changes nothing about it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle import digest as digests
from edgellm.bundle.attach import attach
from edgellm.bundle.manifest import MANIFEST_MEDIA_TYPE, Descriptor, canonical_json
from edgellm.bundle.referrers import ATTESTATION_TYPE, MAX_ATTESTATIONS, Referrer, parse_list
from edgellm.errors import BundleError
from edgellm.signing import Envelope
from tests.support.tiny_bundle import make_config, make_files

SUBJECT = Descriptor(MANIFEST_MEDIA_TYPE, "sha256:" + "ab" * 32, 9)


def envelope(text: str) -> bytes:
    return Envelope(text.encode()).to_json()


def blobs(bundle):
    return {f"sha256:{path.name}" for path in (bundle.path / "blobs/sha256").iterdir()}


def test_an_attestation_is_a_manifest_about_the_engine_s(bundle):
    digest = bundle.variants[0].digest
    changed = attach(bundle, digest, [envelope("one")])
    (referrer,) = changed.referrers(digest)
    document = json.loads(changed.blob_path(referrer.descriptor.digest).read_bytes())
    manifest = bundle.manifest(digest)
    assert document["subject"] == {
        "mediaType": MANIFEST_MEDIA_TYPE,
        "digest": digest,
        "size": len(manifest.to_json()),
    }
    assert document["artifactType"] == ATTESTATION_TYPE
    assert [layer["digest"] for layer in document["layers"]] == [digests.of_bytes(envelope("one"))]
    assert blobs(changed) >= {document["config"]["digest"], document["layers"][0]["digest"]}
    assert all(digests.of_file(changed.blob_path(item)) == item for item in blobs(changed))


def test_attaching_leaves_the_engine_as_it_is(bundle):
    digest = bundle.variants[0].digest
    changed = attach(bundle, digest, [envelope("one")])
    assert changed.variants == bundle.variants
    changed.verify()
    assert changed.attestations(digest) == (envelope("one"),)


def test_what_was_attached_is_replaced_and_nothing_of_it_is_left(bundle):
    digest = bundle.variants[0].digest
    before = blobs(attach(bundle, digest, []))
    one = attach(bundle, digest, [envelope("one")])
    two = attach(one, digest, [envelope("two"), envelope("three")])
    assert two.attestations(digest) == (envelope("two"), envelope("three"))
    assert digests.of_bytes(envelope("one")) not in blobs(two)
    empty = digests.of_bytes(b"{}")
    assert blobs(attach(two, digest, [])) == before | {empty}


def test_an_envelope_that_equals_an_engine_s_file_does_not_take_it_away(bundle):
    digest = bundle.variants[0].digest
    config = bundle.variants[0].config.to_json()
    attach(attach(bundle, digest, [config]), digest, []).verify()


def test_each_engine_has_its_own(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        one = writer.add(make_files(tmp_path / "one"), make_config())
        two = writer.add(make_files(tmp_path / "two", b"w"), make_config("agx-orin"))
        writer.attest(one, envelope("of one"))
    bundle = attach(Bundle.open(tmp_path / "b"), two, [envelope("of two")])
    assert bundle.attestations(one) == (envelope("of one"),)
    assert bundle.attestations(two) == (envelope("of two"),)


def test_a_bundle_that_lists_its_engines_in_the_index_itself_takes_attestations_too(bundle):
    """As oras writes it."""
    index = bundle.path / "index.json"
    (entry,) = json.loads(index.read_bytes())["manifests"]
    index.write_bytes(bundle.blob_path(entry["digest"]).read_bytes())
    digest = bundle.variants[0].digest
    for text in ("one", "two"):
        changed = attach(Bundle.open(bundle.path), digest, [envelope(text)])
        assert changed.attestations(digest) == (envelope(text),)


def test_there_are_bounds_on_what_is_attached(bundle):
    digest = bundle.variants[0].digest
    before = blobs(bundle)
    with pytest.raises(BundleError, match="17 attestations"):
        attach(bundle, digest, [envelope(str(n)) for n in range(MAX_ATTESTATIONS + 1)])
    with pytest.raises(BundleError, match="65,537 bytes"):
        attach(bundle, digest, [b" " * 65_537])
    assert blobs(bundle) == before


def test_too_many_attestations_of_a_hostile_bundle_are_not_read(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        digest = writer.add(make_files(tmp_path / "files"), make_config())
        for number in range(MAX_ATTESTATIONS + 1):
            writer.attest(digest, envelope(str(number)))
    with pytest.raises(BundleError, match="17 attestations"):
        Bundle.open(tmp_path / "b").attestations(digest)


def test_a_changed_envelope_is_found_by_its_digest(bundle):
    digest = bundle.variants[0].digest
    changed = attach(bundle, digest, [envelope("one")])
    path = changed.blob_path(changed.referrers(digest)[0].envelope.digest)
    path.write_bytes(path.read_bytes().replace(b"payload", b"PAYLOAD", 1))
    with pytest.raises(BundleError, match=r"attestation .* has changed"):
        Bundle.open(bundle.path).attestations(digest)


GOOD = json.loads(Referrer.build(SUBJECT, b"{}").raw)
LAYER = GOOD["layers"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"artifactType": "application/x"}, "artifactType is 'application/x'"),
        ({"artifactType": None}, "artifactType is None"),
        ({"layers": []}, "not a list of one envelope"),
        ({"layers": [LAYER, LAYER]}, "not a list of one envelope"),
        ({"layers": [{**LAYER, "size": 65_537}]}, "envelope: size"),
        ({"layers": [{**LAYER, "digest": "sha256:../x"}]}, "envelope: not a SHA-256"),
        ({"layers": [{**LAYER, "mediaType": "text/plain"}]}, "its layer is 'text/plain'"),
        ({"subject": None}, "subject: not a descriptor"),
        ({"subject": {**GOOD["subject"], "digest": "sha512:00"}}, "subject: not a SHA-256"),
        ({"annotations": {"a": "x" * 20_000}}, "more than 16,384"),
    ],
)
def test_a_malformed_referrer_is_refused(changes, reason):
    with pytest.raises(BundleError, match=reason):
        Referrer.parse(canonical_json({**GOOD, **changes}))


def entry(**changes):
    return {**SUBJECT.to_dict(), "artifactType": ATTESTATION_TYPE, **changes}


def listed(*entries):
    return len(parse_list(canonical_json({"manifests": list(entries)}), "list"))


def test_only_what_may_be_an_attestation_is_looked_at_in_a_list():
    untyped = {name: value for name, value in entry().items() if name != "artifactType"}
    assert listed(entry(), untyped) == 2
    assert listed(entry(artifactType="application/vnd.edgellm.engine.v1")) == 0
    assert listed(entry(size=16_385)) == 0
    assert listed(entry(mediaType="text/plain")) == 0


@pytest.mark.parametrize(
    "data", [b"{}", b"[]", b'{"manifests":[7]}', b'{"manifests":[{"digest":"x"}]}', b"\0"]
)
def test_a_malformed_list_is_refused(data):
    with pytest.raises(BundleError):
        parse_list(data, "list")


def test_skopeo_copies_a_bundle_with_what_is_attached(bundle, tmp_path):
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo (apt-get install skopeo)")
    digest = bundle.variants[0].digest
    attach(bundle, digest, [envelope("one"), envelope("two")])
    copy = ["skopeo", "copy", "--all", f"oci:{bundle.path}", f"oci:{tmp_path}/copy"]
    subprocess.run(copy, check=True, capture_output=True, timeout=60)
    copied = Bundle.open(tmp_path / "copy")
    copied.verify()
    assert set(copied.attestations(digest)) == {envelope("one"), envelope("two")}
