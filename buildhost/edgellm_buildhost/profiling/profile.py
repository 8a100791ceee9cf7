"""The time of a step, shared out among nodes, and the rows of a table in which it adds up again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from edgellm_buildhost.profiling.trace import NodeTime, Run
from edgellm_buildhost.profiling.work import ATTENTION, NodeWork

BETWEEN = "(between nodes)"
"""What the executor took itself, and the profiler."""
_LAYER = re.compile(r"layer(\d+)\.(.+)")


class By(str, Enum):
    """What becomes a row."""

    OP = "op"
    NODE = "node"
    LAYER = "layer"


@dataclass(frozen=True)
class Row:
    """Of one step: how often, how long, and how much was read and computed, where that is known."""

    name: str
    calls: int
    time_ms: float
    share: float
    """Of the whole step, 0 to 1."""
    read_bytes: int
    operations: int

    @property
    def read_gb_s(self) -> float | None:
        """Weights, or keys and values, read in a second."""
        return self.read_bytes / self.time_ms / 1e6 if self.read_bytes and self.time_ms else None

    @property
    def gop_s(self) -> float | None:
        """Multiplications and additions of matrices in a second."""
        return self.operations / self.time_ms / 1e6 if self.operations and self.time_ms else None


@dataclass(frozen=True)
class Node:
    """One node of the graph in the mean of the runs."""

    name: str
    op_type: str
    time_ms: float
    read_bytes: int
    operations: int


def mean_nodes(
    runs: Sequence[Run], work: Mapping[str, NodeWork], kv_read: Callable[[NodeWork], int]
) -> list[Node]:
    """Every node's mean time, in the order of computation; all `runs` are of one graph.

    `kv_read` says how many bytes of the cache an attention reads.
    """
    nodes = []
    for same in zip(*(run.nodes for run in runs), strict=True):
        first: NodeTime = same[0]
        todo = work.get(first.name, NodeWork())
        nodes.append(
            Node(
                first.name,
                first.op_type,
                sum(node.duration_us for node in same) / len(same) / 1e3,
                kv_read(todo) if first.op_type == ATTENTION else todo.weight_bytes,
                todo.operations_per_output * first.output_elements,
            )
        )
    return nodes


def rows(nodes: Iterable[Node], total_ms: float, by: By) -> list[Row]:
    """The table, whose times add up to `total_ms`: layers in their order, all else by time."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(_NAMES[by](node), []).append(node)
    found = [_row(name, group, total_ms) for name, group in groups.items()]
    between_ms = total_ms - sum(row.time_ms for row in found)
    if by is not By.LAYER:
        found.sort(key=lambda row: -row.time_ms)
    return [*found, Row(BETWEEN, 1, between_ms, between_ms / total_ms, 0, 0)]


def _row(name: str, group: Sequence[Node], total_ms: float) -> Row:
    time_ms = sum(node.time_ms for node in group)
    return Row(
        name,
        len(group),
        time_ms,
        time_ms / total_ms,
        sum(node.read_bytes for node in group),
        sum(node.operations for node in group),
    )


def _operator(node: Node) -> str:
    """The operator; matrices by what they are for, and all norms as one."""
    if node.op_type.endswith("LayerNormalization"):
        return "norms"
    if node.operations:
        found = _LAYER.fullmatch(node.name)
        return f"{node.op_type} {found[2] if found else node.name}"
    return node.op_type


def _layer(node: Node) -> str:
    found = _LAYER.fullmatch(node.name)
    return f"layer {found[1]}" if found else "outside of layers"


_NAMES: dict[By, Callable[[Node], str]] = {
    By.OP: _operator,
    By.NODE: lambda node: f"{node.op_type} {node.name}",
    By.LAYER: _layer,
}
