"""What the daemon costs: tokens over gRPC, beside the runner alone with the same lengths."""

from __future__ import annotations

import time

from benchmarks.agent import AgentProcess, running_agent
from benchmarks.inputs import BuiltEngine, Inputs
from benchmarks.our_graph import OurGraph
from benchmarks.report import TIMES, Bound, Row
from benchmarks.streams import read_streams
from benchmarks.timing import Samples, take_turns
from edgellm_buildhost.recipe import QuantName

_STREAMS = 4
_PROMPT_TOKENS = 64
_TOKENS = 192


def daemon_cost(inputs: Inputs) -> list[Row]:
    """While all streams decode, and from the first request to the last token."""
    engine = inputs.engine(QuantName.INT4)
    # The runner alone does not guess ahead either.
    settings = {"context_tokens": 1024, "max_sequences": _STREAMS, "speculate": False}
    with running_agent(inputs.cache, settings) as agent:
        _push(agent, engine)
        alone = OurGraph(engine.files, engine.variant.config)
        try:
            return _measure(inputs, engine, agent, alone)
        finally:
            alone.close()


def _measure(inputs: Inputs, engine: BuiltEngine, agent: AgentProcess, alone: OurGraph) -> list[Row]:
    prompts = engine.prompts(_STREAMS, _PROMPT_TOKENS)
    ids = [engine.tokenizer().encode(prompt).ids for prompt in prompts]
    # A turn gives two figures; the second is found by the first, for the turns that count.
    whole: dict[str, dict[float, float]] = {"daemon": {}, "runner": {}}

    def over_grpc() -> float:
        result = read_streams(agent.target, prompts, _TOKENS)
        whole["daemon"][result.window_rate] = result.whole_rate
        return result.window_rate

    def runner_alone() -> float:
        decode, all_of_it = _runner_rates(alone, ids)
        whole["runner"][decode] = all_of_it
        return decode

    samples = take_turns({"daemon": over_grpc, "runner": runner_alone}, inputs.rounds)
    lengths = f"{_STREAMS} prompts of {_PROMPT_TOKENS} tokens, {_TOKENS} greedy tokens each, {samples}"
    all_of_it = Samples(
        {name: [whole[name][rate] for rate in rates] for name, rates in samples.by_name.items()},
        samples.disturbed,
    )
    return [
        Row(
            benchmark="daemon",
            what="daemon over gRPC beside its runner alone: INT4, 4 streams, while all decode",
            ours=f"{samples.median('daemon'):.1f} tok/s",
            peer=f"{samples.median('runner'):.1f} tok/s (runner)",
            figure=samples.ratio("daemon", "runner"),
            unit=TIMES,
            floor=Bound(at_least=0.9),
            goal=Bound(at_least=0.95),
            settings=lengths,
        ),
        Row(
            benchmark="daemon",
            what="the same, from the first request to the last token, prompts included",
            ours=f"{all_of_it.median('daemon'):.1f} tok/s",
            peer=f"{all_of_it.median('runner'):.1f} tok/s (runner)",
            figure=all_of_it.ratio("daemon", "runner"),
            unit=TIMES,
            settings=lengths,
        ),
    ]


def _runner_rates(alone: OurGraph, prompts: list[list[int]]) -> tuple[float, float]:
    """Tokens per second of the decode steps, and of prompts and decode steps together."""
    alone.clear()
    began = time.perf_counter()
    for stream, prompt in enumerate(prompts):
        alone.prefill(stream, prompt, 0)
    decoding = time.perf_counter()
    for step in range(_TOKENS - 1):
        alone.decode([prompt[step % len(prompt)] for prompt in prompts], len(prompts[0]) + step)
    ended = time.perf_counter()
    steps, tokens = _TOKENS - 1, _TOKENS
    return len(prompts) * steps / (ended - decoding), len(prompts) * tokens / (ended - began)


def _push(agent: AgentProcess, engine: BuiltEngine) -> None:
    with agent.client() as client:
        client.push(engine.bundle, engine.variant.digest)
        client.activate(engine.variant.digest)
