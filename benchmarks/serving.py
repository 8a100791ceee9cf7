"""The agent over gRPC beside other servers of the same model: several clients, mixed lengths, growing chats.

All servers are up for the whole time and take turns; each computes with a thread for every core.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.agent import running_agent
from benchmarks.graph_model import perplexity
from benchmarks.inputs import BuiltEngine, Inputs
from benchmarks.our_graph import OurGraph
from benchmarks.report import TIMES, Bound, Row, Skipped
from benchmarks.serving_load import (
    FEW_ROUNDS,
    Sizes,
    Turns,
    answer_all,
    chat_ttfts_s,
    mixed,
    prompts_for,
    take_turns,
)
from benchmarks.serving_peers import CONTEXT_TOKENS, SEQUENCES, Rival, Weights, device, peers_of
from edgellm.bench import Distribution, PromptSource, Record, summarize
from edgellm_buildhost.recipe import QuantName

# Clients, and the requests that they send together.
_LOADS = ((1, 3), (4, 8), (8, 16))
_LOADS_BOX_S = 420.0
_CHAT_TURNS = 6
_CHAT_BOX_S = 60.0


def int8(inputs: Inputs) -> list[Row | Skipped]:
    """INT8 beside 8-bit peers."""
    return _contest("serving-int8", inputs, QuantName.INT8)


def int4(inputs: Inputs) -> list[Row | Skipped]:
    """INT4 beside 4-bit peers."""
    return _contest("serving-int4", inputs, QuantName.INT4)


@contextlib.contextmanager
def our_agent(inputs: Inputs, engine: BuiltEngine, **settings: object) -> Iterator[Rival]:
    """The agent with this engine active, for as long as the context lasts."""
    chosen = {"context_tokens": CONTEXT_TOKENS, "max_sequences": SEQUENCES, **settings}
    with running_agent(inputs.cache, chosen) as agent:
        with agent.client() as client:
            client.push(engine.bundle, engine.variant.digest)
            client.activate(engine.variant.digest)
        yield device(agent.target)


def _contest(benchmark: str, inputs: Inputs, precision: QuantName) -> list[Row | Skipped]:
    engine = inputs.engine(precision)
    skipped: list[Row | Skipped] = []
    with contextlib.ExitStack() as stack:
        contest = _Contest(benchmark, inputs, precision, [stack.enter_context(our_agent(inputs, engine))])
        for peer in peers_of(precision, engine.variant.config.tokens.eos_ids):
            if reason := peer.missing(inputs):
                skipped.append(Skipped(benchmark, peer.name, reason))
            else:
                contest.rivals.append(stack.enter_context(peer.running(inputs)))
        source = prompts_for(contest.rivals[0])
        rows = [row for clients, requests in _LOADS for row in contest.load(source, clients, requests)]
        rows += contest.chat(source)
        weights = [rival.weights for rival in contest.rivals if rival.weights is not None]
    return [*rows, *_qualities(benchmark, inputs, engine, precision, weights), *skipped]


@dataclass(frozen=True)
class _Contest:
    """Measures what is common to all rivals, of which we are the first, and words it."""

    benchmark: str
    inputs: Inputs
    precision: QuantName
    rivals: list[Rival]

    def load(self, source: PromptSource, clients: int, requests: int) -> list[Row | Skipped]:
        """So many clients at once."""
        requests = max(clients, requests // 2) if self.inputs.rounds < FEW_ROUNDS else requests

        def measure(rival: Rival, turn: int) -> list[Record]:
            return answer_all(rival, mixed(source, turn, clients, requests), clients)

        share = requests / sum(count for _, count in _LOADS)
        turns = self._take_turns(measure, share * _LOADS_BOX_S)
        what = f"serving {clients} client{'s' if clients > 1 else ''}, output"
        settings = f"{requests} requests of 32 to 256 tokens in, 16 to 64 out, {turns}"
        figures = {name: _tokens_per_s(runs) for name, runs in turns.by_name.items()}
        words = {name: _speed(runs) for name, runs in turns.by_name.items()}
        return self._rows(what, turns, figures, words, goal=Bound(at_least=1.0), settings=settings)

    def chat(self, source: PromptSource) -> list[Row | Skipped]:
        """A conversation that grows."""

        def measure(rival: Rival, turn: int) -> list[float]:
            # No conversation begins like one before.
            return chat_ttfts_s(rival, PromptSource(source.seed + 1 + turn, source.fit), _CHAT_TURNS)

        turns = self._take_turns(measure, _CHAT_BOX_S)
        what = f"a chat of {_CHAT_TURNS} turns, time to first token after the first turn"
        settings = f"48 tokens asked and 24 answered each turn, {turns}"
        later = {name: [statistics.fmean(run[1:]) for run in runs] for name, runs in turns.by_name.items()}
        words = {name: _by_turn(runs) for name, runs in turns.by_name.items()}
        return self._rows(what, turns, later, words, goal=Bound(at_most=1.0), settings=settings)

    def _take_turns(self, measure: Callable[[Rival, int], object], box_s: float) -> Turns:
        rivals = {rival.name: partial(measure, rival) for rival in self.rivals}
        return take_turns(rivals, Sizes.of(self.inputs.rounds, box_s))

    def _rows(
        self,
        what: str,
        turns: Turns,
        figures: Mapping[str, Sequence[float]],
        words: Mapping[str, str],
        *,
        goal: Bound,
        settings: str,
    ) -> list[Row | Skipped]:
        what = f"{self.precision.value.upper()} {what}"
        ours, *peers = turns.by_name
        rows: list[Row | Skipped] = [
            Row(
                benchmark=self.benchmark,
                what=what,
                ours=words[ours],
                peer=f"{words[peer]} ({peer})",
                figure=statistics.median(a / b for a, b in zip(figures[ours], figures[peer], strict=True)),
                unit=TIMES,
                goal=goal,
                settings=settings,
            )
            for peer in peers
        ]
        return rows + [Skipped(self.benchmark, f"{what}: {name}", why) for name, why in turns.dropped.items()]


def _tokens_per_s(runs: Sequence[Sequence[Record]]) -> list[float]:
    return [summarize(records).system_output_throughput_tok_s for records in runs]


def _speed(runs: Sequence[Sequence[Record]]) -> str:
    """Throughput as the median of the rounds, latencies over all of them."""
    pooled = summarize([record for records in runs for record in records])
    gaps, ttft = pooled.inter_token_latency_ms, pooled.time_to_first_token_ms
    rate = statistics.median(_tokens_per_s(runs))
    return f"{rate:.0f} tok/s; between tokens {_p50_p99(gaps)} ms; first token p99 {_p99(ttft)} ms"


def _p50_p99(found: Distribution | None) -> str:
    return "-" if found is None else f"p50 {found.p50:.0f}, p99 {found.p99:.0f}"


def _p99(found: Distribution | None) -> str:
    return "-" if found is None else f"{found.p99:.0f}"


def _by_turn(runs: Sequence[Sequence[float]]) -> str:
    """Median of each turn."""
    medians = [statistics.median(ttfts) * 1e3 for ttfts in zip(*runs, strict=True)]
    return " / ".join(f"{ms:.0f}" for ms in medians) + " ms"


def _qualities(
    benchmark: str, inputs: Inputs, engine: BuiltEngine, precision: QuantName, weights: Sequence[Weights]
) -> list[Row]:
    """Perplexity beside each kind of weights among the peers."""
    text = engine.text()
    with contextlib.closing(OurGraph(engine.files, engine.variant.config)) as graph:
        ours = perplexity(graph, text)
    distinct = {kind.name: kind for kind in weights}
    theirs = {name: kind.perplexity(kind.make(inputs), text) for name, kind in distinct.items()}
    return [
        Row(
            benchmark=benchmark,
            what=f"{precision.value.upper()} perplexity of what was served",
            ours=f"{ours:.2f}",
            peer=f"{value:.2f} ({name})",
            figure=ours / value,
            unit=TIMES,
            settings=f"{len(text)} tokens of pydoc_data.topics, less is better",
        )
        for name, value in theirs.items()
    ]
