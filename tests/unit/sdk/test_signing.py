"""Only what a trusted key has signed, in its time, about this engine, stands for it."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.signing import (
    Envelope,
    Expected,
    Keyring,
    PublicKey,
    Release,
    SigningError,
    Statement,
    judge,
    keys,
    statements,
    times,
)
from edgellm.signing.dsse import MAX_SIGNATURES, pae
from edgellm.signing.verification import signers
from tests.support.signing import DAY_S, NOW_S, Signer, release_envelope

ENGINE = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
EXPECTED = Expected(ENGINE, "tiny-int4", "orin-nano-8gb", NOW_S)
SIGNER = Signer.make()
STRANGER = Signer.make("stranger")
RING = Keyring((SIGNER.public,))


def reasons(*attestations: bytes, ring: Keyring = RING, expected: Expected = EXPECTED) -> str:
    verdict = judge(attestations, ring, expected)
    assert verdict.standing == ()
    return "; ".join(verdict.reasons)


def signed(statement: object, kind: str = "application/vnd.in-toto+json") -> bytes:
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    return Envelope(payload, kind).signed(SIGNER.private).to_json()


def statement(**changes: object) -> dict[str, object]:
    return {**json.loads(release_envelope(ENGINE).payload), **changes}


def predicate(**changes: object) -> dict[str, object]:
    before = statement()["predicate"]
    assert isinstance(before, dict)
    merged = {**before, **changes}
    return statement(predicate={name: value for name, value in merged.items() if value is not None})


def test_a_release_that_a_trusted_key_signed_stands():
    (standing,) = judge([SIGNER.release(ENGINE, release=9)], RING, EXPECTED).standing
    assert (standing.key.name, standing.release.release) == ("release", 9)


def test_the_signed_bytes_are_those_that_the_format_s_own_text_shows():
    # The example of the DSSE specification 1.0.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_openssl_verifies_what_we_sign(tmp_path):
    envelope = Envelope.parse(SIGNER.release(ENGINE))
    (tmp_path / "signed").write_bytes(pae(envelope.payload_type, envelope.payload))
    (tmp_path / "sig").write_bytes(envelope.signatures[0].value)
    (tmp_path / "pub.pem").write_text(SIGNER.public.pem)
    command = "openssl pkeyutl -verify -pubin -inkey pub.pem -rawin -in signed -sigfile sig"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True, timeout=20)


def test_securesystemslib_and_we_verify_each_other_s_envelopes():
    dsse = pytest.importorskip("securesystemslib.dsse")
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner, SSlibKey

    ours = json.loads(SIGNER.release(ENGINE))
    raw = base64.b64decode("".join(SIGNER.public.pem.splitlines()[1:-1]))[-32:]
    key = SSlibKey(SIGNER.public.key_id, "ed25519", "ed25519", {"public": raw.hex()})
    assert dsse.Envelope.from_dict(ours).verify([key], 1) == {SIGNER.public.key_id: key}
    broken = json.loads(SIGNER.release(OTHER)) | {
        "signatures": json.loads(SIGNER.release(ENGINE))["signatures"]
    }
    with pytest.raises(VerificationError):
        dsse.Envelope.from_dict(broken).verify([key], 1)

    other = CryptoSigner.generate_ed25519()
    theirs = dsse.Envelope(release_envelope(ENGINE).payload, "application/vnd.in-toto+json", {})
    theirs.sign(other)
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    value = Ed25519PublicKey.from_public_bytes(bytes.fromhex(other.public_key.keyval["public"]))
    pem = PublicKey.from_pem(
        "theirs", value.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    envelope = Envelope.parse(json.dumps(theirs.to_dict()).encode())
    assert envelope.signers({other.public_key.keyid: pem}) == [pem]


def test_an_unsigned_engine_is_not_signed():
    assert reasons() == "no release is signed"
    assert reasons(release_envelope(ENGINE).to_json()) == "no release is signed"


def test_a_stranger_s_signature_does_not_count_and_its_key_is_named():
    assert STRANGER.public.short_id in reasons(STRANGER.release(ENGINE))


def test_a_stranger_who_writes_a_trusted_key_s_id_is_found_out():
    envelope = json.loads(STRANGER.release(ENGINE))
    envelope["signatures"][0]["keyid"] = SIGNER.public.key_id
    assert "the signature of release does not match" in reasons(json.dumps(envelope).encode())


def test_a_revoked_key_is_named_and_does_not_count():
    ring = Keyring((STRANGER.public,), (SIGNER.public,))
    assert reasons(SIGNER.release(ENGINE), ring=ring) == "it is signed by release, which was revoked here"


def test_a_second_signature_by_a_stranger_takes_nothing_away():
    envelope = Envelope.parse(SIGNER.release(ENGINE)).signed(STRANGER.private)
    assert len(judge([envelope.to_json()], RING, EXPECTED).standing) == 1


def test_a_bad_envelope_beside_a_good_one_takes_nothing_away():
    attestations = [b"{", STRANGER.release(ENGINE), SIGNER.release(OTHER), SIGNER.release(ENGINE)]
    assert len(judge(attestations, RING, EXPECTED).standing) == 1


def test_each_of_two_keys_stands_for_itself():
    ring = Keyring((SIGNER.public, STRANGER.public))
    verdict = judge([SIGNER.release(ENGINE), STRANGER.release(ENGINE)], ring, EXPECTED)
    assert [item.key.name for item in verdict.standing] == ["release", "stranger"]


def test_a_signed_release_of_another_engine_says_nothing_for_this_one():
    assert "of another engine, cdcdcdcdcdcd" in reasons(SIGNER.release(OTHER))


def test_a_release_under_another_name_does_not_count():
    assert "is of 'other'" in reasons(SIGNER.release(ENGINE, name="other"))


def test_a_release_for_other_boards_does_not_count_and_one_for_this_board_does():
    assert "is for agx-orin" in reasons(SIGNER.release(ENGINE, profiles=["agx-orin"]))
    meant = SIGNER.release(ENGINE, profiles=["agx-orin", "orin-nano-8gb"])
    assert judge([meant], RING, EXPECTED).standing


@pytest.mark.parametrize(("left_s", "stands"), [(1, True), (0, False), (-1, False)])
def test_a_release_counts_until_the_second_in_which_it_expires(left_s, stands):
    verdict = judge([SIGNER.release(ENGINE, expires=times.to_text(NOW_S + left_s))], RING, EXPECTED)
    assert bool(verdict.standing) is stands
    assert stands or "expired on 2027-01-15" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("begins", "ends", "reason"),
    [
        (NOW_S - DAY_S, NOW_S, ""),
        (NOW_S - DAY_S + 1, None, "before timed was valid"),
        (None, NOW_S - DAY_S - 1, "was valid until"),
        # Signed in time, but the key has ended since: who stole it could write any time of signing.
        (None, NOW_S - 1, "was valid until"),
    ],
)
def test_a_key_counts_from_its_begin_to_its_end(begins, ends, reason):
    timed = Signer.make("timed", begins, ends)
    verdict = judge([timed.release(ENGINE)], Keyring((timed.public,)), EXPECTED)
    assert bool(verdict.standing) is not bool(reason)
    assert reason in "".join(verdict.reasons)


def test_signed_provenance_alone_is_no_release():
    provenance = Statement("tiny-int4", ENGINE, statements.PROVENANCE_TYPE, {}).to_json()
    assert reasons(Envelope(provenance).signed(SIGNER.private).to_json()) == "no release is signed"


def test_a_signature_over_another_payload_type_is_none_over_ours():
    envelope = json.loads(signed(release_envelope(ENGINE).payload, "text/plain"))
    assert "text/plain" in reasons(json.dumps(envelope).encode())
    envelope["payloadType"] = "application/vnd.in-toto+json"
    assert "does not match" in reasons(json.dumps(envelope).encode())


ENVELOPE = json.loads(SIGNER.release(ENGINE))
SIGNATURE = ENVELOPE["signatures"][0]


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (b"[]", "not a JSON object"),
        (b"\xff", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"payload":"","payload":"","payloadType":"x","signatures":[]}', "a key comes twice"),
        (b" " * (64 * 1024 + 1), "more than 65,536"),
        ({**ENVELOPE, "payload": 7}, "payload is not base64"),
        ({**ENVELOPE, "payload": "e30"}, "payload is not base64"),
        ({**ENVELOPE, "payload": "e3-_"}, "payload is not base64"),
        ({**ENVELOPE, "payload": " " + ENVELOPE["payload"]}, "payload is not base64"),
        ({**ENVELOPE, "payload": "é"}, "payload is not base64"),
        ({**ENVELOPE, "payloadType": None}, "payloadType is not a text"),
        ({**ENVELOPE, "payloadType": "é"}, "payloadType is not a text"),
        ({**ENVELOPE, "signatures": {}}, "signatures is not a list"),
        ({**ENVELOPE, "signatures": ["x"]}, "a signature is not an object"),
        ({**ENVELOPE, "signatures": [{**SIGNATURE, "sig": []}]}, "sig is not base64"),
        ({**ENVELOPE, "signatures": [{"sig": SIGNATURE["sig"]}]}, "keyid is not a text"),
        ({**ENVELOPE, "signatures": [SIGNATURE, SIGNATURE]}, "name the same key"),
        ({**ENVELOPE, "signatures": [{**SIGNATURE, "sig": "AAAA"}]}, "does not match"),
        (
            {**ENVELOPE, "signatures": [{**SIGNATURE, "keyid": str(n)} for n in range(MAX_SIGNATURES + 1)]},
            "signatures is not a list of at most",
        ),
    ],
)
def test_a_malformed_envelope_is_refused_and_what_is_wrong_is_named(envelope, reason):
    assert reason in reasons(envelope if isinstance(envelope, bytes) else json.dumps(envelope).encode())


TWICE = release_envelope(ENGINE).payload.replace(b'"release":7', b'"release":7,"release":9')
SUBJECT = {"name": "tiny-int4", "digest": {"sha256": "ab" * 32}}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"7", "not a JSON object"),
        (TWICE, "a key comes twice"),
        (statement(_type="https://in-toto.io/Statement/v0.1"), "_type is"),
        (statement(subject=[]), "subject is not a list of one object"),
        (statement(subject=[SUBJECT, SUBJECT]), "subject is not a list of one object"),
        (statement(subject=[{**SUBJECT, "digest": {"sha256": "AB" * 32}}]), "no SHA-256 digest"),
        (statement(subject=[{**SUBJECT, "digest": {"md5": "ab" * 32}}]), "no SHA-256 digest"),
        (statement(subject=[{**SUBJECT, "digest": [ENGINE]}]), "no SHA-256 digest"),
        (statement(predicateType=7), "predicateType is not a text"),
        (statement(predicate=[]), "predicate not an object"),
        (predicate(release=0), "release: release: "),
        (predicate(release=True), "release: release: "),
        (predicate(release=7.0), "release: release: "),
        (predicate(release="7"), "release: release: "),
        (predicate(release=2**63), "release: release: "),
        (predicate(release=None), "release: release: "),
        (predicate(expires=None), "release: expires: "),
        (predicate(expires=NOW_S + DAY_S), "release: expires: not a time"),
        (predicate(expires="2030-01-01T00:00:00+00:00"), "release: expires: not a time"),
        (predicate(expires="2030-13-01T00:00:00Z"), "release: expires: "),
        (predicate(expires=times.to_text(NOW_S - DAY_S)), "expires is not after issued"),
        (predicate(profiles="orin-nano-8gb"), "release: profiles: "),
        (predicate(profiles=["a"] * 65), "release: profiles: "),
        (predicate(devices=["jetson-01"]), "release: devices: "),
    ],
)
def test_a_signed_statement_that_is_malformed_does_not_count(payload, reason):
    assert reason in reasons(signed(payload))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_changed_byte_in_a_signed_envelope_never_changes_what_is_believed(data):
    good = SIGNER.release(ENGINE)
    place = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != good[place]))
    verdict = judge([good[:place] + bytes([byte]) + good[place + 1 :]], RING, EXPECTED)
    assert [item.release.release for item in verdict.standing] in ([], [7])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_verdict_and_stand_for_nothing(data):
    assert judge([data], RING, EXPECTED).standing == ()
    assert signers([data], [SIGNER.public], ENGINE) == set()


def test_who_signed_is_told_also_when_it_no_longer_counts():
    old = SIGNER.release(ENGINE, expires=times.to_text(NOW_S - 1), issued=times.to_text(NOW_S - 2))
    attestations = [old, STRANGER.release(OTHER), SIGNER.release(OTHER)]
    assert signers(attestations, [SIGNER.public, STRANGER.public], ENGINE) == {SIGNER.public.key_id}


def test_a_key_is_made_for_its_owner_only_and_read_back(tmp_path):
    public, path = keys.generate(tmp_path, "ci", not_before_s=NOW_S, not_after_s=NOW_S + DAY_S)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.read_public_key(tmp_path / "ci.pub.json") == public
    assert keys.read_signing_key(path).key_id == public.key_id
    assert b"BEGIN PRIVATE KEY" in path.read_bytes()


def test_a_key_is_never_overwritten(tmp_path):
    _, path = keys.generate(tmp_path, "ci")
    before = path.read_bytes()
    with pytest.raises(SigningError, match=r"ci\.pub\.json exists"):
        keys.generate(tmp_path, "ci")
    (tmp_path / "ci.pub.json").unlink()
    with pytest.raises(SigningError, match=r"ci\.key exists"):
        keys.generate(tmp_path, "ci")
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_failed_generation_leaves_no_private_key_behind(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgellm.paths.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        keys.generate(tmp_path, "ci")
    assert list(tmp_path.iterdir()) == []


def test_an_encrypted_key_needs_its_passphrase(tmp_path):
    public, path = keys.generate(tmp_path, "ci", passphrase=b"open sesame")
    assert keys.is_encrypted(path)
    assert keys.read_signing_key(path, b"open sesame").key_id == public.key_id
    with pytest.raises(SigningError, match="is encrypted"):
        keys.read_signing_key(path)
    with pytest.raises(SigningError, match="passphrase is wrong"):
        keys.read_signing_key(path, b"guess")


def test_a_private_key_that_others_may_read_is_refused(tmp_path):
    _, path = keys.generate(tmp_path, "ci")
    path.chmod(0o640)
    with pytest.raises(SigningError, match="can be read by others"):
        keys.read_signing_key(path)


def test_a_plain_pem_is_a_key_of_the_file_s_name(tmp_path):
    path = tmp_path / "vendor.pem"
    path.write_text(SIGNER.public.pem)
    assert keys.read_public_key(path) == PublicKey("vendor", SIGNER.public.key_id, SIGNER.public.pem)


def rsa_pem() -> str:
    made = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        capture_output=True,
        check=True,
    )
    command = ["openssl", "pkey", "-pubout"]
    return subprocess.run(command, input=made.stdout, capture_output=True, check=True).stdout.decode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "not a public key"),
        (SIGNER.private.to_pem(None).decode(), "this is a private key"),
        (rsa_pem(), "not Ed25519"),
        ("{}", "name: Field required"),
        (json.dumps({"name": "a/b", "public_pem": SIGNER.public.pem}), "not a name for a key"),
        (json.dumps({"name": "a", "public_pem": SIGNER.public.pem, "key_id": "00"}), "key_id is"),
        (json.dumps({"name": "a", "public_pem": SIGNER.public.pem, "notAfter": "x"}), "notAfter"),
        (json.dumps({"name": "a", "public_pem": SIGNER.public.pem, "not_after": "tomorrow"}), "not_after"),
        (" " * 20_000, "too large"),
    ],
)
def test_what_is_no_public_key_is_refused_and_named(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "key.pub.json"
    path.write_text(text)
    with pytest.raises(SigningError, match=reason) as refused:
        keys.read_public_key(path)
    assert "key.pub.json" in refused.value.message


def test_a_key_that_ends_before_it_begins_is_refused():
    with pytest.raises(SigningError, match="not_after must come after"):
        Signer.make("x", NOW_S, NOW_S)


@pytest.mark.parametrize("time_s", [-1, 2**62])
def test_a_time_that_no_calendar_has_is_refused(time_s):
    with pytest.raises(SigningError, match="between 1970 and 9999"):
        PublicKey.from_pem("x", SIGNER.public.pem.encode(), None, time_s)


@given(st.integers(0, times.MAX_S))
def test_a_time_is_written_in_one_spelling_and_read_back(time_s):
    assert times.from_text(times.to_text(time_s)) == time_s


def test_a_release_is_written_and_read_back():
    release = Release.of(Statement.parse(release_envelope(ENGINE, profiles=["a", "b"]).payload))
    assert release.about(ENGINE).to_json() == release_envelope(ENGINE, profiles=["a", "b"]).payload
