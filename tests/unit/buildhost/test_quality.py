"""The quality report says what a plain computation says, and a build can be held to it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from packaging.version import Version
from typer.testing import CliRunner

from edgellm.bundle import Bundle, BundleWriter, EngineConfig
from edgellm.bundle.quality import CalibrationText, HeldOutText, QualityReport
from edgellm.cli.main import app
from edgellm.signing import Envelope, Statement
from edgellm.signing.statements import QUALITY_TYPE
from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quality.attestation import envelope
from edgellm_buildhost.quality.divergence import score
from edgellm_buildhost.quality.gate import check_increase, check_limit
from edgellm_buildhost.quality.measure import measure
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.reference import Engine, Floats, reference_logits, rounded_weights

VOCAB = 300
TEXT = HeldOutText(name="noise", sha256="ab" * 32)
# Longer than a chunk, and no multiple of one.
WINDOWS = np.random.default_rng(7).integers(3, VOCAB, (3, 100))
FLOAT_ROUNDING = 2e-4


@dataclass
class Reference:
    """A float model in numpy; the logits themselves pass as its hidden values."""

    shape: Architecture
    weights: Mapping[str, Floats]
    asked: list[int] = field(default_factory=list)

    def final_hidden(self, windows: NDArray[np.int64], progress: Callable[[int, int], None]) -> Floats:
        progress(1, 1)
        return np.stack([reference_logits(self.shape, self.weights, window) for window in windows])

    def logits(self, hidden: Floats) -> Floats:
        self.asked.append(len(hidden))
        return hidden


@dataclass(frozen=True)
class Model:
    """One checkpoint, an engine of it that computes in float32, and the weights that its codes stand for."""

    source: Path
    engine: Path
    config: EngineConfig
    shape: Architecture
    rounded: Mapping[str, Floats]
    floats: Mapping[str, Floats]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model")
    source = make_tiny_hf(path / "tiny")
    checkpoint = open_checkpoint(source)
    (path / "engine").mkdir()
    config = build_engine(
        checkpoint, QuantName.INT4, path / "engine", profile="host", accuracy_level=0, canary=False
    )
    rounded = rounded_weights(checkpoint, QuantName.INT4)
    floats = {name: checkpoint.tensor(name) for name in rounded}
    return Model(source, path / "engine", config, checkpoint.architecture, rounded, floats)


def nothing(_stage: str, _done: int, _total: int) -> None:
    """Progress for nobody."""


def measured(
    model: Model, weights: Mapping[str, Floats], windows: NDArray[np.int64] = WINDOWS
) -> QualityReport:
    reference = Reference(model.shape, weights)
    return measure(reference, model.engine, model.config, windows, nothing, text=TEXT)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.longdouble]:
    exact = logits.astype(np.longdouble)
    exact = exact - exact.max(axis=-1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True)))


def engine_logits(model: Model, window: NDArray[np.int64]) -> Floats:
    """All at once, by the runner that the graph's own tests use."""
    return Engine(model.engine, capacity=len(window)).step(window[None], np.zeros(1, np.int32))


def test_the_figures_are_those_of_a_plain_computation(model: Model) -> None:
    report = measured(model, model.floats)
    p, q, following = [], [], []
    for window in WINDOWS:
        p.append(log_softmax(reference_logits(model.shape, model.floats, window))[:-1])
        q.append(log_softmax(engine_logits(model, window))[:-1])
        following.append(window[1:])
    p_all, q_all, next_ids = np.concatenate(p), np.concatenate(q), np.concatenate(following)
    rows = np.arange(len(next_ids))
    divergence = (np.exp(p_all) * (p_all - q_all)).sum(axis=1)
    before, after = (np.exp(-logs[rows, next_ids].mean()) for logs in (p_all, q_all))
    assert report.tokens == len(next_ids) == 3 * 99
    assert report.perplexity == pytest.approx(float(after), rel=FLOAT_ROUNDING)
    assert report.float_perplexity == pytest.approx(float(before), rel=FLOAT_ROUNDING)
    assert report.perplexity_increase == pytest.approx(float(after / before - 1), abs=FLOAT_ROUNDING)
    assert report.kl_divergence == pytest.approx(float(divergence.mean()), rel=FLOAT_ROUNDING)
    assert report.kl_divergence_p99 == pytest.approx(float(np.quantile(divergence, 0.99)), rel=1e-3)
    assert report.top1_agreement == pytest.approx((p_all.argmax(axis=1) == q_all.argmax(axis=1)).mean())
    # The rounding is there to be seen: without it all of the above would hold of zeros.
    assert report.kl_divergence > 0.001


