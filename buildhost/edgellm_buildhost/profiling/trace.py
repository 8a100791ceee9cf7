"""Reads what ONNX Runtime's profiler wrote: for each run of the session, the time of every node.

The file is a list of events in the Trace Event Format. A node's kernel is an event `NAME_kernel_time` of the
category Node, a whole run one named `model_run` of the category Session, which comes after its nodes. Times
are whole microseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KERNEL = "_kernel_time"
# Where the profiler stops writing (onnxruntime, `Profiler::max_num_events_`), and says so only in its log.
MAX_EVENTS = 1_000_000


@dataclass(frozen=True)
class NodeTime:
    """One node in one run."""

    name: str
    op_type: str
    duration_us: int
    output_elements: int
    """Of its first output; 0 if the profiler does not say."""


@dataclass(frozen=True)
class Run:
    """One run of the session: all of it, and its nodes in the order of their computation."""

    duration_us: int
    nodes: tuple[NodeTime, ...]


def read_trace(path: Path) -> list[Run]:
    """All runs of a trace; raises ValueError if it is not one, OSError if it cannot be read."""
    events = json.loads(path.read_bytes())
    if not isinstance(events, list):
        raise ValueError("the profiler's file is not a list of events")
    runs, nodes = [], []
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            nodes.append(_node(name, event))
        elif event.get("cat") == "Session" and name == "model_run":
            runs.append(Run(int(event["dur"]), tuple(nodes)))
            nodes = []
    return runs


def middle_half(runs: Sequence[Run]) -> list[Run]:
    """Those runs that were neither fast nor slow.

    A median of each node would not add up to the median of the runs; the mean of these does, and what
    disturbed a run is not among them.
    """
    by_time = sorted(runs, key=lambda run: run.duration_us)
    aside = len(by_time) // 4
    return by_time[aside : len(by_time) - aside]


def _node(name: str, event: dict[str, Any]) -> NodeTime:
    arguments = event.get("args", {})
    shapes = [shape for item in arguments.get("output_type_shape", []) for shape in item.values()]
    return NodeTime(
        name.removesuffix(_KERNEL),
        str(arguments.get("op_name", "?")),
        int(event["dur"]),
        math.prod(shapes[0]) if shapes else 0,
    )
