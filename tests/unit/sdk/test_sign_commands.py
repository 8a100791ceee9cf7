"""A bundle is signed, verified and inspected from the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle.attach import attach
from edgellm.cli.main import app
from edgellm.client import Client
from edgellm.client._push import Push
from edgellm.signing import Envelope, Statement, keys
from edgellm.signing.statements import PROVENANCE_TYPE
from tests.support.signing import Signer
from tests.support.tiny_bundle import make_config, make_files

pytestmark = pytest.mark.usefixtures("home")


def run(*args: object, **options: object):
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def good(*args: object, **options: object):
    result = run(*args, "--json", **options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(*args: object, **options: object) -> dict:
    """The error of a command as JSON; the plain command must say the same in two lines."""
    result, plain = run(*args, "--json", **options), run(*args, **options)
    assert (result.exit_code, plain.exit_code) == (1, 1)
    error = json.loads(result.stderr)["error"]
    assert plain.stderr == f"error: {error['message']}\n  try: {error['hint']}\n"
    return error


@pytest.fixture
def key(home):
    return good("key", "generate", "ci")


def sign(bundle, release, *more):
    return good("sign", bundle.path, "--key", "ci", "--release", release, *more)


def attested(bundle):
    return Bundle.open(bundle.path).attestations(bundle.variants[0].digest)


def test_a_signed_bundle_verifies_with_its_key_and_not_with_another(bundle, key):
    (engine,) = sign(bundle, 7, "--expires", "90d", "--profile", "orin-nano-8gb")["engines"]
    assert (engine["digest"], engine["release"]) == (bundle.variants[0].digest, 7)
    (verdict,) = good("verify", bundle.path, "--key", "ci")["engines"]
    assert [item["key"] for item in verdict["standing"]] == ["ci"]
    good("key", "generate", "other")
    error = failure("verify", bundle.path, "--key", "other")
    assert "signed by a key that is not trusted here" in error["message"]
    assert "trusted here: other" in error["hint"]
    good("verify", bundle.path, "--key", "other", "--key", "ci")


def test_verify_judges_as_a_board_of_a_kind_would(bundle, key):
    sign(bundle, 7, "--profile", "orin-nano-8gb")
    good("verify", bundle.path, "--key", "ci", "--profile", "orin-nano-8gb")
    error = failure("verify", bundle.path, "--key", "ci", "--profile", "agx-orin")
    assert "release 7 is for orin-nano-8gb" in error["message"]


def test_signing_leaves_the_engine_s_digest_as_it_is(bundle, key):
    sign(bundle, 7)
    again = Bundle.open(bundle.path)
    again.verify()
    assert again.variants == bundle.variants


def test_a_key_says_about_an_engine_what_it_said_last(bundle, key):
    good("key", "generate", "other")
    good("sign", bundle.path, "--key", "other", "--release", "5")
    for release in (7, 8):
        sign(bundle, release)
    (engine,) = good("inspect", bundle.path)["engines"]
    assert [item["release"]["release"] for item in engine["attestations"]] == [5, 8]


def test_signing_has_the_key_stand_for_the_provenance_too(bundle, key):
    digest = bundle.variants[0].digest
    said = Statement("tiny-int4", digest, PROVENANCE_TYPE, {"a": 1}).to_json()
    attach(bundle, digest, [Envelope(said).to_json()])
    sign(bundle, 7)
    public = keys.read_public_key(keys.find("ci", ".pub.json"))
    provenance, release = (Envelope.parse(data) for data in attested(bundle))
    assert provenance.payload == said
    assert provenance.signers({public.key_id: public}) == [public]
    assert release.signers({public.key_id: public}) == [public]


@pytest.mark.parametrize("kind", ["text/plain", "application/vnd.in-toto+json"])
def test_nothing_is_signed_unseen_that_is_not_provenance_of_this_engine(bundle, key, kind):
    """Else who hands over a bundle could have a key sign whatever is attached to it."""
    digest = bundle.variants[0].digest
    about = digest if kind == "text/plain" else "sha256:" + "00" * 32
    planted = Envelope(Statement("tiny-int4", about, PROVENANCE_TYPE, {}).to_json(), kind).to_json()
    smuggled = Envelope.parse(Signer.make().release(digest, release=99))
    attach(bundle, digest, [planted, smuggled.to_json()])
    sign(bundle, 7)
    kept = attested(bundle)
    assert kept[:2] == (planted, smuggled.to_json())
    (verdict,) = good("verify", bundle.path, "--key", "ci")["engines"]
    assert [item["release"] for item in verdict["standing"]] == [7]


def test_one_engine_of_several_is_signed_by_its_digest(tmp_path, key):
    with BundleWriter(tmp_path / "b") as writer:
        one = writer.add(make_files(tmp_path / "one"), make_config())
        two = writer.add(make_files(tmp_path / "two", b"w"), make_config("agx-orin"))
    sign(Bundle.open(tmp_path / "b"), 7, "--variant", two)
    assert Bundle.open(tmp_path / "b").attestations(one) == ()
    assert "no release is signed" in failure("verify", tmp_path / "b", "--key", "ci")["message"]


def test_a_damaged_bundle_is_not_signed(bundle, key):
    largest = max((bundle.path / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "has changed" in failure("sign", bundle.path, "--key", "ci", "--release", "7")["message"]
    assert attested(bundle) == ()


def test_an_encrypted_key_takes_its_passphrase_from_a_variable(bundle, home, monkeypatch):
    monkeypatch.setenv("SESAME", "open sesame")
    good("key", "generate", "ci", "--passphrase-env", "SESAME")
    sign(bundle, 7, "--passphrase-env", "SESAME")
    error = failure("sign", bundle.path, "--key", "ci", "--release", "8")
    assert "needs a passphrase" in error["message"]
    assert "--passphrase-env" in error["hint"]
    monkeypatch.delenv("SESAME")
    error = failure("sign", bundle.path, "--key", "ci", "--release", "8", "--passphrase-env", "SESAME")
    assert "SESAME is not set" in error["message"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--release", "0"),
        ("--expires", "0d"),
        ("--expires", "365"),
        ("--expires", "forever"),
    ],
)
def test_wrong_usage_is_told_apart_from_failure(bundle, key, wrong):
    args = {"--release": "7", "--expires": "1d", wrong[0]: wrong[1]}
    result = run("sign", bundle.path, "--key", "ci", *(word for pair in args.items() for word in pair))
    assert result.exit_code == 2
    assert attested(bundle) == ()


def test_a_key_that_is_not_there_is_an_error_and_says_where_it_was_looked_for(bundle):
    error = failure("sign", bundle.path, "--key", "nobody", "--release", "7")
    assert "no nobody.key in" in error["message"]
    assert "edgellm key generate" in error["hint"]


def test_a_private_key_given_as_public_one_is_refused(bundle, key):
    error = failure("verify", bundle.path, "--key", key["private_key"])
    assert "this is a private key" in error["message"]


def test_a_key_is_shown(key):
    assert good("key", "show", "ci")["key_id"] == key["key_id"]
    assert "valid   always" in run("key", "show", "ci").stdout


@pytest.mark.parametrize(
    "wrong", [("--not-after", "soon"), ("--days", "9", "--not-after", "2030-01-01"), ("--days", "0")]
)
def test_a_validity_that_is_none_is_wrong_usage_and_makes_no_key(home, wrong):
    assert run("key", "generate", "ci", *wrong).exit_code == 2
    assert not (home / "keys").exists()


def test_inspect_says_what_is_attached_and_that_it_was_not_checked(bundle, key):
    sign(bundle, 7)
    shown = run("inspect", bundle.path).stdout
    assert "not checked" in shown
    assert key["key_id"][:12] in shown


def test_a_push_brings_what_is_attached(bundle, key):
    sign(bundle, 7)
    signed = Bundle.open(bundle.path)
    digest = signed.variants[0].digest
    assert tuple(Push(signed, digest, None).prepare_request().attestations) == attested(bundle)


def test_a_signed_bundle_is_pushed_as_an_unsigned_one_is(bundle, key, device, target):
    sign(bundle, 7)
    signed = Bundle.open(bundle.path)
    with Client(target) as client:
        client.push(signed, signed.variants[0].digest)
    assert set(device.blobs) == {blob.digest for blob in signed.variants[0].manifest.blobs()}
