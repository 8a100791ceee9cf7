"""What the agent's scheduler promises, against itself: prompt lookup, a long prompt among streams, a prefix.

Where a peer has the same, its figures stand beside ours.
"""

from __future__ import annotations

import asyncio
import statistics

from benchmarks.inputs import Inputs
from benchmarks.report import TIMES, Bound, Row, Skipped
from benchmarks.serving import our_agent
from benchmarks.serving_load import FEW_ROUNDS, Sizes, answer_all, ask_all, prompts_for, take_turns
from benchmarks.serving_peers import Rival, peers_of
from edgellm.bench import Interference, PromptSource, Request, Target, interference
from edgellm.client import Message
from edgellm.errors import EdgellmError
from edgellm_buildhost.recipe import QuantName

_PRECISIONS = (QuantName.INT8, QuantName.INT4)
_LOOKUP_BOX_S = 25.0
_LOOKUP_TEXT_TOKENS, _LOOKUP_ANSWER_TOKENS = 200, 160
_STREAMS = 3
_STREAM_TOKENS = 512
_NEWCOMER_TOKENS = 2000
_INTERFERENCE_ROUNDS = 3
_PREFIX_BOX_S = 15.0
_PREFIX_TOKENS, _SUFFIX_TOKENS = 400, 16
# What a chunk of the prompt may hold up the streams, by the agent's default `prefill_budget_s`.
_BUDGET_MS = 100.0


def prompt_lookup(inputs: Inputs) -> list[Row]:
    """A task that quotes its input, with speculation and without."""
    return [_lookup_row(inputs, precision) for precision in _PRECISIONS]


def long_prompt(inputs: Inputs) -> list[Row | Skipped]:
    """Streams that run while a long prompt comes in."""
    return [row for precision in _PRECISIONS for row in _interference_rows(inputs, precision)]


def cached_prefix(inputs: Inputs) -> list[Row]:
    """The first token of a prompt whose beginning was computed before."""
    return [_prefix_row(inputs, precision) for precision in _PRECISIONS]


def _lookup_row(inputs: Inputs, precision: QuantName) -> Row:
    engine = inputs.engine(precision)
    texts = engine.prompts(16, _LOOKUP_TEXT_TOKENS)

    def decode_rate(rival: Rival, turn: int) -> float:
        (record,) = answer_all(rival, [_quoting(texts[turn])], clients=1)
        first, last = record.arrivals[0], record.arrivals[-1]
        return (record.output_tokens - first.tokens) / (last.at_s - first.at_s)

    with our_agent(inputs, engine) as on, our_agent(inputs, engine, speculate=False) as off:
        turns = take_turns(
            {"on": lambda turn: decode_rate(on, turn), "off": lambda turn: decode_rate(off, turn)},
            Sizes.of(inputs.rounds, _LOOKUP_BOX_S),
        )
    ratios = [a / b for a, b in zip(turns.by_name["on"], turns.by_name["off"], strict=True)]
    return Row(
        benchmark="lookup",
        what=f"{precision.value.upper()} answer that repeats its text: prompt lookup beside none",
        ours=f"{statistics.median(turns.by_name['on']):.0f} tok/s",
        peer=f"{statistics.median(turns.by_name['off']):.0f} tok/s (speculate = false)",
        figure=statistics.median(ratios),
        unit=TIMES,
        goal=Bound(at_least=1.3),
        settings=f"text of {_LOOKUP_TEXT_TOKENS} tokens, {_LOOKUP_ANSWER_TOKENS} greedy tokens, {turns}",
    )


def _quoting(text: str) -> Request:
    asked = f"Repeat this text word for word:\n\n{text}"
    return Request((Message("user", asked),), _LOOKUP_ANSWER_TOKENS)


def _interference_rows(inputs: Inputs, precision: QuantName) -> list[Row | Skipped]:
    engine = inputs.engine(precision)
    rounds = _INTERFERENCE_ROUNDS if inputs.rounds >= FEW_ROUNDS else 1
    with our_agent(inputs, engine) as ours:
        source = prompts_for(ours)
        found = _interference(ours, source, rounds)
    theirs: Interference | None = None
    rows: list[Row | Skipped] = []
    # Of the peers, the one that serves a newcomer beside running streams.
    peer = peers_of(precision, engine.variant.config.tokens.eos_ids)[0]
    if reason := peer.missing(inputs):
        rows.append(Skipped("interference", peer.name, reason))
    else:
        with peer.running(inputs) as rival:
            try:
                theirs = _interference(rival, source, 1)
            except (EdgellmError, asyncio.TimeoutError) as error:
                rows.append(Skipped("interference", peer.name, str(error) or "it took too long"))
    return [*_worded(precision, found, theirs, peer.name), *rows]


