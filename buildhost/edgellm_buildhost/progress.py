"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told the stage, and of that stage what is done, and all."""
StageProgress = Callable[[int, int], None]
"""Of one stage: told what is done, and all."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""
    del stage, done, total
