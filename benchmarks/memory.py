"""What the worker really takes at its peak, beside the memory plan that it was granted."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.agent import AgentProcess, running_agent
from benchmarks.inputs import BuiltEngine, Inputs
from benchmarks.report import TIMES, Bound, Row
from benchmarks.streams import read_streams
from edgellm.client import Client, Constraint
from edgellm.memory import MemoryPlan
from edgellm_buildhost.recipe import QuantName

if TYPE_CHECKING:
    from typing_extensions import Self

_SAMPLE_S = 0.01
_MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """Streams that fill the KV cache to its bound, or nearly."""

    what: str
    streams: int
    prompt_tokens: int
    tokens: int
    context_tokens: int


# Prompts are cut from running text: read again alone, one may have a few tokens more.
LOADS = (
    Load("4 streams of 900 tokens", streams=4, prompt_tokens=700, tokens=200, context_tokens=912),
    Load("one prompt of 3,900 tokens", streams=1, prompt_tokens=3900, tokens=32, context_tokens=3968),
)


def worker_memory(inputs: Inputs) -> list[Row]:
    """From before the load of the engine to the last token, for each kind of load."""
    return [
        _measure(inputs, inputs.engine(precision), load)
        for precision in (QuantName.INT4, QuantName.INT8)
        for load in LOADS
    ]


def _measure(inputs: Inputs, engine: BuiltEngine, load: Load) -> Row:
    settings = {"context_tokens": load.context_tokens, "max_sequences": load.streams}
    with running_agent(inputs.cache, settings) as agent, agent.client() as client:
        client.push(engine.bundle, engine.variant.digest)
        with PeakWatch(agent) as watch:
            plan = client.activate(engine.variant.digest)
            loaded_bytes = watch.peak_bytes
            _constrain(client)
            result = read_streams(agent.target, engine.prompts(load.streams, load.prompt_tokens), load.tokens)
    granted = plan.weights_bytes + plan.workspace_bytes + plan.kv_bytes
    return Row(
        benchmark="memory",
        what=f"{engine.variant.config.precision.weights.upper()} worker's peak beside the plan, {load.what}",
        ours=f"{watch.peak_bytes / _MIB:.0f} MiB ({loaded_bytes / _MIB:.0f} when loaded)",
        peer=_words(plan, granted),
        figure=watch.peak_bytes / granted,
        unit=f"{TIMES} of the plan",
        floor=Bound(at_least=0.9, at_most=1.0),
        goal=Bound(at_least=0.95, at_most=1.0),
        settings=f"RssAnon + RssShmem at {1 / _SAMPLE_S:.0f} Hz; {sum(result.prompt_tokens)} prompt tokens, "
        f"{sum(result.completion_tokens)} generated",
    )


def _constrain(client: Client) -> None:
    """Has the worker load what constraints need; the plan counts it."""
    digits = Constraint.regex("[0-9]{4}")
    with client.generate("A year:", max_tokens=8, constraint=digits) as answer:
        for _ in answer:
            pass


def _words(plan: MemoryPlan, granted: int) -> str:
    parts = (plan.weights_bytes, plan.workspace_bytes, plan.kv_bytes)
    weights, workspace, kv = (f"{part / _MIB:.0f}" for part in parts)
    return f"{granted / _MIB:.0f} MiB (weights {weights}, workspace {workspace}, KV {kv})"


class PeakWatch:
    """Looks at the agent's workers all the time; the kernel keeps no peak of anonymous memory alone."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        """Begins."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pid: int | None = None
        while not self._stop.wait(_SAMPLE_S):
            pid = pid or self._agent.worker_pid()
            if pid is None:
                continue
            try:
                self.peak_bytes = max(self.peak_bytes, _unevictable_bytes(pid))
            except OSError:
                pid = None


def _unevictable_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
