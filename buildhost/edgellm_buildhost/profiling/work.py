"""What a node has to do, read from its graph: bytes of weights, operations for each element of its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

ATTENTION = "GroupQueryAttention"


@dataclass(frozen=True)
class NodeWork:
    """Of one node; what does not apply is 0."""

    weight_bytes: int = 0
    """Codes, scales and zero points of a matrix, as they are stored."""
    operations_per_output: int = 0
    """A multiplication and an addition are two."""
    window_tokens: int = 0
    """Of an attention: it reads the keys and values of so many tokens at most; 0: of all."""


def read_work(graph: Path) -> dict[str, NodeWork]:
    """By name of the node, for those that multiply by a matrix or attend."""
    found = {str(node.name): _work(node) for node in ir.load(graph).graph}
    return {name: work for name, work in found.items() if work is not None}


def kv_bytes(work: NodeWork, batch: int, tokens: int, bytes_per_token: int) -> int:
    """Keys and values that one layer's attention reads in a step of `batch` rows.

    `tokens` are those of a row when the step ends, `bytes_per_token` those of one layer. For a prompt it is
    what lies there: how often blocks of it are read again is up to the kernel.
    """
    seen = min(tokens, work.window_tokens) if work.window_tokens else tokens
    return batch * seen * bytes_per_token


def _work(node: ir.Node) -> NodeWork | None:
    if node.op_type == ATTENTION:
        window = node.attributes.get("local_window_size")
        return NodeWork(window_tokens=max(0, window.as_int()) if window is not None else 0)
    if "MatMul" not in node.op_type:
        return None
    weights = [value.const_value for value in node.inputs[1:] if value is not None]
    stored = [tensor for tensor in weights if tensor is not None]
    if not stored:
        return None
    return NodeWork(sum(tensor.nbytes for tensor in stored), 2 * _depth(node.attributes, stored[0]))


def _depth(attributes: Mapping[str, ir.Attr], matrix: ir.TensorProtocol) -> int:
    """How many products an element of the output is the sum of."""
    return attributes["K"].as_int() if "K" in attributes else int(matrix.shape.numpy()[0])
