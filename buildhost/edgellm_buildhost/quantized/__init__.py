"""Quantized checkpoints: written in ModelOpt's layout, read in that and in those of AWQ, GPTQ and vLLM."""

from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.quantized.open import is_quantized, open_quantized
from edgellm_buildhost.quantized.writer import CheckpointWriter, KvCacheScales

__all__ = ["CheckpointWriter", "KvCacheScales", "QuantizedCheckpoint", "is_quantized", "open_quantized"]
