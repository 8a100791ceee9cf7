"""What goes wrong, in words: each error says what is wrong and, where it is known, what to do about it."""

from __future__ import annotations


class EdgellmError(Exception):
    """Base of every error that a user may see.

    Args:
        message: One line: what is wrong. It is also `str(error)`.
        hint: One line: what to do about it; empty if nothing is known to help.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BundleError(EdgellmError):
    """An engine bundle is missing, malformed or damaged."""


class DoesNotFitError(EdgellmError):
    """Something needs more bytes than there are; both figures are in bytes."""

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class UnknownDeviceError(EdgellmError):
    """No device of that name is known on this machine."""


class DeviceUnreachableError(EdgellmError):
    """Nothing answers at the device's address."""


class RemoteError(EdgellmError):
    """The device answered, and refused or failed.

    Args:
        message: What the device said.
        code: Name of the gRPC status, for example "RESOURCE_EXHAUSTED".
        hint: What to do about it.
        field: Field of the request that is wrong; empty if none was named.
        needed_bytes: Bytes that the request would take, if the device said so.
        available_bytes: Bytes that there are, if the device said so.
        retry_after_s: Seconds after which trying again makes sense, if the device said so.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str = "",
        field: str = "",
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.code = code
        self.field = field
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.retry_after_s = retry_after_s
