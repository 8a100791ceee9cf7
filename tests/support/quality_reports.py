"""A quality report as a build attaches it."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, Any] = {
    "schema_version": 1,
    "text": {"name": "the Python language reference", "sha256": "ab" * 32},
    "windows": 16,
    "window_tokens": 256,
    "tokens": 4080,
    "reference": "float",
    "perplexity": 13.65,
    "float_perplexity": 13.0,
    "perplexity_increase": 0.05,
    "perplexity_increase_stderr": 0.004,
    "kl_divergence": 0.0312,
    "kl_divergence_p99": 0.31,
    "top1_agreement": 0.912,
    "runtime": {"name": "onnxruntime", "version": "1.32.0"},
    "calibration": {"method": "int4-awq", "sha256": "cd" * 32},
    "seconds": 21.4,
}
