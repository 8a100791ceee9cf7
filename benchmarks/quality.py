"""What quantization costs in quality: ours, llama.cpp's and ModelOpt's on the same weights and text."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import quality_gguf, quality_llama, quality_modelopt, quality_ours
from benchmarks.inputs import Inputs
from benchmarks.llama_graph import LlamaGraph, start_backend
from benchmarks.peak_memory import PeakMemory, peak_memory
from benchmarks.quality_figures import Figures, Reference
from benchmarks.quality_gguf import Sizes
from benchmarks.quality_model import write_in_basis
from benchmarks.quality_table import Entry, contests, to_markdown
from benchmarks.report import Row, Skipped
from edgellm_agent.runtimes.base import EngineLoadError
from edgellm_buildhost.architecture import LINEARS
from edgellm_buildhost.build import WINDOW_TOKENS
from edgellm_buildhost.build import WINDOWS as CALIBRATION_WINDOWS
from edgellm_buildhost.calibration.text import calibration_text, held_out_text, windows
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.checkpoint.open import open_checkpoint

_WINDOWS_PER_ROUND = 2
_QUANTIZE_S = 1800
# Once more with embedding and head as large as ours, so that the layers alone make the difference.
_WITH_OUR_TABLES = ("Q4_0", "Q4_K_M")


def tilted(inputs: Inputs) -> list[Row | Skipped]:
    """On weights whose channels are as different as they were published."""
    return _quality(inputs, "quality", "tilted")


def rotated(inputs: Inputs) -> list[Row | Skipped]:
    """On weights whose channels were mixed evenly: whether the order of the methods stays."""
    return _quality(inputs, "quality-rotated", "rotated")


@dataclass(frozen=True)
class _Bench:
    """One model in one basis, its float reference and a folder for what the sides make of it."""

    original: Path
    source: Path
    float_gguf: Path
    folder: Path
    reference: Reference
    layer_weights: int

    def run(self, program: str, *arguments: object) -> PeakMemory:
        """A side's program, in a process of its own."""
        command = [sys.executable, "-m", f"benchmarks.{program}", *map(str, arguments)]
        return peak_memory(command, timeout_s=_QUANTIZE_S, folder=self.folder).check(program)

    def entry(self, name: str, sizes: Sizes, figures: Figures, peak: PeakMemory | None) -> Entry:
        """A line of the table."""
        print(f"  {name}: KL {figures.kl_mean:.4f}", file=sys.stderr, flush=True)
        return Entry(
            name=name,
            file_bytes=sizes.file_bytes,
            linear_bytes=sizes.linear_bytes,
            bits_per_weight=8 * sizes.linear_bytes / self.layer_weights,
            figures=figures,
            seconds=peak.seconds if peak is not None else None,
            peak_bytes=peak.unevictable_bytes if peak is not None else None,
        )


def _quality(inputs: Inputs, benchmark: str, basis: str) -> list[Row | Skipped]:
    start_backend()
    inputs.cache.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    with _bench(inputs, basis) as bench:
        entries.append(_float(bench))
        for name, measure in _ways(bench).items():
            print(f"  {name} ...", file=sys.stderr, flush=True)
            try:
                entries += measure()
            except (
                RuntimeError,
                ImportError,
                EngineLoadError,
            ) as error:  # the others can be compared without it
                skipped.append(Skipped(benchmark, name, str(error)))
    entries.sort(key=lambda entry: entry.file_bytes or sys.maxsize)
    print(f"{to_markdown(basis, entries)}\n")
    (inputs.cache / f"{benchmark}.json").write_text(
        json.dumps([asdict(e) for e in entries], indent=1), "utf-8"
    )
    return [*contests(benchmark, basis, entries), *skipped]


def _ways(bench: _Bench) -> dict[str, Callable[[], Iterable[Entry]]]:
    """Every way to quantize, by name."""
    found: dict[str, Callable[[], Iterable[Entry]]] = {}
    for kind in quality_llama.TYPES:
        found[f"llama.cpp {kind}"] = partial(_llama, bench, kind, None)
    for kind in _WITH_OUR_TABLES:
        found[f"llama.cpp {kind}, tables Q8_0"] = partial(_llama, bench, kind, "Q8_0")
    for method in quality_ours.NAMES:
        found[f"edgellm {method}"] = partial(_ours, bench, method)
    for method in quality_modelopt.METHODS:
        found[f"ModelOpt {method}"] = partial(_modelopt, bench, method)
    return found


