"""The embedded default: ONNX Runtime on the CPU, with the KV cache updated in place."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgellm_agent.runtimes.base import Capabilities, EngineLoadError, KvTensor, LoadPlan, Logits, StepBatch

# A binding costs 0.4 ms to make, a twentieth of a decode step, and a few kilobytes to keep.
_KEPT_BINDINGS = 64


@dataclass(frozen=True)
class _Shape:
    first_slot: int
    rows: int
    tokens: int
    positions: int


@dataclass
class _Bound:
    """An IOBinding with the buffers that it points into: ONNX Runtime keeps no reference to them."""

    binding: ort.IOBinding
    input_ids: npt.NDArray[np.int64]
    past_len: npt.NDArray[np.int32]
    logit_index: npt.NDArray[np.int64]
    logits: Logits
    query_len: npt.NDArray[np.int32]


class OnnxRuntimeRunner:
    """Runs the `onnxruntime` dialect. GroupQueryAttention takes many rows of one token or one row of many."""

    def __init__(self) -> None:
        self._session: ort.InferenceSession | None = None
        self._plan: LoadPlan | None = None
        self._bound: OrderedDict[_Shape, _Bound] = OrderedDict()

    def capabilities(self) -> Capabilities:
        """What `step` accepts."""
        return Capabilities(several_multi_token_rows=False)

    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(ort.__version__)

    def load(self, plan: LoadPlan) -> None:
        """Loads the graph; its weight shards are mapped from the same directory."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(plan.directory / plan.config.files.graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineLoadError(f"ONNX Runtime {ort.__version__} refused the graph: {error}") from error
        self._plan = plan

    def step(self, batch: StepBatch) -> Logits:
        """Runs the batch; the result is valid until the next step of the same shape."""
        if self._session is None:
            raise RuntimeError("step before load")
        rows = batch.rows
        tokens = len(rows[0].tokens)
        if any(row.slot != rows[0].slot + i or len(row.tokens) != tokens for i, row in enumerate(rows)):
            raise ValueError("rows must lie in consecutive slots and have equally many tokens")
        positions = [i * tokens + p for i, row in enumerate(rows) for p in row.logit_positions]
        bound = self._bind(_Shape(rows[0].slot, len(rows), tokens, len(positions)))
        for i, row in enumerate(rows):
            bound.input_ids[i] = row.tokens
            bound.past_len[i] = row.past_len
        bound.logit_index[:] = positions
        self._session.run_with_iobinding(bound.binding)
        return bound.logits

    def close(self) -> None:
        """Gives the weights and scratch memory back."""
        self._bound.clear()
        self._session = None

    def _bind(self, shape: _Shape) -> _Bound:
        bound = self._bound.get(shape)
        if bound is None:
            bound = self._make_binding(shape)
            self._bound[shape] = bound
            if len(self._bound) > _KEPT_BINDINGS:
                self._bound.popitem(last=False)
        self._bound.move_to_end(shape)
        return bound

    def _make_binding(self, shape: _Shape) -> _Bound:
        if self._session is None or self._plan is None:
            raise RuntimeError("step before load")
        bound = _Bound(
            binding=self._session.io_binding(),
            input_ids=np.zeros((shape.rows, shape.tokens), np.int64),
            past_len=np.zeros(shape.rows, np.int32),
            query_len=np.full(shape.rows, shape.tokens, np.int32),
            logit_index=np.zeros(shape.positions, np.int64),
            logits=np.zeros((shape.positions, self._plan.config.model.vocab_size), np.float32),
        )
        for name in ("input_ids", "past_len", "query_len", "logit_index"):
            bound.binding.bind_cpu_input(name, getattr(bound, name))
        bound.binding.bind_output(
            "logits", "cpu", 0, np.float32, bound.logits.shape, bound.logits.ctypes.data
        )
        for kind, tensors in (("key", self._plan.keys), ("value", self._plan.values)):
            for layer, tensor in enumerate(tensors):
                self._bind_kv(bound.binding, f"kv_{kind}_{layer}", tensor, shape)
        return bound

    @staticmethod
    def _bind_kv(binding: ort.IOBinding, name: str, tensor: KvTensor, shape: _Shape) -> None:
        # Input and output are the same memory: attention then appends in place instead of copying the cache.
        address = tensor.address + shape.first_slot * tensor.slot_stride_bytes
        dims = (shape.rows, *tensor.shape[1:])
        binding.bind_input(name, "cpu", 0, np.float32, dims, address)
        binding.bind_output(f"{name}_out", "cpu", 0, np.float32, dims, address)
