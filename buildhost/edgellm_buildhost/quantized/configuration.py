"""The JSON that names the form of every linear: `hf_quant_config.json`, and its copy in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from edgellm_buildhost.checkpoint.hf import QUANTIZATION
from edgellm_buildhost.quantized.forms import FP8, W4, W4_ZERO_POINT, W8, W8_ROWS, W8_ZERO_POINT, W8A8, Form
from edgellm_buildhost.quantized.modelopt import MIXED

_INT8 = {"dynamic": False, "num_bits": 8, "type": "int"}
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_KNOWN_GROUPS: Mapping[str, dict[str, Any]] = {
    W4: {"weights": {"dynamic": False, "num_bits": 4, "type": "int"}},
    W8_ROWS: {"weights": _INT8},
    W8A8: {"input_activations": _INT8, "weights": _INT8 | {"strategy": "channel"}},
    FP8: {"input_activations": _FP8, "weights": _FP8},
}


def hf_quant_config(
    forms: Mapping[str, Form], left_alone: list[str], scheme: str, kv_algorithm: str | None
) -> dict[str, Any]:
    """What nvidia-modelopt 0.47 writes for these modules; `scheme` is ours.

    One form for all modules is named once; several are MIXED_PRECISION, with an entry for each module.
    """
    different = sorted(set(forms.values()), key=lambda form: (form.algorithm, form.group_size or 0))
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": kv_algorithm}
    if len(different) == 1:
        quantization |= _entry(different[0])
    elif different:
        quantization["quant_algo"] = MIXED
        quantization["quantized_layers"] = {module: _entry(form) for module, form in forms.items()}
    quantization |= {"exclude_modules": sorted(left_alone), "scheme": scheme}
    return {"producer": {"name": "edgellm", "version": version("edgellm")}, "quantization": quantization}


def embedded(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json has of it, from what `hf_quant_config` made: nothing where all modules are floats."""
    quantization = config["quantization"]
    if quantization["quant_algo"] is None:
        return {}
    layers: Mapping[str, dict[str, Any]] = quantization.get("quantized_layers", {})
    found: dict[str, Any] = {"config_groups": _groups(quantization, layers)}
    found |= {key: quantization[key] for key in ("group_size", "quantized_layers") if key in quantization}
    found |= {"ignore": quantization["exclude_modules"], "quant_algo": quantization["quant_algo"]}
    kv_algorithm = quantization["kv_cache_quant_algo"]
    if kv_algorithm is not None:
        found["kv_cache_scheme"] = _FP8 if kv_algorithm == "FP8" else kv_algorithm
    return {QUANTIZATION: found | {"producer": config["producer"], "quant_method": "modelopt"}}


def _entry(form: Form) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": form.algorithm}
    if form.group_size is None:
        return entry
    has_zero_point = form.algorithm in {W4_ZERO_POINT, W8_ZERO_POINT}
    return entry | {"group_size": form.group_size, "has_zero_point": has_zero_point, "pre_quant_scale": False}


def _groups(quantization: Mapping[str, Any], layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Modules of one form are a group; a single group is of all linears."""
    members: dict[tuple[str, int | None], list[str]] = {}
    for module, entry in layers.items():
        members.setdefault((entry["quant_algo"], entry.get("group_size")), []).append(module)
    if not layers:
        members[quantization["quant_algo"], quantization.get("group_size")] = ["Linear"]
    groups = {}
    for index, ((algorithm, group_size), targets) in enumerate(members.items()):
        group = {
            part: dict(figures) for part, figures in _KNOWN_GROUPS.get(algorithm, _ours(algorithm)).items()
        }
        if group_size is not None:
            group["weights"]["group_size"] = group_size
        groups[f"group_{index}"] = group | {"targets": sorted(targets)}
    return groups


def _ours(algorithm: str) -> dict[str, Any]:
    bits = 8 if algorithm.startswith(W8) else 4
    return {"weights": {"dynamic": False, "num_bits": bits, "type": "int"}}