def test_an_engine_against_the_weights_that_its_codes_stand_for_is_the_same_model(model: Model) -> None:
    report = measured(model, model.rounded)
    assert report.kl_divergence < 1e-6
    assert report.kl_divergence_p99 < 1e-5
    assert report.top1_agreement == 1
    assert abs(report.perplexity_increase) < FLOAT_ROUNDING


def test_equal_arguments_give_equal_figures(model: Model) -> None:
    first, second = (measured(model, model.floats).model_dump(exclude={"seconds"}) for _ in range(2))
    assert first == second


def test_windows_are_read_each_by_itself_in_chunks(model: Model) -> None:
    reference = Reference(model.shape, model.floats)
    measure(reference, model.engine, model.config, WINDOWS, nothing, text=TEXT)
    assert reference.asked == [64, 35] * 3
    again = measured(model, model.floats, WINDOWS[::-1])
    assert again.perplexity == pytest.approx(measured(model, model.floats).perplexity, rel=1e-12)


def test_the_standard_error_is_that_of_windows_and_paired(model: Model) -> None:
    windows = np.random.default_rng(8).integers(3, VOCAB, (24, 20))
    report = measured(model, model.floats, windows)
    differences = []
    for window in windows:
        p = log_softmax(reference_logits(model.shape, model.floats, window))
        q = log_softmax(engine_logits(model, window))
        rows = np.arange(len(window) - 1)
        differences.append(float((p[rows, window[1:]] - q[rows, window[1:]]).mean()))
    draws = np.random.default_rng(9).choice(differences, (20_000, len(differences)))
    bootstrapped = float((np.exp(draws.mean(axis=1)) - 1).std())
    assert report.perplexity_increase_stderr == pytest.approx(bootstrapped, rel=0.1)
    assert measured(model, model.floats, windows[:1]).perplexity_increase_stderr is None


def test_the_report_says_of_what_it_is_and_what_computed_it(model: Model) -> None:
    calibration = CalibrationText(method="int4-awq", sha256="cd" * 32)
    stages: list[tuple[str, int, int]] = []
    report = measure(
        Reference(model.shape, model.rounded),
        model.engine,
        model.config,
        WINDOWS,
        lambda *stage: stages.append(stage),
        text=TEXT,
        kind="dequantized",
        calibration=calibration,
    )
    assert (report.text, report.calibration, report.reference) == (TEXT, calibration, "dequantized")
    assert (report.runtime.name, report.runtime.version) == ("onnxruntime", ort.__version__)
    assert stages == [("reference", 1, 1), *(("measure", done, 300) for done in (100, 200, 300))]


@pytest.mark.skipif(Version(ort.__version__) < Version("1.32"), reason="this version has no INT8 KV cache")
def test_an_int8_cache_is_measured_with_its_rounding(tmp_path: Path, model: Model) -> None:
    reference = Reference(model.shape, model.rounded)
    divergence = {}
    for kv in KvName:
        engine = tmp_path / kv.value
        engine.mkdir()
        config = build_engine(
            open_checkpoint(model.source),
            QuantName.INT4,
            engine,
            profile="host",
            kv=kv,
            accuracy_level=0,
            canary=False,
        )
        divergence[kv] = measure(reference, engine, config, WINDOWS, nothing, text=TEXT).kl_divergence
    assert 10 * divergence[KvName.FLOAT32] < divergence[KvName.INT8] < 0.1


