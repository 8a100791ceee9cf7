"""What the agent refuses or fails at; translated to gRPC status in one place, `services.status`."""

from __future__ import annotations


class AgentError(Exception):
    """Base: one sentence of what is wrong."""


class InvalidError(AgentError):
    """A field of the request is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class TooLargeError(AgentError):
    """Will not fit into memory or on disk; both figures in bytes."""

    def __init__(self, message: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class BusyError(AgentError):
    """Too much work is waiting; later it may go."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConflictError(AgentError):
    """Somebody else is just doing this; begin again after a moment."""

    def __init__(self, message: str, retry_after_s: float = 0.5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(AgentError):
    """The engine is starting, restarting or draining."""

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PreconditionError(AgentError):
    """The device is not in a state, or not of a kind, in which this can be done."""


class UntrustedError(PreconditionError):
    """No trusted key stands for the engine, or not for this one, here, now."""


class HeldError(PreconditionError):
    """Somebody holds the engines that run."""


class DeniedError(AgentError):
    """The caller's role does not allow this."""


class UnauthenticatedError(AgentError):
    """Nobody knows who calls."""


class NotFoundError(AgentError):
    """No engine or blob of that name."""


class DataLossError(AgentError):
    """Bytes do not have the digest that they should have."""


class OffsetError(AgentError):
    """A write does not go on where the blob's bytes end."""

    def __init__(self, digest: str, offset_bytes: int) -> None:
        super().__init__(f"{digest} has {offset_bytes} bytes here; go on from there")
        self.offset_bytes = offset_bytes


class DeadlineError(AgentError):
    """The request's deadline passed before its answer was complete."""


class CancelledError(AgentError):
    """The request was cancelled."""


class EngineError(AgentError):
    """The engine failed in itself."""
