"""Ten minutes of what clients do to a device: `make soak`.

Random arrivals, lengths, cancels, deadlines, disconnects and memory pressure against a real agent, and a
verdict: every request ends once, its text is the one that it has alone, the KV cache comes back, and the
worker's memory stays flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.bundle import Bundle
from edgellm.client import AsyncClient, Sampling
from edgellm.errors import RemoteError
from tests.support.agents import Agent, running_agent

# With 8-bit activations another partition of the same steps moves the logits of this model by up to 0.73
# (random tokens, ragged batches against each row alone); float32 by 3e-5.
TOLERANCE = 0.75
_CONTEXT = 1024
_FULL, _SHORT = 1 << 34, 64 << 20
_SETTINGS = f"""
context_tokens = {_CONTEXT}
max_sequences = 6
max_waiting = 24
"""


@dataclass
class Reference:
    """A prompt, its greedy answer alone, and by how much each token beat the next best, in logits."""

    prompt: str
    tokens: list[int]
    margins: list[float]


@dataclass
class Verdict:
    """What was seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    diverged: int = 0
    compared_tokens: int = 0
    rss: list[tuple[float, int]] = field(default_factory=list)

    def compare(self, reference: Reference, tokens: list[int]) -> None:
        """An answer, or the part of one that came, against the answer alone."""
        for i, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=False)):
            self.compared_tokens += 1
            if ours != theirs:
                self.diverged += 1
                if reference.margins[i] > TOLERANCE:
                    self.wrong.append(
                        f"token {i} of {reference.prompt[:30]!r}: margin {reference.margins[i]:.2f}"
                    )
                return