def test_memory_is_bounded_by_a_chunk_not_by_the_text(tmp_path: Path) -> None:
    vocab, tokens = 5_000, 640
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "tiny", vocab=vocab, layers=1))
    (tmp_path / "engine").mkdir()
    config = build_engine(checkpoint, QuantName.INT8, tmp_path / "engine", profile="host", canary=False)

    class Silent:
        """Gives the logits of a chunk only when asked for them."""

        def final_hidden(self, windows: NDArray[np.int64], progress: Callable[[int, int], None]) -> Floats:
            return np.zeros((*windows.shape, 4), np.float32)

        def logits(self, hidden: Floats) -> Floats:
            return np.zeros((len(hidden), vocab), np.float32)

    windows = np.random.default_rng(1).integers(3, vocab, (2, tokens))
    tracemalloc.start()
    try:
        measure(Silent(), tmp_path / "engine", config, windows, nothing, text=TEXT)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    all_logits_bytes = 2 * windows.size * vocab * 4
    assert peak_bytes < all_logits_bytes / 8


FINITE = st.floats(-40, 40, width=32)


@settings(deadline=None)
@given(arrays.arrays(np.float32, (2, 11, 17), elements=FINITE), st.randoms(use_true_random=False))
def test_scores_are_those_of_extended_precision(logits: NDArray[np.float32], random) -> None:  # type: ignore[no-untyped-def]
    following = np.array([random.randrange(17) for _ in range(11)])
    scores = score(logits[0], logits[1], following)
    p, q = log_softmax(logits[0]), log_softmax(logits[1])
    rows = np.arange(11)
    np.testing.assert_allclose(scores.reference_nll, -p[rows, following].astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scores.engine_nll, -q[rows, following].astype(float), rtol=1e-6, atol=1e-6)
    exact = (np.exp(p) * (p - q)).sum(axis=1).astype(float)
    np.testing.assert_allclose(scores.divergence, exact, rtol=1e-5, atol=1e-5)
    assert (scores.divergence >= 0).all()


@given(arrays.arrays(np.float32, (9, 17), elements=FINITE))
def test_a_prediction_does_not_differ_from_itself(logits: NDArray[np.float32]) -> None:
    scores = score(logits, logits.copy(), np.zeros(9, np.int64))
    assert scores.divergence.max() < 1e-12
    assert scores.agree.all()


