"""The quality table: a line for each way to quantize, and who has to be as good as whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality_figures import Figures
from benchmarks.report import TIMES, Bound, Row

_OURS, _PEER = "edgellm ", "llama.cpp "
_HEADINGS = (
    "quantized by",
    "MB",
    "MB of layers",
    "bits/weight",
    "perplexity",
    "KL mean",
    "KL p99",
    "same first choice",
    "seconds",
    "peak GB",
)


@dataclass(frozen=True)
class Entry:
    """One way to quantize the model.

    `linear_bytes` and `bits_per_weight` are of the layers' matrices with their scales; `file_bytes` is 0
    where nothing was made that could be shipped. `seconds` and `peak_bytes` (RssAnon + RssShmem) are of the
    process that quantized.
    """

    name: str
    file_bytes: int
    linear_bytes: int
    bits_per_weight: float
    figures: Figures
    seconds: float | None
    peak_bytes: int | None


def to_markdown(basis: str, entries: Sequence[Entry]) -> str:
    """The table, in the order given."""
    tokens = entries[0].figures.tokens
    lines = [
        f"{basis} weights, {tokens} tokens of held-out text; KL in nats, with its 95 % interval:",
        "",
        f"| {' | '.join(_HEADINGS)} |",
        f"|---{'|--:' * (len(_HEADINGS) - 1)}|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(entry))} |" for entry in entries)])


def _cells(entry: Entry) -> tuple[str, ...]:
    figures = entry.figures
    return (
        entry.name,
        f"{entry.file_bytes / 1e6:.1f}" if entry.file_bytes else "",
        f"{entry.linear_bytes / 1e6:.1f}",
        f"{entry.bits_per_weight:.2f}",
        f"{figures.perplexity:.3f}",
        f"{figures.kl_mean:.4f} ± {figures.kl_error:.4f}",
        f"{figures.kl_p99:.3f}",
        f"{100 * figures.top1:.1f} %",
        "" if entry.seconds is None else f"{entry.seconds:.0f}",
        "" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e9:.2f}",
    )


def contests(benchmark: str, basis: str, entries: Sequence[Entry]) -> list[Row]:
    """Each of ours beside llama.cpp's best type that is no larger; its smallest type where all are larger."""
    entries = [entry for entry in entries if entry.file_bytes]
    peers = [entry for entry in entries if entry.name.startswith(_PEER)]
    return [
        _contest(benchmark, basis, ours, _rival(ours, peers))
        for ours in entries
        if ours.name.startswith(_OURS)
    ]


def _rival(ours: Entry, peers: Sequence[Entry]) -> Entry:
    no_larger = [peer for peer in peers if peer.file_bytes <= ours.file_bytes]
    if not no_larger:
        return min(peers, key=lambda peer: peer.file_bytes)
    return min(no_larger, key=lambda peer: peer.figures.kl_mean)


def _contest(benchmark: str, basis: str, ours: Entry, peer: Entry) -> Row:
    return Row(
        benchmark=benchmark,
        what=f"{ours.name.removeprefix(_OURS)}: divergence from the float model at no more bytes",
        ours=_words(ours),
        peer=f"{_words(peer)} ({peer.name.removeprefix(_PEER)})",
        figure=ours.figures.kl_mean / peer.figures.kl_mean,
        unit=TIMES,
        floor=Bound(at_most=1.0),
        settings=f"{basis} weights, {ours.figures.tokens} tokens of held-out text",
    )


def _words(entry: Entry) -> str:
    return f"KL {entry.figures.kl_mean:.4f}, {entry.file_bytes / 1e6:.0f} MB"
