"""The families of models: each file turns the config.json of one family into an `Architecture`."""

from __future__ import annotations

from collections.abc import Callable

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families import gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3

_FAMILIES = (llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3)
_BY_MODEL_TYPE: dict[str, Callable[[Settings], Architecture]] = {
    name: family.architecture for family in _FAMILIES for name in family.MODEL_TYPES
}
MODEL_TYPES = tuple(_BY_MODEL_TYPE)
"""Every `model_type` that can be built."""


def read_architecture(config: Settings) -> Architecture:
    """The decoder that a config.json describes.

    Raises BuildError naming the file and the field that is missing, wrong or not supported.
    """
    model_type = config.get("model_type")
    read = _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if read is None:
        raise config.error(
            "model_type",
            f"{model_type!r} is not supported",
            f"choose a model of the types {', '.join(MODEL_TYPES)} (SmolLM2 is of the first)",
        )
    return read(config)