def test_a_small_divergence_of_many_words_is_not_lost_in_rounding() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 3, (4, 50_000)).astype(np.float32)
    b = a + rng.normal(0, 0.02, a.shape).astype(np.float32)
    p, q = log_softmax(a), log_softmax(b)
    exact = (np.exp(p) * (p - q)).sum(axis=1).astype(float)
    assert exact.max() < 1e-3
    np.testing.assert_allclose(score(a, b, np.zeros(4, np.int64)).divergence, exact, rtol=2e-3)


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        (np.zeros((0, 8), np.int64), r"windows of shape \(0, 8\): nothing to predict"),
        (np.zeros((1, 1), np.int64), "nothing to predict"),
        (np.zeros(8, np.int64), "nothing to predict"),
        (np.zeros((1, 2049), np.int64), "windows of 2,049 tokens, and the model reads 2,048"),
        (np.full((1, 8), VOCAB), "not among the model's 300"),
        (np.full((1, 8), -1), "not among the model's 300"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(
    model: Model, windows: NDArray[np.int64], reason: str
) -> None:
    with pytest.raises(BuildError, match=reason):
        measured(model, model.floats, windows)


def test_another_version_of_the_runtime_than_the_engine_s_is_refused(model: Model) -> None:
    config = model.config.model_copy(update={"runtime_requires": ">=99"})
    with pytest.raises(BuildError, match="needs ONNX Runtime >=99"):
        measure(Reference(model.shape, model.floats), model.engine, config, WINDOWS, nothing, text=TEXT)


def test_a_float_model_that_overflows_is_told_from_an_engine_that_does(tmp_path: Path, model: Model) -> None:
    loud = {**model.floats, "model.norm.weight": np.full(64, np.inf, np.float32)}
    with np.errstate(invalid="ignore"), pytest.raises(BuildError, match="the float model computes"):
        measured(model, loud)
    source = make_tiny_hf(tmp_path / "tiny")
    checkpoint = open_checkpoint(source)
    tensor = checkpoint.tensor
    checkpoint.tensor = lambda name: tensor(name) * (1e38 if name == "model.norm.weight" else 1)  # type: ignore[method-assign]
    (tmp_path / "engine").mkdir()
    config = build_engine(checkpoint, QuantName.INT4, tmp_path / "engine", profile="host", canary=False)
    with pytest.raises(BuildError, match="the finished engine computes"):
        measure(
            Reference(model.shape, model.floats), tmp_path / "engine", config, WINDOWS, nothing, text=TEXT
        )


def test_a_text_that_the_model_cannot_predict_at_all_is_refused(model: Model) -> None:
    certain = {**model.rounded, "model.norm.weight": model.rounded["model.norm.weight"] * 1000}
    with pytest.raises(BuildError, match="nats a token: that is no language model"):
        measured(model, certain)


def report_of(increase: float, stderr: float | None = 0.004) -> QualityReport:
    return QualityReport(
        text=TEXT,
        windows=16,
        window_tokens=256,
        tokens=4080,
        reference="float",
        perplexity=13.0 * (1 + increase),
        float_perplexity=13.0,
        perplexity_increase=increase,
        perplexity_increase_stderr=stderr,
        kl_divergence=0.03,
        kl_divergence_p99=0.3,
        top1_agreement=0.9,
        runtime={"name": "onnxruntime", "version": "1.32.0"},  # type: ignore[arg-type]
        seconds=20.0,
    )


@pytest.mark.parametrize("increase", [0.05, 0.01, -0.2])
def test_an_engine_within_the_limit_passes(increase: float) -> None:
    check_increase(report_of(increase), 0.05, "int4")
    check_increase(report_of(increase), float("inf"), "int4")


@pytest.mark.parametrize(
    ("quant", "step"),
    [
        ("int4", "int4-gptq"),
        ("int4-awq", "--quant int4-gptq"),
        ("int4-gptq", "--grid zero-point"),
        ("auto", "--budget-bytes"),
        ("int8", "allow more"),
        ("a method of tomorrow", "allow more"),
    ],
)
def test_an_engine_beyond_the_limit_ends_the_build_with_figures_and_a_next_step(
    quant: str, step: str
) -> None:
    with pytest.raises(BuildError) as refused:
        check_increase(report_of(0.0723), 0.05, quant)
    assert refused.value.message == (
        "perplexity rises from 13 to 13.94 on 4,080 tokens, by 7.23 % (standard error 0.4 %); "
        "--max-perplexity-increase allows 5 %"
    )
    assert step in refused.value.hint


@pytest.mark.parametrize("limit", [float("nan"), -0.01, float("-inf")])
def test_a_limit_that_is_none_is_refused_and_lets_nothing_pass(limit: float) -> None:
    with pytest.raises(BuildError, match="--max-perplexity-increase is"):
        check_limit(limit)
    with pytest.raises(BuildError, match="--max-perplexity-increase is"):
        check_increase(report_of(-0.5), limit, "int4")


def test_a_measured_report_is_attached_read_back_and_shown(tmp_path: Path, model: Model) -> None:
    report = measured(model, model.floats)
    with BundleWriter(tmp_path / "bundle") as writer:
        digest = writer.add(model.engine, model.config, move=False)
        writer.attest(digest, envelope(model.config.name, digest, report))
    with BundleWriter(tmp_path / "plain") as writer:
        assert writer.add(model.engine, model.config, move=False) == digest
    (data,) = Bundle.open(tmp_path / "bundle").attestations(digest)
    read = Envelope.parse(data)
    statement = Statement.parse(read.payload)
    assert read.signatures == ()
    assert (statement.name, statement.digest) == (model.config.name, digest)
    assert statement.predicate_type == QUALITY_TYPE
    assert QualityReport.checked(statement.predicate) == report
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "bundle"), "--json"])
    (engine,) = json.loads(shown.stdout)["engines"]
    assert engine["attestations"][0]["quality"] == report.to_json()
