"""Our graph beside llama.cpp's, on the same dequantized weights, with perplexity beside speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.contests import INT4, INT8, WORKLOADS, Contest, Workload
from benchmarks.graph_model import GraphModel, perplexity
from benchmarks.inputs import Inputs
from benchmarks.llama_graph import LlamaGraph, start_backend
from benchmarks.our_graph import OurGraph
from benchmarks.peer_weights import peer_weights
from benchmarks.report import TIMES, Bound, Row
from benchmarks.timing import Samples, take_turns

_SCOUT_ROUNDS = 3


def int8(inputs: Inputs) -> list[Row]:
    """INT8 against Q8_0."""
    return _contest("int8", inputs, INT8)


def int4(inputs: Inputs) -> list[Row]:
    """INT4 against the fastest 4-bit type that is not better in perplexity."""
    return _contest("int4", inputs, INT4)


def _contest(benchmark: str, inputs: Inputs, contest: Contest) -> list[Row]:
    engine = inputs.engine(contest.precision)
    text = engine.text()
    with (
        contextlib.closing(OurGraph(engine.files, engine.variant.config)) as ours,
        _peers(inputs, contest) as peers,
    ):
        our_perplexity = perplexity(ours, text)
        perplexities = {name: perplexity(peer, text) for name, peer in peers.items()}
        fair = _not_better(perplexities, our_perplexity)
        table = _Table(benchmark, inputs, contest, ours)
        rows, rates = [], {name: list[float]() for name in peers}
        for number, workload in enumerate(WORKLOADS):
            scouted = _rates(peers, workload, text)
            rival = max(fair, key=lambda name: scouted[name])
            samples = take_turns(
                {
                    "ours": partial(workload.rate, ours, text),
                    "peer": partial(workload.rate, peers[rival], text),
                },
                inputs.rounds,
            )
            rows.append(table.speed(number, workload, samples, rival))
            if workload.streams == 1:
                rows.append(table.bound(samples, peers[rival], rival))
            for name, rate in scouted.items():
                rates[name].append(rate)
        rows += [
            table.quality(name, our_perplexity, perplexities[name], rates[name], len(text)) for name in peers
        ]
        return rows


@contextlib.contextmanager
def _peers(inputs: Inputs, contest: Contest) -> Iterator[dict[str, LlamaGraph]]:
    start_backend()
    files = peer_weights(inputs.model, contest.peers, inputs.peers)
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(LlamaGraph(path))) for name, path in files.items()
        }


def _not_better(perplexities: Mapping[str, float], ours: float) -> list[str]:
    """Peers that do not buy their speed with less rounding; if all are better, the one nearest to ours."""
    fair = [name for name, theirs in perplexities.items() if theirs >= ours]
    return fair or [max(perplexities, key=lambda name: perplexities[name])]


def _rates(peers: Mapping[str, GraphModel], workload: Workload, text: Sequence[int]) -> dict[str, float]:
    """A short round among the peers: who is the one to beat, and how fast are those that are not."""
    rivals = {name: partial(workload.rate, peer, text) for name, peer in peers.items()}
    samples = take_turns(rivals, _SCOUT_ROUNDS)
    return {name: samples.median(name) for name in peers}


@dataclass(frozen=True)
class _Table:
    """Words the figures of one contest."""

    benchmark: str
    inputs: Inputs
    contest: Contest
    ours: OurGraph

    def speed(self, number: int, workload: Workload, samples: Samples, rival: str) -> Row:
        return Row(
            benchmark=self.benchmark,
            what=f"{self._precision} {workload.name}",
            ours=f"{samples.median('ours'):.1f} tok/s",
            peer=f"{samples.median('peer'):.1f} tok/s ({rival})",
            figure=samples.ratio("ours", "peer"),
            unit=TIMES,
            floor=Bound(at_least=self.contest.floors[number]),
            goal=Bound(at_least=self.contest.goals[number]),
            settings=f"{workload.settings}, {samples}",
        )

    def bound(self, samples: Samples, peer: GraphModel, rival: str) -> Row:
        bandwidth = self.inputs.bandwidth_bytes_per_s
        theirs = 100 * samples.median("peer") * peer.step_bytes / bandwidth
        return Row(
            benchmark=self.benchmark,
            what=f"{self._precision} decode, 1 stream: share of the memory-bandwidth bound",
            ours=f"{self.ours.step_bytes / 1e6:.0f} MB/token",
            peer=f"{peer.step_bytes / 1e6:.0f} MB/token, {theirs:.0f} % ({rival})",
            figure=100 * samples.median("ours") * self.ours.step_bytes / bandwidth,
            unit="%",
            goal=Bound(at_least=self.contest.goal_of_bound),
            settings=f"tokens/s times weight bytes of a step, of {bandwidth / 1e9:.1f} GB/s",
        )

    def quality(
        self, rival: str, ours: float, theirs: float, rates: Sequence[float], text_tokens: int
    ) -> Row:
        speeds = " / ".join(f"{rate:.0f}" for rate in rates)
        return Row(
            benchmark=self.benchmark,
            what=f"{self._precision} perplexity beside {rival}",
            ours=f"{ours:.2f}",
            peer=f"{theirs:.2f} ({rival}: {speeds} tok/s)",
            figure=ours / theirs,
            unit=TIMES,
            settings=f"{text_tokens} tokens of pydoc_data.topics, less is better; the peer's speeds in the "
            f"workloads above, median of {_SCOUT_ROUNDS} turns",
        )

    @property
    def _precision(self) -> str:
        return self.contest.precision.value.upper()
