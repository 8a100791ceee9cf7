"""What is attached to an engine of its quality report: an unsigned envelope, as for its provenance."""

from __future__ import annotations

from edgellm.bundle.quality import QualityReport
from edgellm.signing import Envelope, Statement
from edgellm.signing.statements import QUALITY_TYPE


def envelope(engine: str, digest: str, report: QualityReport) -> bytes:
    """The report about the engine of that name and manifest digest; `edgellm sign` has a key stand for it."""
    return Envelope(Statement(engine, digest, QUALITY_TYPE, report.to_json()).to_json()).to_json()
