"""Opens a quantized checkpoint, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgellm_buildhost.checkpoint.hf import CONFIG_FILE, MODELOPT_FILE, QUANTIZATION
from edgellm_buildhost.checkpoint.hf_tokenizer import read_tokenizer
from edgellm_buildhost.checkpoint.open import quantized_by
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.families import read_architecture
from edgellm_buildhost.quantized.awq import AwqLayout
from edgellm_buildhost.quantized.compressed import CompressedLayout
from edgellm_buildhost.quantized.gptq import GptqLayout
from edgellm_buildhost.quantized.layout import Layout
from edgellm_buildhost.quantized.modelopt import ModelOptLayout
from edgellm_buildhost.quantized.stored_checkpoint import StoredCheckpoint

_LAYOUTS: Mapping[str, type[Layout]] = {
    "modelopt": ModelOptLayout,
    "awq": AwqLayout,
    "gptq": GptqLayout,
    "compressed-tensors": CompressedLayout,
}


def is_quantized(directory: Path) -> bool:
    """Whether a Hugging Face directory says that it is quantized; raises BuildError as `quantized_by`."""
    return quantized_by(directory) is not None


def open_quantized(directory: Path) -> StoredCheckpoint:
    """Read and check the metadata of a quantized checkpoint in one of the layouts.

    Raises BuildError naming the file and field, or the tensor.
    """
    config = Settings.read(directory / CONFIG_FILE)
    method, settings = _quantization(directory, config)
    files = TensorFiles(directory)
    layout = _LAYOUTS[method](files, settings)
    architecture = read_architecture(config)
    return StoredCheckpoint(directory, architecture, read_tokenizer(directory, config), files, layout)


def _quantization(directory: Path, config: Settings) -> tuple[str, Settings]:
    """The name of the layout, and the settings that belong to it.

    ModelOpt's own file says more than what it puts into config.json: it has the group size.
    """
    own_file = directory / MODELOPT_FILE
    if own_file.is_file():
        settings = Settings.read(own_file)
        section = settings.section("quantization")
        if section is None:
            raise settings.wrong("quantization", "an object")
        return "modelopt", section
    embedded = config.section(QUANTIZATION)
    if embedded is None:
        raise BuildError(f"{config.path}: the checkpoint is not quantized", "build it as a float checkpoint")
    method = embedded.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        raise embedded.error(
            "quant_method",
            f"{method!r} is not read",
            f"read: {', '.join(_LAYOUTS)}; choose another checkpoint, or build from the unquantized one",
        )
    return method, embedded
