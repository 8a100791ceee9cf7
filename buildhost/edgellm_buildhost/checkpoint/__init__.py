"""Checkpoints: a model as it was published, read one tensor at a time."""

from edgellm_buildhost.checkpoint.base import Checkpoint, TokenizerFiles
from edgellm_buildhost.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "TokenizerFiles", "open_checkpoint"]
