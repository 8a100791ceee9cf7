"""onnxruntime-genai's files: the model's own weights, dequantized to float32 and built by its own builder."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.hugging_face import shards, write_settings, write_weights
from edgellm_buildhost.checkpoint import Checkpoint, open_checkpoint

# The builder's options. Without any it rounds to nearest in groups of 32: its fastest 4-bit type.
RECIPES = {"int8": ("int8",), "int4": ("int4",), "int4 k-quant": ("int4", "algo_config=k_quant_last")}
_BUILD_S = 900


def genai_weights(model: Path, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A model folder for each recipe, made where it is missing.

    Raises RuntimeError if the builder cannot run or fails.
    """
    paths = {name: folder / f"genai-{name.replace(' ', '-')}" for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if absent:
            raise RuntimeError(f"its model builder needs {' and '.join(absent)}, which are not installed")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = Path(scratch) / "float32"
            _write_floats(open_checkpoint(model), source)
            for name in missing:
                _build(source, paths[name], RECIPES[name], Path(scratch))
    return paths


def _build(source: Path, target: Path, recipe: Sequence[str], scratch: Path) -> None:
    precision, *extra = recipe
    partial = scratch / target.name
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(partial), "-p", precision, "-e", "cpu", "-c", str(scratch)]
    command += ["--extra_options", *extra] if extra else []
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=_BUILD_S)
    if done.returncode != 0:
        raise RuntimeError(f"its model builder failed: {done.stderr[-500:]}")
    shutil.move(partial, target)


def _write_floats(checkpoint: Checkpoint, folder: Path) -> None:
    """The layout that the builder reads."""
    shape = checkpoint.architecture
    parts = shards(shape)
    floats = ({name: checkpoint.tensor(name) for name in part} for part in parts)
    write_weights(folder, floats, len(parts))
    write_settings(folder, shape, checkpoint.tokenizer, "float32")
