"""How long a board is silent after its agent was started: until it answers, and until its engine does."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time

from benchmarks.agent import running_agent
from benchmarks.inputs import Inputs
from benchmarks.report import Bound, Row
from edgellm.client import Client
from edgellm.errors import EdgellmError
from edgellm_buildhost.recipe import QuantName

_LONGEST_S = 60.0


def start(inputs: Inputs) -> list[Row]:
    """From exec, with the files in the page cache; every byte is hashed before the engine is loaded."""
    engine = inputs.engine(QuantName.INT8)
    agent_s, engine_s = [], []
    with tempfile.TemporaryDirectory(prefix="start-", dir=inputs.cache) as state:
        settings = {"state_dir": state, "lifecycle": {"probation_s": 0}}
        with running_agent(inputs.cache, settings) as agent, agent.client() as client:
            client.push(engine.bundle, engine.variant.digest)
            client.activate(engine.variant.digest)
        for _ in range(inputs.rounds):
            began = time.monotonic()
            with running_agent(inputs.cache, settings) as agent:
                agent_s.append(time.monotonic() - began)
                _wait_for_an_answer(agent.target)
                engine_s.append(time.monotonic() - began)
    size = (
        f"{engine.variant.manifest.size_bytes / 1e6:.0f} MB of INT8 engine, median of {inputs.rounds} starts"
    )
    return [
        _row("agent: from exec to its first answer to GetInfo", agent_s, 1.0, size),
        _row("engine: from the agent's exec to its first token", engine_s, 3.0, size),
    ]


def _wait_for_an_answer(target: str) -> None:
    until = time.monotonic() + _LONGEST_S
    while time.monotonic() < until:
        with contextlib.suppress(EdgellmError), Client(target, timeout_s=5) as client:
            client.generate("Hello", max_tokens=1, ignore_eos=True).read()
            return
        time.sleep(0.02)
    raise RuntimeError(f"no engine answers {_LONGEST_S:.0f} s after the agent's start")


def _row(what: str, seconds: list[float], at_most: float, settings: str) -> Row:
    return Row(
        benchmark="start",
        what=what,
        ours=f"{min(seconds):.2f} to {max(seconds):.2f} s",
        peer="",
        figure=statistics.median(seconds),
        unit="s",
        floor=Bound(at_most=at_most),
        settings=settings,
    )
