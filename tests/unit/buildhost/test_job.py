"""`edgellm build` and `edgellm quantize` as commands: what they refuse, measure, attach and repeat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from edgellm.bundle import Bundle, EngineConfig
from edgellm.cli.main import app
from edgellm_buildhost import job as jobs
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.sources import unquantized_bytes
from edgellm_buildhost.job import open_source
from tests.support.tiny_models import make_tiny_hf

CALIBRATED = ("int4-awq", "int4-gptq", "int8-smoothquant")
BUDGET = ("--quant", "auto", "--budget-bytes")
QUANTS = [*(("--quant", name) for name in ("int4", "int8", *CALIBRATED)), (*BUDGET, "400000")]
LAST = "model.layers.1.mlp.down_proj.weight"
PLAIN = ("--no-report", "--no-canary")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows to calibrate with, and more to measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"The engine reads line {number} of them." for number in range(60)))
    return path


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout, result.stderr


def built(source: Path, target: Path, *options: object) -> dict[str, Any]:
    code, output, errors = run("build", source, "-o", target, "--json", *options)
    assert code == 0, errors
    Bundle.open(target).verify()
    return dict(json.loads(output))


def weights(target: Path) -> dict[str, tuple[str, int]]:
    """Digest and size of each weight file."""
    layers = Bundle.open(target).variants[0].manifest.layers
    return {item.title: (item.digest, item.size_bytes) for item in layers if item.title.endswith(".bin")}


def inspected(target: Path) -> dict[str, Any] | None:
    """The quality report that `edgellm inspect` shows."""
    code, output, errors = run("inspect", target, "--json")
    assert code == 0, errors
    (engine,) = json.loads(output)["engines"]
    return next((item["quality"] for item in engine["attestations"] if item.get("quality")), None)


def refused(home: Path, out: Path, *arguments: object) -> str:
    """The message of a command that fails for what it was given, and leaves nothing."""
    code, output, errors = run(*arguments)
    assert (code, output) == (1, "")
    message, step = errors.rstrip("\n").split("\n  try: ")
    assert message.startswith("error: ")
    assert "\n" not in message + step
    assert list(out.iterdir()) == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
    return message


# What is wrong with a source


def damage(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def configure(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[LAST] = tensors[LAST].copy()
        tensors[LAST][3, 5] = value

    return lambda source: damage(source, change)


def cut_a_shard(source: Path) -> None:
    make_tiny_hf(source, shards=3)
    (source / "model.safetensors").unlink()
    (source / "model-00002-of-00003.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a NaN": (spoil(np.nan), LAST),
    "an infinity": (spoil(np.inf), LAST),
    "a missing tensor": (lambda source: damage(source, lambda found: found.pop(LAST)), LAST),
    "another shape": (
        lambda source: damage(source, lambda found: found.update({LAST: found[LAST][:, :-32].copy()})),
        LAST,
    ),
    "a missing shard": (cut_a_shard, "model-00002-of-00003.safetensors"),
    "an unknown rope": (
        lambda source: configure(source, rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        "spiral",
    ),
}


@pytest.mark.parametrize("method", ["int4", "int4-gptq"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_source_is_one_error_that_names_the_place_and_nothing_is_left(
    kind: str, method: str, source: Path, text: Path, out: Path, home: Path
) -> None:
    change, named = DAMAGES[kind]
    change(source)
    calibration = () if method == "int4" else ("--calibration", text)
    message = refused(home, out, "build", source, "--quant", method, *calibration, "-o", out / "a.bundle")
    assert named in message


@pytest.mark.parametrize("kind", ["a NaN", "a missing tensor"])
def test_a_bad_source_leaves_nothing_beside_a_quantized_checkpoint(
    kind: str, source: Path, text: Path, out: Path, home: Path
) -> None:
    DAMAGES[kind][0](source)
    options = ("--quant", "int4-gptq", "--calibration", text)
    assert LAST in refused(home, out, "quantize", source, *options, "-o", out / "q")


# What is wrong with a request is known before the work


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer may be read."""

    def read(*_: object) -> None:
        raise AssertionError("the work has begun")

    for name in ("build_engine", "quantize"):
        monkeypatch.setattr(jobs, name, read)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (BUDGET[:2], "--budget-bytes goes with --quant auto"),
        (("--quant", "int4", "--budget-bytes", "400000"), "--budget-bytes goes with --quant auto"),
        (("--quant", "fp8"), "--quant fp8"),
        (("--quant", "int4-gptq", "--group-size", "48"), "--group-size 48"),
        (("--name", "Bad Name"), "--name 'Bad Name'"),
        (("--name", "../../elsewhere"), "--name '../../elsewhere'"),
        (("--quant", "int4-gptq", "--calibration", "/absent"), "/absent: no such file"),
        (("--report", "--held-out", "/absent"), "/absent: no such file"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_the_work(
    options: tuple[str, ...], named: str, tiny: Path, out: Path, home: Path
) -> None:
    assert named in refused(home, out, "build", tiny, *options, "-o", out / "a.bundle")


@pytest.mark.usefixtures("idle")
def test_a_held_out_text_that_is_too_short_is_refused_before_the_work(
    tiny: Path, tmp_path: Path, out: Path, home: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("zyx")
    command = ("build", tiny, "--quant", "int4-gptq", "--held-out", short, "-o", out / "a.bundle")
    assert "short.txt: 3 tokens, a window has 256" in refused(home, out, *command)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("value", ["-0.1", "much", "-inf", "nan"])
def test_a_limit_that_is_no_share_is_refused_before_the_work(value: str, tiny: Path, out: Path) -> None:
    code, _, errors = run("build", tiny, f"--max-perplexity-increase={value}", "-o", out / "a.bundle")
    assert code in {1, 2}  # older typers let what is no number pass
    assert "--max-perplexity-increase" in errors
    assert list(out.iterdir()) == []


@given(st.text(max_size=140) | st.from_regex(r"[a-zA-Z0-9._-]{1,140}", fullmatch=True))
def test_a_name_is_refused_exactly_if_an_engine_cannot_have_it(name: str) -> None:
    fields = EngineConfig.__pydantic_validator__
    try:
        fields.validate_assignment(EngineConfig.model_construct(), "name", name)
    except ValidationError:
        with pytest.raises(BuildError):
            jobs._check_name(name)
    else:
        jobs._check_name(name)


def test_a_calibration_text_shorter_than_a_window_is_refused_with_both_lengths(
    tiny: Path, tmp_path: Path, out: Path, home: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("zyx")
    options = ("--quant", "int4-gptq", "--calibration", short, "--no-report")
    message = refused(home, out, "build", tiny, *options, "-o", out / "a.bundle")
    assert "short.txt: 3 tokens, a window has 512" in message


# The report


@pytest.fixture
def measured(text: Path) -> tuple[object, ...]:
    return ("--held-out", text, "--no-canary")


def test_a_calibrated_engine_has_a_report_that_inspect_shows(
    tiny: Path, text: Path, measured: tuple[object, ...], out: Path
) -> None:
    told = built(tiny, out / "a.bundle", "--quant", "int4-gptq", "--calibration", text, *measured)
    shown = inspected(out / "a.bundle")
    assert shown is not None
    assert shown["calibration"]["method"] == "int4-gptq"
    assert shown["perplexity"] == told["quality"]["perplexity"]
    _, for_people, _ = run("inspect", out / "a.bundle")
    assert "perplexity" in for_people


@pytest.mark.parametrize(
    ("options", "has"),
    [
        (("--quant", "int4", "--report"), True),
        (("--quant", "int4"), False),
        (("--quant", "int4-gptq", "--no-report"), False),
    ],
)
def test_a_report_is_made_when_asked_for(
    options: tuple[str, ...], has: bool, tiny: Path, measured: tuple[object, ...], out: Path
) -> None:
    held_out = measured if has else ("--no-canary",)
    told = built(tiny, out / "a.bundle", *options, *held_out)
    assert (inspected(out / "a.bundle") is not None) is has
    assert (told["quality"] is not None) is has


def test_a_report_does_not_change_the_engine_s_digest(
    tiny: Path, measured: tuple[object, ...], out: Path
) -> None:
    digests = {
        built(tiny, out / "a.bundle", "--quant", "int4", *options)["digest"]
        for options in (("--report", *measured), ("--no-canary",))
    }
    assert len(digests) == 1


def test_an_engine_that_lost_more_than_allowed_fails_with_figures_and_its_weights_are_kept(
    tmp_path: Path, measured: tuple[object, ...], out: Path, home: Path
) -> None:
    source = make_tiny_hf(tmp_path / "lossy", seed=1)
    report = built(source, out / "a.bundle", "--quant", "int4", "--report", *measured)["quality"]
    increase = report["perplexity_increase"]
    assert increase > 0.1
    shutil.rmtree(out / "a.bundle")
    shutil.rmtree(home)
    limited = ("--quant", "int4", *measured, "--max-perplexity-increase")
    command = ("build", source, "-o", out / "a.bundle", *limited)
    code, output, message = run(*command, increase - 0.01)
    assert (code, output, list(out.iterdir())) == (1, "", [])
    (shard,) = home.rglob("model-00001-*.safetensors")
    shard.write_bytes(b"")  # a second run would make it anew, and go on; one that takes it as it is cannot
    assert run(*command, increase + 0.01)[0] == 1
    shutil.rmtree(home)
    assert f"perplexity rises from {report['float_perplexity']:.4g} to {report['perplexity']:.4g}" in message
    assert f"allows {100 * (increase - 0.01):.3g} %" in message
    assert built(source, out / "a.bundle", *limited, increase + 0.01)["quality"] is not None


# Two ways to one engine, and the same way twice


@pytest.mark.parametrize("options", QUANTS, ids=lambda options: options[1])
def test_a_checkpoint_quantized_first_gives_the_weights_of_a_build_at_once(
    options: tuple[str, ...], tiny: Path, text: Path, out: Path
) -> None:
    calibration = () if options[1] in {"int4", "int8"} else ("--calibration", text)
    code, _, errors = run("quantize", tiny, "-o", out / "q", *options, *calibration)
    assert code == 0, errors
    assert open_source(out / "q").architecture.layers == 2
    first = built(out / "q", out / "a.bundle", *PLAIN)
    second = built(tiny, out / "b.bundle", *options, *calibration, *PLAIN)
    assert weights(out / "a.bundle") == weights(out / "b.bundle")
    assert first["config"]["precision"] == second["config"]["precision"]


@pytest.mark.parametrize("options", QUANTS, ids=lambda options: options[1])
def test_builds_in_two_places_give_one_digest(
    options: tuple[str, ...],
    tiny: Path,
    text: Path,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = () if options[1] in {"int4", "int8"} else ("--calibration", text)
    digests = set()
    for place in ("one", "two"):
        monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / place / "home"))
        where = Path(shutil.copytree(tiny, tmp_path / place / "tiny"))
        digests.add(built(where, tmp_path / place / "a.bundle", *options, *calibration)["digest"])
    assert len(digests) == 1


# Roundings within a budget


def least_bytes(tiny: Path) -> int:
    """Tables and vectors of the tiny model, and its linears at 4 bits in groups of 64 (symmetric)."""
    architecture = open_source(tiny).architecture
    weights = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128)
    return unquantized_bytes(architecture) + weights // 2 + weights // 64 * 4


def test_more_bytes_never_give_a_smaller_engine(tiny: Path, text: Path, out: Path) -> None:
    least = least_bytes(tiny)
    sizes = []
    for extra in (0, 40_000, 120_000):
        built(tiny, out / "a.bundle", *BUDGET, least + extra, "--calibration", text, *PLAIN)
        sizes.append(sum(size for _, size in weights(out / "a.bundle").values()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("extra", [0, 9_000, 60_000])
def test_the_weight_files_take_no_more_than_the_budget(extra: int, tiny: Path, text: Path, out: Path) -> None:
    budget = least_bytes(tiny) + extra
    built(tiny, out / "a.bundle", *BUDGET, budget, "--calibration", text, *PLAIN)
    assert sum(size for _, size in weights(out / "a.bundle").values()) <= budget


@pytest.mark.parametrize("missing", [1, 1_000])
def test_a_budget_that_is_too_small_is_refused_with_the_bytes_it_lacks(
    missing: int, tiny: Path, text: Path, out: Path, home: Path
) -> None:
    budget = least_bytes(tiny) - missing
    command = ("build", tiny, *BUDGET, budget, "--calibration", text, *PLAIN)
    message = refused(home, out, *command, "-o", out / "a.bundle")
    assert f"--budget-bytes {budget:,} is {missing:,} bytes too little" in message


def test_a_budget_far_too_small_is_refused_with_all_the_bytes_it_lacks(
    tiny: Path, text: Path, out: Path, home: Path
) -> None:
    command = ("build", tiny, *BUDGET, 1, "--calibration", text, *PLAIN, "-o", out / "a.bundle")
    assert f"--budget-bytes 1 is {least_bytes(tiny) - 1:,} bytes too little" in refused(home, out, *command)
