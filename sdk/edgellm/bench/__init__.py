"""Measures how fast something answers: prompts, a load generator, metrics, and reports.

`Target` is the seam: a device over gRPC is one, a server of another make or a runtime in this process can be
another, and all are measured by the same code.
"""

from edgellm.bench.device import DeviceTarget, PowerMeter, System, describe
from edgellm.bench.load import Bounds, Outcome, Record, arrival_times, ask, closed_loop, open_loop
from edgellm.bench.metrics import Distribution, Metrics, summarize
from edgellm.bench.scenarios import Interference, Turn, chat, interference
from edgellm.bench.sweep import Point, Row, Sweep
from edgellm.bench.target import IteratorTarget, Piece, Request, Target, Usage
from edgellm.bench.workload import PromptSource, WordFit, fit_words

__all__ = [
    "Bounds",
    "DeviceTarget",
    "Distribution",
    "Interference",
    "IteratorTarget",
    "Metrics",
    "Outcome",
    "Piece",
    "Point",
    "PowerMeter",
    "PromptSource",
    "Record",
    "Request",
    "Row",
    "Sweep",
    "System",
    "Target",
    "Turn",
    "Usage",
    "WordFit",
    "arrival_times",
    "ask",
    "chat",
    "closed_loop",
    "describe",
    "fit_words",
    "interference",
    "open_loop",
    "summarize",
]
