"""The quality report: how far an engine is from the model that it was made of, on a text that both read.

It is measured by the build host and travels as an attestation about the engine's manifest, so the engine's
digest stays what its files make it. Whoever reads one has it from a stranger: figures are finite and agree
with each other, texts are short and printable.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgellm.bundle.manifest import Json
from edgellm.errors import BundleError

# How far the figures of one report may be apart by rounding.
_ROUNDING = 1e-6
_MOST = 2**53  # what JSON's numbers hold exactly


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has characters that are not printable")
    return text


Text = Annotated[str, Field(min_length=1, max_length=128, strict=True), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", strict=True)]
Count = Annotated[int, Field(gt=0, le=_MOST, strict=True)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Perplexity = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]
Reference = Literal["float", "dequantized"]


class _Part(BaseModel):
    """What a newer build host says beside, an older reader passes over: the figures mean the same."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class HeldOutText(_Part):
    """The text that was read, which calibration never saw; by a name for people, and its UTF-8 bytes."""

    name: Text
    sha256: Sha256


class CalibrationText(_Part):
    """What the weights were rounded for."""

    method: Text
    """As the user asks for it: int4-awq."""
    sha256: Sha256
    """Of the calibration text's UTF-8 bytes."""


class MeasuringRuntime(_Part):
    """What computed the engine's answers."""

    name: Text
    version: Text


class QualityReport(_Part):
    """Figures over all scored tokens: those of every window but its first, which nothing precedes."""

    schema_version: Literal[1] = 1
    text: HeldOutText
    windows: Count
    """Pieces of the text, each read by itself."""
    window_tokens: Count
    tokens: Count
    """Scored: `windows * (window_tokens - 1)`."""
    reference: Reference
    """What the engine is compared with: the float checkpoint, or, where there was only a quantized one, the
    weights that its codes stand for. Both are computed in float32.
    """
    perplexity: Perplexity
    """Of the engine."""
    float_perplexity: Perplexity
    """Of the reference."""
    perplexity_increase: Annotated[float, Field(gt=-1, allow_inf_nan=False, strict=True)]
    """Relative: 0.05 is five percent more than the reference; a negative one is less."""
    perplexity_increase_stderr: Amount | None = None
    """Standard error of the increase, as another text of the kind would move it; None from one window."""
    kl_divergence: Amount
    """KL(reference || engine), nats a token, mean."""
    kl_divergence_p99: Amount
    """99 % of the tokens are below."""
    top1_agreement: Share
    """Share of tokens for which both hold the same one likeliest."""
    runtime: MeasuringRuntime
    calibration: CalibrationText | None = None
    seconds: Amount
    """That the measurement took."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> QualityReport:
        if self.window_tokens < 2 or self.tokens != self.windows * (self.window_tokens - 1):
            raise ValueError("tokens is not windows * (window_tokens - 1)")
        ratio = self.perplexity / self.float_perplexity
        if not math.isclose(1 + self.perplexity_increase, ratio, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            raise ValueError("perplexity_increase is not perplexity / float_perplexity - 1")
        return self

    @classmethod
    def checked(cls, predicate: Json) -> QualityReport:
        """A report from its JSON; raises BundleError, which names the field."""
        try:
            return cls.model_validate(predicate)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            raise BundleError(
                f"quality report: {where}: {what}" if where else f"quality report: {what}"
            ) from None

    def to_json(self) -> Json:
        """The predicate of a statement."""
        return self.model_dump(mode="json")
