"""Carries a plan out, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from edgellm.setup.plan import Step
from edgellm.setup.shell import RemoteShell, SetupError, last_words

_CHECK_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """What became of a step: it was done already, it is done now, or it is yet to be done."""

    title: str
    state: Literal["already", "done", "to do"]


def carry_out(
    shell: RemoteShell,
    steps: Iterable[Step],
    *,
    dry_run: bool = False,
    tell: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Does what is not done yet; with `dry_run` only looks. Raises SetupError at the first step that fails.

    Args:
        shell: The device.
        steps: What to do, in order.
        dry_run: Change nothing.
        tell: Hears of each step when it is over.
    """
    outcomes: list[Outcome] = []
    for step in steps:
        outcome = Outcome(step.title, _step(shell, step, dry_run=dry_run))
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


def _step(shell: RemoteShell, step: Step, *, dry_run: bool) -> Literal["already", "done", "to do"]:
    if shell.run(step.done, root=step.root, timeout_s=_CHECK_S).returncode == 0:
        return "already"
    if dry_run:
        return "to do"
    done = shell.run(step.script, root=step.root, stdin=step.stdin, timeout_s=step.timeout_s)
    if done.returncode != 0:
        raise SetupError(
            f"step failed: {step.title}: {last_words(done.stderr or done.stdout)}",
            "correct that on the device and run it again: what is done is not done twice",
        )
    return "done"
