"""The contract between the worker and an inference runtime that leaves scheduling to us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgellm.bundle.config import EngineConfig

Logits = npt.NDArray[np.float32]
"""[positions, vocab], in the order of the batch's rows and their logit positions."""


@dataclass(frozen=True)
class Capabilities:
    """What a runner can do in one step; the scheduler plans accordingly."""

    several_multi_token_rows: bool
    """Rows of more than one token, and of different lengths, may share a step; if not, such a row runs alone.

    Shorter rows are padded: a step costs as much as rows times the longest of them.
    """


@dataclass(frozen=True)
class KvTensor:
    """Where the key or value cache of one layer lies: [slots, kv_heads, capacity, head_dim], C order, in host
    memory.
    """

    address: int
    shape: tuple[int, int, int, int]
    slot_stride_bytes: int


@dataclass(frozen=True)
class KvSpace:
    """Tensors of one capacity, by layer: a step's rows lie in one space."""

    keys: tuple[KvTensor, ...]
    values: tuple[KvTensor, ...]


@dataclass(frozen=True)
class LoadPlan:
    """All that a runner needs to load an engine.

    The KV memory stays the pool's; the runner only reads and writes it.
    """

    directory: Path
    config: EngineConfig
    spaces: tuple[KvSpace, ...]
    threads: int


@dataclass(frozen=True)
class Row:
    """New tokens of one sequence, to be appended to the `past_len` tokens that its slot holds."""

    slot: int
    tokens: Sequence[int]
    past_len: int
    logit_positions: tuple[int, ...]
    """Indices into `tokens` whose next-token logits are wanted."""


@dataclass(frozen=True)
class StepBatch:
    """One forward pass. The rows' slots are consecutive and ascending, and lie in one space."""

    rows: tuple[Row, ...]
    space: int = 0


class ModelRunner(Protocol):
    """Loads an engine and runs forward passes; never decides which."""

    def capabilities(self) -> Capabilities:
        """What `step` accepts."""

    def version(self) -> str:
        """Version of the runtime."""

    def load(self, plan: LoadPlan) -> None:
        """Loads the engine; raises EngineLoadError."""

    def step(self, batch: StepBatch) -> Logits:
        """Runs the batch; the result is valid until the next step."""

    def close(self) -> None:
        """Gives all memory back."""


class EngineLoadError(Exception):
    """The runtime refused the engine."""
