"""The canary of a build: what the finished engine answers, recorded so that any build gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from packaging.version import Version
from pydantic import ValidationError
from tokenizers import Tokenizer

from edgellm.bundle import EngineConfig
from edgellm.bundle.config import Canary
from edgellm_buildhost import canary as canaries
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.reference import reference_logits, rounded_weights

takes_an_int8_cache = Version(ort.__version__) >= Version("1.32")


def build(source: Path, directory: Path, **options: Any) -> EngineConfig:
    directory.mkdir()
    return build_engine(open_checkpoint(source), QuantName.INT8, directory, profile="host", **options)


def record(directory: Path, config: EngineConfig) -> Canary | None:
    return canaries.record_canary(directory, config, lambda done, total: None)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny")


def test_it_is_the_greedy_answer_and_its_gaps_as_a_reference_computes_them(tmp_path: Path, hf: Path) -> None:
    config = build(hf, tmp_path / "engine", accuracy_level=0)
    canary = config.canary
    assert canary is not None
    prompt = Tokenizer.from_file(str(tmp_path / "engine" / "tokenizer.json")).encode(canary.prompt).ids
    checkpoint = open_checkpoint(hf)
    weights = rounded_weights(checkpoint, QuantName.INT8)
    ids = np.array([*prompt, *canary.token_ids[:-1]])
    logits = reference_logits(checkpoint.architecture, weights, ids)[len(prompt) - 1 :]
    assert logits.argmax(axis=1).tolist() == list(canary.token_ids)
    first, second = -np.sort(-logits, axis=1)[:, :2].T
    assert np.allclose(canary.gaps, first - second, atol=2e-3)
    assert canary.tolerance == canaries.FLOAT_TOLERANCE
    assert len(canary.token_ids) == canaries.TOKENS


@pytest.mark.parametrize("kv", KvName)
def test_engines_that_round_to_8_bits_get_the_wide_tolerance(tmp_path: Path, hf: Path, kv: KvName) -> None:
    config = build(hf, tmp_path / "engine", kv=kv, accuracy_level=4 if kv is KvName.FLOAT32 else 0)
    if kv is KvName.INT8 and not takes_an_int8_cache:
        assert config.canary is None
        return
    assert config.canary is not None
    assert config.canary.tolerance == canaries.ROUNDED_TOLERANCE


@pytest.mark.parametrize("seed", range(6))
def test_no_gap_lies_at_the_edge_of_the_tolerance(tmp_path: Path, seed: int) -> None:
    config = build(make_tiny_hf(tmp_path / "tiny", seed=seed), tmp_path / "engine")
    gaps = () if config.canary is None else config.canary.gaps
    assert [gap for gap in gaps if 0.8 < gap < 1.2] == []


def test_it_ends_before_the_first_gap_at_the_edge(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(hf, tmp_path / "engine")
    gaps = iter([3.0, 0.31, 1.19, 3.0])
    monkeypatch.setattr(canaries, "_choose", lambda logits: (int(logits.argmax()), next(gaps)))
    canary = record(tmp_path / "engine", config)
    assert canary is not None
    assert canary.gaps == (3.0, 0.3)


def test_where_the_first_gap_is_at_the_edge_there_is_none(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(hf, tmp_path / "engine")
    monkeypatch.setattr(canaries, "_choose", lambda logits: (0, 0.81))
    assert record(tmp_path / "engine", config) is None


def test_a_text_that_begins_with_a_token_of_its_own_has_it_in_the_canary_too(
    tmp_path: Path, hf: Path
) -> None:
    config = build(hf, tmp_path / "engine")
    begun = config.tokens.model_copy(update={"add_bos": True, "bos_id": 1})
    other = record(tmp_path / "engine", config.model_copy(update={"tokens": begun}))
    assert config.canary is not None
    assert other is not None
    assert other != config.canary


def test_a_context_too_short_for_the_answer_shortens_it_and_one_too_short_for_the_prompt_gives_none(
    tmp_path: Path, hf: Path
) -> None:
    config = build(hf, tmp_path / "engine", accuracy_level=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "engine" / "tokenizer.json"))
    prompt_tokens = len(tokenizer.encode(canaries.PROMPT).ids)

    def with_context(tokens: int) -> Canary | None:
        model = config.model.model_copy(update={"context_length": tokens})
        return record(tmp_path / "engine", config.model_copy(update={"model": model}))

    short = with_context(prompt_tokens + 3)
    assert short is not None
    assert config.canary is not None
    assert short.token_ids == config.canary.token_ids[:3]
    assert with_context(prompt_tokens) is None


def test_a_runtime_that_cannot_run_the_engine_records_none(tmp_path: Path, hf: Path) -> None:
    config = build(hf, tmp_path / "engine")
    assert record(tmp_path / "engine", config.model_copy(update={"runtime_requires": ">=99"})) is None


def test_a_build_can_do_without(tmp_path: Path, hf: Path) -> None:
    assert build(hf, tmp_path / "engine", canary=False).canary is None


def test_logits_that_are_not_finite_end_the_build() -> None:
    with pytest.raises(BuildError, match="not finite"):
        canaries._choose(np.array([1.0, np.nan], np.float32))


def test_a_canary_survives_its_json(tmp_path: Path, hf: Path) -> None:
    config = build(hf, tmp_path / "engine")
    assert EngineConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "wrong",
    [
        {"gaps": (1.0,)},
        {"gaps": (1.0, float("nan"))},
        {"gaps": (1.0, -1.0)},
        {"tolerance": 0.0},
        {"tolerance": float("inf")},
        {"token_ids": (), "gaps": ()},
        {"token_ids": (1,) * 65, "gaps": (1.0,) * 65},
        {"prompt": ""},
        {"prompt": "x" * 257},
    ],
    ids=str,
)
def test_a_canary_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"prompt": "x", "token_ids": (1, 2), "gaps": (1.0, 2.0), "tolerance": 1.0}
    Canary.model_validate(right)
    with pytest.raises(ValidationError):
        Canary.model_validate(right | wrong)
