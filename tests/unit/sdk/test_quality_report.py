"""A quality report is attached, shown, signed and pushed; a stranger's is taken for what it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgellm.bundle import Bundle, EngineManifest
from edgellm.bundle import digest as digests
from edgellm.bundle.attach import attach
from edgellm.bundle.manifest import CONFIG_MEDIA_TYPE, Descriptor, Layer
from edgellm.bundle.quality import QualityReport
from edgellm.cli.main import app
from edgellm.client import Client
from edgellm.client._push import Push
from edgellm.errors import BundleError
from edgellm.signing import Envelope, Statement
from edgellm.signing.attesting import said, signed_reports
from edgellm.signing.statements import PROVENANCE_TYPE, QUALITY_TYPE
from edgellm_agent.errors import UntrustedError
from edgellm_agent.trust.policy import DeviceTrust
from edgellm_agent.trust.settings import TrustSettings
from tests.support.quality_reports import GOOD
from tests.support.signing import NOW_S, Signer
from tests.support.tiny_bundle import make_config

ENGINE = "sha256:" + "ab" * 32
SIGNER = Signer.make("ci")


def envelope(digest: str, predicate: dict | None = None, kind: str = QUALITY_TYPE) -> Envelope:
    return Envelope(Statement("tiny-int4", digest, kind, GOOD if predicate is None else predicate).to_json())


def changed(path: str, value: object) -> dict:
    """GOOD with another value in one field, as `text.name`."""
    *parents, last = path.split(".")
    document = json.loads(json.dumps(GOOD))
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return document


def run(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def reported(bundle):
    """A bundle with a report, as `edgellm build` leaves it."""
    digest = bundle.variants[0].digest
    return attach(bundle, digest, [envelope(digest).to_json()])


@pytest.fixture
def key(home):
    result = run("key", "generate", "ci", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def attestations(bundle):
    (engine,) = json.loads(run("inspect", bundle.path, "--json").stdout)["engines"]
    return engine["attestations"]


def test_a_report_comes_back_as_it_was_written():
    report = QualityReport.checked(GOOD)
    assert report.to_json() == GOOD
    assert QualityReport.checked(report.to_json()) == report


def test_a_newer_build_host_may_say_more():
    assert QualityReport.checked({**GOOD, "bits_per_byte": 0.9}) == QualityReport.checked(GOOD)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("schema_version", 2, "schema_version: "),
        ("text", "the reference", "text: "),
        ("text.name", "", "text.name: "),
        ("text.name", "x" * 129, "text.name: "),
        ("text.name", "a\x1b[2J", "text.name: has characters that are not printable"),
        ("text.name", "a\x9b2J", "text.name: has characters that are not printable"),
        ("text.name", "\u202egnol", "text.name: has characters that are not printable"),
        ("text.sha256", "AB" * 32, "text.sha256: "),
        ("windows", True, "windows: "),
        ("windows", "16", "windows: "),
        ("windows", 2**53 + 1, "windows: "),
        ("tokens", 4096, r"tokens is not windows \* \(window_tokens - 1\)"),
        ("reference", "another engine", "reference: "),
        ("perplexity", float("nan"), "perplexity: "),
        ("perplexity", float("inf"), "perplexity: "),
        ("perplexity", 0.99, "perplexity: "),
        ("perplexity", "13.65", "perplexity: "),
        ("perplexity", 10**400, "perplexity: "),
        ("perplexity_increase", 0.0, "perplexity_increase is not perplexity / float_perplexity - 1"),
        ("perplexity_increase_stderr", -0.1, "perplexity_increase_stderr: "),
        ("kl_divergence", -0.1, "kl_divergence: "),
        ("kl_divergence_p99", float("nan"), "kl_divergence_p99: "),
        ("top1_agreement", 1.01, "top1_agreement: "),
        ("runtime.version", "1.32\n", "runtime.version: "),
        ("calibration.method", "\0", "calibration.method: "),
        ("seconds", float("inf"), "seconds: "),
    ],
)
def test_a_malformed_report_is_refused_and_its_field_named(path, value, reason):
    with pytest.raises(BundleError, match=f"quality report: {reason}"):
        QualityReport.checked(changed(path, value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*GOOD, "text.name", "text.sha256", "runtime.name"]), JSON)
def test_whatever_a_field_holds_a_report_is_taken_or_refused_with_printable_words(path, value):
    words = ""
    try:
        words = QualityReport.checked(changed(path, value)).text.name
    except BundleError as error:
        words = error.message
    assert words.isprintable()
    assert len(words) < 300


def test_a_report_leaves_the_engine_s_digest_as_it_is(bundle, reported):
    assert reported.variants == bundle.variants
    reported.verify()


def test_inspect_shows_the_report_and_that_nobody_signed_it(reported):
    shown = run("inspect", reported.path).stdout
    assert "13.65, reference 13: +5 % (standard error 0.4 %)" in shown
    assert "0.0312 nats a token, 99 % below 0.31" in shown
    assert "91.2 % the same" in shown
    assert "4,080 tokens of the Python language reference (abababababab)" in shown
    assert "against the float model" in shown
    assert "int4-awq, text cdcdcdcdcdcd" in shown
    assert "signed by    nobody" in shown
    (attestation,) = attestations(reported)
    assert attestation == {"kind": "quality", "key_ids": [], "release": None, "quality": GOOD}


def test_inspect_says_where_there_was_no_float_model(bundle):
    digest = bundle.variants[0].digest
    document = {**GOOD, "reference": "dequantized", "calibration": None, "perplexity_increase_stderr": None}
    attach(bundle, digest, [envelope(digest, document).to_json()])
    shown = run("inspect", bundle.path).stdout
    assert "against its own weights in float32" in shown
    assert "standard error" not in shown
    assert "calibration" not in shown


def test_a_report_of_another_engine_is_not_shown_as_this_one_s(bundle):
    digest = bundle.variants[0].digest
    attach(bundle, digest, [envelope(ENGINE).to_json()])
    (attestation,) = attestations(bundle)
    assert (attestation["kind"], attestation["quality"]) == ("quality of another engine", None)
    assert "perplexity" not in run("inspect", bundle.path).stdout


def test_a_hostile_report_is_named_and_none_of_it_is_printed(bundle):
    digest = bundle.variants[0].digest
    planted = changed("text.name", "\x1b]0;owned\x07")
    attach(bundle, digest, [envelope(digest, planted).to_json()])
    for result in (run("inspect", bundle.path), run("inspect", bundle.path, "--json")):
        assert result.exit_code == 0
        assert "unreadable (quality report: text.name: has characters" in result.stdout
        assert "owned" not in result.stdout


def test_the_largest_figures_that_are_taken_are_printed_in_few_characters(bundle):
    digest = bundle.variants[0].digest
    loud = {**GOOD, "perplexity": 1e308, "float_perplexity": 1.0, "perplexity_increase": 1e308}
    attach(bundle, digest, [envelope(digest, loud).to_json()])
    lines = run("inspect", bundle.path).stdout.splitlines()
    assert max(len(line) for line in lines if line.startswith("perplexity")) < 100


def test_the_kind_of_a_stranger_s_statement_is_cut():
    data = envelope(ENGINE, {}, kind="urn:" + "x" * 30_000).to_json()
    assert len(said(data, ENGINE).kind) == 80


def test_signing_has_the_key_stand_for_the_report_too(reported, key):
    result = run("sign", reported.path, "--key", "ci", "--release", "7")
    assert result.exit_code == 0, result.stderr
    claims = {item["kind"]: item for item in attestations(reported)}
    assert set(claims) == {"quality", "release"}
    assert claims["quality"]["key_ids"] == claims["release"]["key_ids"] == [key["key_id"]]
    assert claims["quality"]["quality"] == GOOD


@pytest.mark.parametrize(
    "planted", [envelope(ENGINE), None], ids=["of another engine", "with a field that is malformed"]
)
def test_no_report_is_signed_that_nobody_could_read_as_this_engine_s(bundle, key, planted):
    digest = bundle.variants[0].digest
    kept = (planted or envelope(digest, changed("perplexity", 0))).to_json()
    attach(bundle, digest, [kept])
    assert run("sign", bundle.path, "--key", "ci", "--release", "7").exit_code == 0
    assert Bundle.open(bundle.path).attestations(digest)[0] == kept


def test_a_report_counts_as_signed_only_by_a_key_that_signed_it_about_this_engine():
    other = Signer.make("other")
    mine = envelope(ENGINE).signed(SIGNER.private)
    forged = Envelope(mine.payload.replace(b"13.65", b"13.01"), mine.payload_type, mine.signatures)
    elsewhere = envelope("sha256:" + "00" * 32).signed(SIGNER.private)
    provenance = envelope(ENGINE, kind=PROVENANCE_TYPE).signed(SIGNER.private)
    malformed = envelope(ENGINE, changed("perplexity", 0)).signed(SIGNER.private)
    useless = [forged, elsewhere, provenance, malformed, envelope(ENGINE)]
    data = [b"\xff", *(item.to_json() for item in useless)]
    assert signed_reports(data, [SIGNER.public, other.public], ENGINE) == []
    assert signed_reports([mine.to_json()], [other.public], ENGINE) == []
    (found,) = signed_reports([*data, mine.to_json()], [SIGNER.public, other.public], ENGINE)
    assert found.report == QualityReport.checked(GOOD)
    assert found.keys == (SIGNER.public,)


def test_a_push_brings_the_report(reported, device, target):
    digest = reported.variants[0].digest
    request = Push(reported, digest, None).prepare_request()
    assert tuple(request.attestations) == reported.attestations(digest)
    with Client(target) as client:
        client.push(reported, digest)
    assert set(device.blobs) == {blob.digest for blob in reported.variants[0].manifest.blobs()}


async def test_a_device_takes_a_report_as_one_more_attestation_and_asks_nothing_of_it(tmp_path):
    """Neither a report that is there nor one that is malformed makes a difference to trust."""
    config = make_config()
    raw = config.to_json()
    blob = Descriptor(CONFIG_MEDIA_TYPE, digests.of_bytes(raw), len(raw))
    manifest = EngineManifest.build(blob, [Layer("w", "application/x", digests.of_bytes(b"w"), 1)])
    reports = [
        envelope(manifest.digest),
        envelope(manifest.digest).signed(SIGNER.private),
        envelope(manifest.digest, changed("perplexity", "none")).signed(SIGNER.private),
    ]
    data = [item.to_json() for item in reports]
    trust = DeviceTrust(TrustSettings(), tmp_path, "host", wall_s=lambda: NOW_S, monotonic_s=lambda: 0.0)
    try:
        trust.admit(manifest, config, data, proven=False)
        trust.trust(SIGNER.public)
        with pytest.raises(UntrustedError, match="no release is signed"):
            trust.admit(manifest, config, data, proven=False)
        release = SIGNER.release(manifest.digest)
        assert trust.admit(manifest, config, [*data, release], proven=False).signed_by == ("ci",)
    finally:
        await trust.close()


def test_verify_shows_the_report_that_a_trusted_key_signed(reported, key):
    assert run("sign", reported.path, "--key", "ci", "--release", "7").exit_code == 0
    shown = run("verify", reported.path, "--key", "ci")
    assert shown.exit_code == 0
    assert "+5 %" in shown.stdout
    (engine,) = json.loads(run("verify", reported.path, "--key", "ci", "--json").stdout)["engines"]
    assert engine["quality"] == [{"keys": ["ci"], **GOOD}]


def test_verify_says_nothing_of_a_report_that_nobody_signed(reported, key):
    assert "+5 %" not in run("verify", reported.path, "--key", "ci").stdout
