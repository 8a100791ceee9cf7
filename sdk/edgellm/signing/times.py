"""Times as statements have them: UTC to the second, in one spelling (RFC 3339, "2026-11-01T00:00:00Z")."""

from __future__ import annotations

import re
from datetime import datetime, timezone

# The end of the year 9999.
MAX_S = 253_402_300_799
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def to_text(time_s: float) -> str:
    """Seconds since 1970 in words."""
    return datetime.fromtimestamp(int(time_s), timezone.utc).replace(tzinfo=None).isoformat() + "Z"


def from_text(text: object) -> int:
    """Seconds since 1970; raises ValueError for any other spelling."""
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        raise ValueError(f"not a time like 2026-11-01T00:00:00Z: {text!r:.60}")
    return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp())


def day(time_s: float) -> str:
    """The date, for people."""
    return to_text(time_s)[:10]