@contextlib.contextmanager
def _bench(inputs: Inputs, basis: str) -> Iterator[_Bench]:
    checkpoint = open_checkpoint(inputs.model)
    count = _WINDOWS_PER_ROUND * inputs.rounds
    held_out = windows(checkpoint.tokenizer, held_out_text(), count, WINDOW_TOKENS)
    with tempfile.TemporaryDirectory(dir=inputs.cache, prefix="quality-") as name:
        folder = Path(name)
        source, float_gguf = folder / "model", folder / "F32.gguf"
        write_in_basis(checkpoint, basis, source)
        quality_gguf.float_gguf_of(source, inputs.model, float_gguf)
        with contextlib.closing(LlamaGraph(float_gguf)) as model:
            reference = Reference(folder / "reference", model, held_out)
        calibration = windows(checkpoint.tokenizer, calibration_text(), CALIBRATION_WINDOWS, WINDOW_TOKENS)
        np.save(folder / "calibration.npy", calibration)
        with reference:
            yield _Bench(inputs.model, source, float_gguf, folder, reference, _layer_weights(checkpoint))


def _layer_weights(checkpoint: Checkpoint) -> int:
    shape = checkpoint.architecture
    return shape.layers * sum(int(np.prod(shape.linear_shape(part))) for part in LINEARS)


def _float(bench: _Bench) -> Entry:
    """What the figures are measured from, and its own perplexity."""
    figures = _read_gguf(bench, bench.float_gguf)
    return bench.entry("float32", quality_gguf.sizes(bench.float_gguf), figures, None)


def _read_gguf(bench: _Bench, path: Path) -> Figures:
    with contextlib.closing(LlamaGraph(path)) as model:
        return bench.reference.compare(model)


def _llama(bench: _Bench, kind: str, tables: str | None) -> Iterator[Entry]:
    path = bench.folder / "quantized.gguf"
    extra = ["--tables", tables] if tables is not None else []
    peak = bench.run("quality_llama", bench.float_gguf, path, kind, *extra)
    name = f"llama.cpp {kind}" + (f", tables {tables}" if tables is not None else "")
    yield bench.entry(name, quality_gguf.sizes(path), _read_gguf(bench, path), peak)


def _ours(bench: _Bench, method: str) -> Iterator[Entry]:
    with _fresh(bench.folder / "ours") as folder:
        peak = bench.run("quality_ours", bench.source, method, folder)
        with contextlib.closing(quality_ours.load(folder)) as model:
            figures = bench.reference.compare(model)
        sizes = quality_ours.sizes(folder)
        yield bench.entry(f"edgellm {method}", sizes, figures, peak)
        if method in quality_ours.WEIGHTS_ONLY:
            path = bench.folder / "quantized.gguf"
            quality_ours.write_weights_only(folder, bench.original, path)
            sizes = Sizes(0, sizes.linear_bytes)
            yield bench.entry(f"edgellm {method}, weights only", sizes, _read_gguf(bench, path), None)


def _modelopt(bench: _Bench, method: str) -> Iterator[Entry]:
    """Its weights as floats, read by the program that reads the float model: inputs are not rounded."""
    if importlib.util.find_spec("modelopt") is None:
        raise ImportError("it needs torch and nvidia-modelopt; scripts/bench_env.sh says how to get them")
    with _fresh(bench.folder / "modelopt") as folder:
        floats, exported = folder / "floats", folder / "exported"
        options = ["--floats", floats, "--export", exported]
        peak = bench.run("quality_modelopt", bench.source, bench.folder / "calibration.npy", method, *options)
        path = bench.folder / "quantized.gguf"
        quality_gguf.float_gguf_of(floats, bench.original, path)
        sizes = Sizes(0, quality_modelopt.linear_bytes(exported))
        yield bench.entry(f"ModelOpt {method}, weights only", sizes, _read_gguf(bench, path), peak)


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A place for what is made, which is removed behind it whatever happens."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
