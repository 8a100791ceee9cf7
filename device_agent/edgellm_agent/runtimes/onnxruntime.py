"""The embedded default: ONNX Runtime on the CPU, with the KV cache updated in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from packaging.version import Version

from edgellm.bundle.config import EngineConfig, KvDtype
from edgellm_agent.runtimes.base import (
    Capabilities,
    EngineLoadError,
    LoadPlan,
    Logits,
    Row,
    StepBatch,
)
from edgellm_agent.runtimes.onnx_paths import check_graph

# The first version whose GroupQueryAttention is told how many tokens of a row are not padding.
_RAGGED_SINCE = Version("1.32")
# A binding costs 0.4 ms to make, a twentieth of a decode step, and a few kilobytes to keep.
_KEPT_BINDINGS = 64
# What the build host writes; the CPU kernel takes float16 too, at half the speed.
_KV_DTYPES: dict[KvDtype, npt.DTypeLike] = {"float32": np.float32, "int8": np.int8}


@dataclass(frozen=True)
class _Shape:
    space: int
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
    query_len: npt.NDArray[np.int32]
    logit_index: npt.NDArray[np.int64]
    logits: Logits

    def fill(self, rows: Sequence[Row]) -> None:
        """Rows go side by side, each padded on the right to the longest."""
        longest = self.input_ids.shape[1]
        for i, row in enumerate(rows):
            length = len(row.tokens)
            self.input_ids[i, :length] = row.tokens
            self.input_ids[i, length:] = 0
            self.past_len[i] = row.past_len
            self.query_len[i] = length
        self.logit_index[:] = [i * longest + p for i, row in enumerate(rows) for p in row.logit_positions]


class OnnxRuntimeRunner:
    """Runs the `onnxruntime` dialect.

    From 1.32 on a step has rows of any lengths, if the engine has a graph for it; otherwise it is many rows
    of one token or one row of many.
    """

    def __init__(self) -> None:
        self._session: ort.InferenceSession | None = None
        self._plan: LoadPlan | None = None
        self._ragged = False
        self._kv_dtype: npt.DTypeLike = np.float32
        self._bound: OrderedDict[_Shape, _Bound] = OrderedDict()
        self._logits: Logits = np.zeros((0, 0), np.float32)

    def capabilities(self) -> Capabilities:
        """What `step` accepts; known once an engine is loaded."""
        return Capabilities(several_multi_token_rows=self._ragged)

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
        kv = plan.config.precision.kv
        if kv not in _KV_DTYPES:
            raise EngineLoadError(
                f"a {kv} KV cache is not supported on the CPU: build with --kv float32 or int8"
            )
        title, self._ragged = _graph(plan.config)
        check_graph(plan.directory / title)
        try:
            self._session = ort.InferenceSession(
                str(plan.directory / title), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineLoadError(f"ONNX Runtime {ort.__version__} refused the graph: {error}") from error
        self._plan, self._kv_dtype = plan, _KV_DTYPES[kv]
        self._logits = np.zeros((1, plan.config.model.vocab_size), np.float32)

    def step(self, batch: StepBatch) -> Logits:
        """Runs the batch; the result is valid until the next step.

        Raises ValueError for rows that the contract or the capabilities rule out.
        """
        if self._plan is None:
            raise RuntimeError("step before load")
        rows = batch.rows
        longest = max(len(row.tokens) for row in rows)
        if any(row.slot != rows[0].slot + i for i, row in enumerate(rows)):
            raise ValueError("rows must lie in consecutive slots")
        if len(rows) > 1 and longest > 1 and not self._ragged:
            raise ValueError("a row of several tokens must run alone here")
        # The rotary tables end with the context, the slots with a page.
        capacity = min(
            self._plan.spaces[batch.space].keys[0].shape[2], self._plan.config.model.context_length
        )
        if any(row.past_len + len(row.tokens) > capacity for row in rows):
            raise ValueError(f"a row exceeds the capacity of {capacity} tokens")
        if any(row.past_len + longest > capacity for row in rows):
            # The kernel wants room for the padding too, which a row near the end of its slot has not.
            return np.concatenate([self._run(batch.space, (row,)).copy() for row in rows])
        return self._run(batch.space, rows)

    def close(self) -> None:
        """Gives the weights and scratch memory back."""
        self._bound.clear()
        self._session = None
        self._plan = None
        self._logits = np.zeros((0, 0), np.float32)

    def _run(self, space: int, rows: Sequence[Row]) -> Logits:
        if self._session is None:
            raise RuntimeError("step before load")
        longest = max(len(row.tokens) for row in rows)
        positions = sum(len(row.logit_positions) for row in rows)
        bound = self._bind(_Shape(space, rows[0].slot, len(rows), longest, positions))
        bound.fill(rows)
        self._session.run_with_iobinding(bound.binding)
        return bound.logits

    def _bind(self, shape: _Shape) -> _Bound:
        if shape.positions > len(self._logits):
            # All bindings share one buffer: 64 of them with one each would hold 100 MB of logits.
            self._bound.clear()
            self._logits = np.zeros((shape.positions, self._logits.shape[1]), np.float32)
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
            query_len=np.zeros(shape.rows, np.int32),
            logit_index=np.zeros(shape.positions, np.int64),
            logits=self._logits[: shape.positions],
        )
        for name in ("input_ids", "past_len", "query_len", "logit_index"):
            bound.binding.bind_cpu_input(name, getattr(bound, name))
        bound.binding.bind_output(
            "logits", "cpu", 0, np.float32, bound.logits.shape, bound.logits.ctypes.data
        )
        space = self._plan.spaces[shape.space]
        for kind, tensors in (("key", space.keys), ("value", space.values)):
            for layer, tensor in enumerate(tensors):
                # Input and output are the same memory: attention then appends in place instead of copying.
                address = tensor.address + shape.first_slot * tensor.slot_stride_bytes
                place = (self._kv_dtype, (shape.rows, *tensor.shape[1:]), address)
                bound.binding.bind_input(f"kv_{kind}_{layer}", "cpu", 0, *place)
                bound.binding.bind_output(f"kv_{kind}_{layer}_out", "cpu", 0, *place)
        return bound


def _graph(config: EngineConfig) -> tuple[str, bool]:
    """Title of the graph for this version of ONNX Runtime, and whether its rows may differ in length."""
    ragged = config.files.graph_ragged
    if ragged is not None and Version(ort.__version__) >= _RAGGED_SINCE:
        return ragged, True
    return config.files.graph, False
