"""Stands for the module that Triton's Python backend gives to a model: what its documentation says, and its
refusals. Source: the python_backend's README, "Usage", "Error Handling" and "Decoupled mode".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = "UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG"
    UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = (
        "UNAVAILABLE",
        "UNSUPPORTED",
        "ALREADY_EXISTS",
        "CANCELLED",
    )

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError("a tensor is made of a numpy array")
        if array.dtype == np.object_ and not all(isinstance(item, bytes) for item in array.flat):
            raise TypeError("a string tensor holds bytes")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceResponseSender:
    """Refuses what the real one refuses: a response after the last one, flags that there are not."""

    def __init__(self, deliver: Callable[[InferenceResponse | None, bool], None]) -> None:
        self._deliver, self._closed, self._lock = deliver, False, threading.Lock()
        self.cancelled = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if flags not in {0, TRITONSERVER_RESPONSE_COMPLETE_FINAL}:
            raise ValueError(f"unable to send response: unknown flags {flags}")
        if response is None and not flags:
            raise ValueError("unable to send response: no response, and not the final flag")
        with self._lock:
            if self._closed:
                raise RuntimeError("unable to send response: the sender has been closed")
            self._closed = bool(flags)
            self._deliver(response, self._closed)

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceRequest:
    def __init__(self, request_id: str, inputs: list[Tensor], sender: InferenceResponseSender) -> None:
        self._id, self._inputs, self._sender = request_id, inputs, sender

    def request_id(self) -> str:
        return self._id

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> InferenceResponseSender:
        return self._sender

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()


class Logger:
    lines: ClassVar[list[str]] = []

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.lines.append(message)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
