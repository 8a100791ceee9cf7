"""Checkpoints: a model as it was published, read one tensor at a time."""

from edgellm_buildhost.checkpoint.base import (
    Architecture,
    Checkpoint,
    TokenizerFiles,
    layer_tensor,
    tensor_shapes,
)
from edgellm_buildhost.checkpoint.open import open_checkpoint

__all__ = [
    "Architecture",
    "Checkpoint",
    "TokenizerFiles",
    "layer_tensor",
    "open_checkpoint",
    "tensor_shapes",
]