def _interference(rival: Rival, source: PromptSource, rounds: int) -> Interference:
    async def work(target: Target) -> Interference:
        return await interference(
            target,
            source,
            asyncio.Event(),
            streams=_STREAMS,
            rounds=rounds,
            stream_tokens=_STREAM_TOKENS,
            newcomer_tokens=_NEWCOMER_TOKENS,
        )

    return ask_all(rival, work)


def _worded(precision: QuantName, ours: Interference, theirs: Interference | None, peer: str) -> list[Row]:
    calm, during = _p99s(ours)
    alone, beside = _ttfts(ours)
    settings = f"{_STREAMS} streams, prompt of {ours.avg_input_tokens:.0f} tokens, {ours.rounds} rounds"
    stall = "{1:.0f} ms (quiet {0:.0f} ms)"
    wait = "{1:.0f} ms (alone {0:.0f} ms)"
    return [
        Row(
            benchmark="interference",
            what=f"{precision.value.upper()} p99 between tokens of streams while a long prompt comes in, "
            "beyond quiet",
            ours=stall.format(calm, during),
            peer=f"{stall.format(*_p99s(theirs))} ({peer})" if theirs else "",
            figure=during - calm,
            unit="ms",
            floor=Bound(at_most=_BUDGET_MS),
            settings=settings,
        ),
        Row(
            benchmark="interference",
            what=f"{precision.value.upper()} first token of the long prompt among them, beside alone",
            ours=wait.format(alone, beside),
            peer=f"{wait.format(*_ttfts(theirs))} ({peer})" if theirs else "",
            figure=beside / alone,
            unit=TIMES,
            floor=Bound(at_most=1.3),
            settings=f"medians of {settings}",
        ),
    ]


def _p99s(found: Interference) -> tuple[float, float]:
    calm, during = found.calm_inter_token_latency_ms, found.during_inter_token_latency_ms
    if calm is None or during is None:
        raise RuntimeError("the streams had no tokens before or beside the long prompt")
    return calm.p99, during.p99


def _ttfts(found: Interference) -> tuple[float, float]:
    alone, beside = found.alone_time_to_first_token_ms, found.beside_time_to_first_token_ms
    if alone is None or beside is None:
        raise RuntimeError("the long prompt was not answered")
    return alone.p50, beside.p50


def _prefix_row(inputs: Inputs, precision: QuantName) -> Row:
    engine = inputs.engine(precision)
    with our_agent(inputs, engine) as ours:
        source = prompts_for(ours)
        turns = take_turns(
            {"ttfts": lambda turn: _cold_and_cached_s(ours, source, turn)},
            Sizes.of(inputs.rounds, _PREFIX_BOX_S),
        )
    pairs = turns.by_name["ttfts"]
    cold_ms, cached_ms = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    return Row(
        benchmark="prefix",
        what=f"{precision.value.upper()} first token with a cached prefix, beside cold",
        ours=f"{cached_ms:.0f} ms",
        peer=f"{cold_ms:.0f} ms (cold)",
        figure=statistics.median(cached / cold for cold, cached in pairs),
        unit=TIMES,
        floor=Bound(at_most=0.2),
        goal=Bound(at_most=0.1),
        settings=f"{_PREFIX_TOKENS} tokens of prefix, {_SUFFIX_TOKENS} of new text, {turns}",
    )


def _cold_and_cached_s(rival: Rival, source: PromptSource, turn: int) -> tuple[float, float]:
    """Seconds to the first token of a prompt, and of another that begins like it."""
    # Its seed is the turn's own: no prompt of an earlier turn begins like it.
    fresh = PromptSource(source.seed + 1 + turn, source.fit)
    whole = _PREFIX_TOKENS + _SUFFIX_TOKENS
    requests = [Request(fresh.prompt(number, whole, _PREFIX_TOKENS), output_tokens=2) for number in range(2)]
    cold, cached = (
        record.arrivals[0].at_s - record.began_s for record in answer_all(rival, requests, clients=1)
    )
    return cold, cached
