"""Our graph through the agent's own runner and KV memory, without the daemon around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from benchmarks.graph_model import CONTEXT_TOKENS, MAX_STREAMS, Logits
from benchmarks.machine import usable_cores
from edgellm.bundle import EngineConfig
from edgellm_agent.runtimes.base import LoadPlan, Row, StepBatch
from edgellm_agent.runtimes.onnxruntime import OnnxRuntimeRunner
from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.paged import PagedKvMemory

# Rows are looked up in these, not read as a whole.
_LOOKUPS = {"GatherBlockQuantized", "Gather", "GroupQueryAttention"}


class OurGraph:
    """A GraphModel."""

    def __init__(
        self,
        directory: Path,
        config: EngineConfig,
        *,
        streams: int = MAX_STREAMS,
        context: int = CONTEXT_TOKENS,
    ) -> None:
        """Loads the engine whose files lie in the directory by their titles."""
        self.name = f"edgellm {config.precision.weights}"
        self.step_bytes = _step_bytes(directory / config.files.graph)
        shape = config.model
        geometry = KvGeometry(shape.layers, shape.kv_heads, shape.head_dim, config.kv_item_bytes)
        self._memory = PagedKvMemory(geometry, streams, context)
        handles = (self._memory.allocate(context) for _ in range(streams))
        self._handles = [handle for handle in handles if handle is not None]
        self._runner = OnnxRuntimeRunner()
        self._runner.load(LoadPlan(directory, config, self._memory.spaces, usable_cores()))

    def prefill(self, stream: int, tokens: Sequence[int], past_len: int, *, every: bool = False) -> Logits:
        """Runs one row of many tokens."""
        positions = tuple(range(len(tokens))) if every else (len(tokens) - 1,)
        return self._runner.step(StepBatch((Row(self._slot(stream), tokens, past_len, positions),)))

    def decode(self, tokens: Sequence[int], past_len: int) -> Logits:
        """Runs many rows of one token."""
        rows = tuple(Row(self._slot(i), (token,), past_len, (0,)) for i, token in enumerate(tokens))
        return self._runner.step(StepBatch(rows))

    def clear(self) -> None:
        """Gives the pages back, so that a run pays for them as a new sequence does."""
        for handle in self._handles:
            self._memory.trim(handle, 0)

    def close(self) -> None:
        """Unloads."""
        self._runner.close()
        self._memory.close()

    def _slot(self, stream: int) -> int:
        return self._memory.place(self._handles[stream]).slot


def _step_bytes(graph: Path) -> int:
    regions: dict[tuple[str, int], int] = {}
    for node in ir.load(graph).graph:
        if node.op_type in _LOOKUPS:
            continue
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if isinstance(tensor, ir.ExternalTensor):
                regions[str(tensor.location), tensor.offset or 0] = tensor.length or 0
    return sum(regions.values())
