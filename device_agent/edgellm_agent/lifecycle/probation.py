"""What an engine on probation must not do."""

from __future__ import annotations

import asyncio

from edgellm_agent.engine.figures import Health
from edgellm_agent.engine.supervisor import SupervisedEngine

_POLL_S = 0.25
_DEATHS = 2
# Fewer failures may be chance, or one client's.
_FAILURES = 3


def fault(health: Health) -> str:
    """Why an engine does not pass, from what it did since its probation began; empty while it may."""
    if health.hangs:
        return "its worker hung"
    if health.deaths >= _DEATHS:
        return f"its worker died {health.deaths} times"
    answers = health.finished + health.failed
    if health.failed >= _FAILURES and 2 * health.failed > answers:
        return f"{health.failed} of {answers} requests failed"
    return ""


async def watch(engine: SupervisedEngine, probation_s: float, before: Health) -> str:
    """Watches until the time is over or the engine has failed; returns why, or nothing.

    What it did `before` does not count.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + probation_s
    while not (reason := fault(_since(before, engine.health()))):
        left_s = ends - loop.time()
        if left_s <= 0:
            # It may die again and again, too slowly to have died twice.
            return "" if engine.state == "serving" else f"it is {engine.state} at the end of its probation"
        await asyncio.sleep(min(_POLL_S, left_s))
    return reason


def _since(before: Health, now: Health) -> Health:
    return Health(
        deaths=now.deaths - before.deaths,
        hangs=now.hangs - before.hangs,
        finished=now.finished - before.finished,
        failed=now.failed - before.failed,
    )
