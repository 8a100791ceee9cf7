"""NVIDIA ModelOpt's quantization of a Hugging Face directory, as a float model that computes the same.

Runs as a program of its own, since it needs torch and keeps the whole model in memory. A linear of ModelOpt
multiplies its input by the channels' scale and then by the rounded matrix; both are put into one float matrix
here, so that every side's weights are read by the same program.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

METHODS = {
    "int4-awq": "INT4_AWQ_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}


def quantize(directory: Path, windows: Path, method: str, group_size: int) -> Any:
    """ModelOpt's model after calibration on the windows, an .npy file of ids [count, tokens]."""
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
    import torch  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.from_numpy(np.load(windows))

    def read(quantized: Any) -> None:
        with torch.no_grad():
            for window in ids:
                quantized(window[None])

    return mtq.quantize(model, _settings(mtq, method, group_size), read)


def _settings(mtq: Any, method: str, group_size: int) -> Any:
    settings = copy.deepcopy(getattr(mtq, METHODS[method]))
    for rule in _rules(settings["quant_cfg"]):
        if "block_sizes" in rule:
            rule["block_sizes"][-1] = group_size
    return settings


def _rules(settings: Any) -> Iterator[Any]:
    """All objects in a nest of lists and objects."""
    if isinstance(settings, dict):
        yield settings
        for value in settings.values():
            yield from _rules(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _rules(value)


def write_floats(model: Any, directory: Path, target: Path) -> None:
    """The function of `model` as a float Hugging Face directory, settings and tokenizer from `directory`."""
    import torch  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None:
                continue
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                weight = quantizer(weight)
                scale = getattr(module.input_quantizer, "pre_quant_scale", None)
                weight = weight if scale is None else weight * scale
            tensors[f"{name}.weight"] = weight.float().contiguous().clone()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((directory / name).read_bytes())


def linear_bytes(exported: Path) -> int:
    """Bytes of the layers' matrices and scales in ModelOpt's own checkpoint."""
    from safetensors import safe_open  # noqa: PLC0415

    total = 0
    for path in exported.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys() if "_proj." in name)  # noqa: SIM118
            total += sum(tensor.nbytes for tensor in tensors)
    return total


def main() -> int:
    """Quantizes, and writes the floats, or ModelOpt's own checkpoint, or both."""
    parser = argparse.ArgumentParser(prog="quality_modelopt.py", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("windows", type=Path, metavar="WINDOWS.npy")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--floats", type=Path, metavar="DIR")
    parser.add_argument("--export", type=Path, metavar="DIR")
    options = parser.parse_args()
    began = time.perf_counter()
    model = quantize(options.directory, options.windows, options.method, options.group_size)
    print(f"{time.perf_counter() - began:.1f}")
    if options.floats is not None:
        write_floats(model, options.directory, options.floats)
    if options.export is not None:
        from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

        export_hf_checkpoint(model, export_dir=options.export)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (options.export / name).write_bytes((options.directory / name).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