class Kernel:
    """The /proc that the agent sees."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/pressure").mkdir(parents=True)
        self.say(_FULL)

    def say(self, available_bytes: int) -> None:
        text = f"MemTotal: {_FULL // 1024} kB\nMemAvailable: {available_bytes // 1024} kB\n"
        new = self.root / "proc/meminfo.new"
        new.write_text(text)
        new.replace(self.root / "proc/meminfo")


async def reference(client: AsyncClient, prompt: str) -> Reference:
    tokens: list[int] = []
    margins: list[float] = []
    async with client.generate(prompt, max_tokens=150, ignore_eos=True, top_logprobs=2) as answer:
        async for chunk in answer:
            tokens.extend(chunk.token_ids)
            margins.extend(lp.top[0].logprob - lp.top[1].logprob for lp in chunk.logprobs)
    return Reference(prompt, tokens, margins)


async def one(client: AsyncClient, rng: random.Random, known: list[Reference], verdict: Verdict) -> None:
    """One request of a random kind, to one of its possible ends."""
    kind = rng.choices(["whole", "cancel", "deadline", "slow", "sampled", "invalid"], [50, 15, 10, 5, 15, 5])[
        0
    ]
    ref = rng.choice(known)
    wanted = rng.randint(1, len(ref.tokens))
    options: dict[str, object] = {"max_tokens": wanted, "ignore_eos": True}
    if kind == "sampled":
        options["sampling"] = Sampling(temperature=1.0, top_p=0.9, seed=rng.randrange(1000))
    if kind == "deadline":
        options["timeout_s"] = rng.uniform(0.01, 1.0)
    if kind == "invalid":
        options["sampling"] = Sampling(temperature=-1.0)
    tokens: list[int] = []
    leave_after = rng.randint(1, wanted) if kind == "cancel" else wanted + 1
    try:
        async with client.generate(ref.prompt, **options) as answer:  # type: ignore[arg-type]
            async for chunk in answer:
                tokens.extend(chunk.token_ids)
                if kind == "slow":
                    await asyncio.sleep(0.2)
                if len(tokens) >= leave_after:
                    break
            else:
                if answer.completion.completion_tokens != len(tokens) or len(tokens) != wanted:
                    verdict.wrong.append(f"{len(tokens)} tokens came of {wanted}")
        verdict.outcomes["left" if len(tokens) >= leave_after else "finished"] += 1
    except RemoteError as error:
        verdict.outcomes[error.code] += 1
        expected = {"deadline": "DEADLINE_EXCEEDED", "invalid": "INVALID_ARGUMENT"}.get(kind)
        if error.code not in (expected, "RESOURCE_EXHAUSTED"):
            verdict.wrong.append(f"{kind}: {error.code} {error}")
    if kind != "sampled":
        verdict.compare(ref, tokens)


async def traffic(agent: Agent, kernel: Kernel, seconds: float, seed: int) -> Verdict:
    rng, verdict = random.Random(seed), Verdict()
    words = ["robot", "gripper", "battery", "valve", "camera", "torque", "lidar", "arm"]
    prefix = " ".join(words * 20)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(agent.target, client_id=f"app-{i}")) for i in range(4)
        ]
        prompts = [f"{prefix * (i % 3)} {i}: the {words[i % 8]} said" for i in range(12)]
        known = [await reference(clients[0], prompt) for prompt in prompts]
        running: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            # A burst now and then, so that the queue fills; and memory that comes and goes.
            for _ in range(rng.choices([1, 40], [99, 1])[0]):
                task = asyncio.create_task(one(rng.choice(clients), rng, known, verdict))
                running.add(task)
                task.add_done_callback(running.discard)
            kernel.say(_SHORT if int(now / 20) % 3 == 2 else _FULL)
            await asyncio.sleep(rng.expovariate(4.0))
            if now >= len(verdict.rss):
                runtime = await record(clients[0])
                verdict.rss.append((now, runtime.worker_rss_bytes))
        kernel.say(_FULL)
        done, hung = await asyncio.wait(running, timeout=120) if running else (set(), set())
        for task in done:
            task.result()
        verdict.wrong.extend("a request never ended" for _ in hung)
        deadline = time.monotonic() + 10
        runtime = await record(clients[0])
        while runtime.running_sequences and time.monotonic() < deadline:
            runtime = await record(clients[0])
        if runtime.kv_used_bytes != runtime.kv_cached_bytes or runtime.running_sequences:
            verdict.wrong.append(f"left over: {runtime}")
        if runtime.worker_restarts_total:
            verdict.wrong.append(f"the worker died {runtime.worker_restarts_total} times")
    return verdict


async def record(client: AsyncClient):
    async for telemetry in client.watch_telemetry():
        return telemetry.runtime
    raise AssertionError("no telemetry")


def growth(rss: list[tuple[float, int]]) -> float:
    """Highest memory in the last third over the highest before, beyond a first third of getting warm."""
    third = len(rss) // 3
    before = max(value for _, value in rss[: 2 * third] or rss)
    return max(value for _, value in rss[2 * third :] or rss) / before - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    (variant,) = bundle.variants
    with tempfile.TemporaryDirectory(prefix="eds-") as root:
        kernel = Kernel(Path(root) / "kernel")
        with running_agent(Path(root), f'{_SETTINGS}root = "{kernel.root}"\n') as agent:
            with agent.client() as client:
                client.push(bundle, variant.digest)
                plan = client.activate(variant.digest)
            verdict = asyncio.run(traffic(agent, kernel, options.minutes * 60, options.seed))
    peak = max(value for _, value in verdict.rss)
    print(
        json.dumps(
            {
                "seed": options.seed,
                "outcomes": dict(verdict.outcomes),
                "compared_tokens": verdict.compared_tokens,
                "diverged_within_tolerance": verdict.diverged,
                "rss_peak_bytes": peak,
                "rss_median_bytes": statistics.median(value for _, value in verdict.rss),
                "plan_bytes": plan.weights_bytes + plan.workspace_bytes + plan.kv_bytes,
                "rss_growth": round(growth(verdict.rss), 4),
                "wrong": verdict.wrong[:20],
            },
            indent=2,
        )
    )
    return 1 if verdict.wrong or growth(verdict.rss) > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
