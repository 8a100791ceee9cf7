"""Where the weights of a graph are: in shards beside it, or given anew at each run."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_buildhost.graph.weights import WeightShards


class WeightValues(Protocol):
    """Makes the graph's values for weights."""

    def value(self, name: str, array: NDArray[Any], shape: tuple[int, ...] | None = None) -> ir.Value:
        """A value for `array`, or for its bytes under another `shape`; the array is not kept."""

    def again(self, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
        """The same bytes under a second name and shape."""


class ShardedValues:
    """Weights are written to shards, and the graph refers to their bytes (ONNX external data)."""

    def __init__(self, shards: WeightShards) -> None:
        """Write to `shards`, which the caller closes."""
        self._shards = shards

    def value(self, name: str, array: NDArray[Any], shape: tuple[int, ...] | None = None) -> ir.Value:
        """Written at once."""
        region = self._shards.append(array)
        dtype = ir.DataType.from_numpy(array.dtype)
        return constant_value(self._shards.tensor(name, region, dtype, shape or array.shape))

    def again(self, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Written once, named twice."""
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            raise TypeError(f"{value.name} lies in no shard")
        return constant_value(
            ir.ExternalTensor(
                location=tensor.location,
                offset=tensor.offset,
                length=tensor.length,
                dtype=tensor.dtype,
                shape=ir.Shape(shape),
                name=name,
                base_dir=tensor.base_dir,
            )
        )


class FedValues:
    """Weights are inputs of the graph: one session serves every layer of a kind, each with its own weights.

    `fed` has the arrays that a run has to give, and `inputs` the graph's inputs for them, in the same order.
    """

    def __init__(self) -> None:
        """Nothing is fed yet."""
        self.fed: dict[str, NDArray[Any]] = {}
        self.inputs: list[ir.Value] = []

    def value(self, name: str, array: NDArray[Any], shape: tuple[int, ...] | None = None) -> ir.Value:
        """An input; the array is kept until the graph's owner takes it."""
        self.fed[name] = array if shape is None else array.reshape(shape)
        dtype = ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, shape=ir.Shape(shape or array.shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def again(self, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
        """A second input for the same array."""
        return self.value(name, self.fed[str(value.name)], shape)


def constant_value(tensor: ir.TensorProtocol) -> ir.Value:
    """A value with a tensor behind it: an initializer."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=str(tensor.name), shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def small_constant(name: str, array: NDArray[Any]) -> ir.Value:
    """A constant that lies in the graph itself."""
    return constant_value(ir.tensor(np.asarray(array), name=name))
