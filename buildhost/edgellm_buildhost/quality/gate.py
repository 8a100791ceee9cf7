"""Ends a build whose engine has lost more than the user allows."""

from __future__ import annotations

from edgellm.bundle.quality import QualityReport
from edgellm_buildhost.errors import BuildError, UnwantedError

OPTION = "--max-perplexity-increase"
_FINER = "build with --grid zero-point --group-size 32, with --quant auto, or with --quant int8"
_NEXT = {
    "int4": "build with --quant int4-gptq, or with --quant int8",
    "int4-awq": "build with --quant int4-gptq, or with --quant int8",
    "int4-gptq": _FINER,
    "int8-smoothquant": "build with --quant int8, whose activations are rounded in smaller groups",
    "auto": "give it more --budget-bytes, or build with --quant int8",
}
_ANY = f"calibrate with a text like those that the engine will read, or allow more with {OPTION}"


def check_limit(limit: float) -> None:
    """Raises BuildError for a limit that is none; to be asked before anything is built."""
    if not limit >= 0:  # also for what is not a number, with which any comparison is false
        raise BuildError(
            f"{OPTION} is {limit}, not a share like 0.05", "give the share of 0 or more to allow"
        )


def check_increase(report: QualityReport, limit: float, quant: str) -> None:
    """Raises UnwantedError with the figures if the perplexity rose by more than `limit`, a share like 0.05.

    The measured increase counts, not its margin: who wants room for that allows it. `quant` is the method
    as the user asked for it, for the next step.
    """
    check_limit(limit)
    if report.perplexity_increase <= limit:
        return
    stderr = report.perplexity_increase_stderr
    margin = "" if stderr is None else f" (standard error {100 * stderr:.2g} %)"
    raise UnwantedError(
        f"perplexity rises from {report.float_perplexity:.4g} to {report.perplexity:.4g} on"
        f" {report.tokens:,} tokens, by {100 * report.perplexity_increase:.3g} %{margin};"
        f" {OPTION} allows {100 * limit:.3g} %",
        _NEXT.get(quant, _ANY),
    )
