"""The one place where a gRPC status and its details become an error of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from edgellm.errors import DeviceUnreachableError, EdgellmError, RemoteError

_HINTS = {
    "DATA_LOSS": "push again; if that does not help, check the bundle with `edgellm inspect`",
    "DEADLINE_EXCEEDED": "allow more time, or see with `edgellm device info` whether the device is busy",
    "FAILED_PRECONDITION": "see what the device has with `edgellm device info` and `edgellm engine list`",
    "NOT_FOUND": "see what the device has with `edgellm engine list`",
    "PERMISSION_DENIED": "ask the device's owner for access",
    "UNAUTHENTICATED": "ask the device's owner for access",
    "RESOURCE_EXHAUSTED": "ask for less, or free memory or disk space on the device",
    "UNIMPLEMENTED": "bring agent and client to the same version",
}
_DEFAULT_HINT = "see the agent's log on the device"
# What gRPC says of a TLS handshake that failed: what it means, and what to do.
_TLS = (
    (
        "Hostname Verification Check failed",
        "its certificate is another device's",
        "check the address; the name in its certificate is the device's, or what --server-name says",
    ),
    (
        "certificate has expired",
        "its certificate has expired",
        "renew it with `edgellm pki renew` and copy it to the board; are both clocks right?",
    ),
    (
        "certificate is not yet valid",
        "its certificate is not valid yet",
        "set the clocks right, the board's and this machine's",
    ),
    (
        "unable to get local issuer certificate",
        "its certificate is from another authority",
        "check that ca.pem here is that of the authority which issued the board's certificate",
    ),
    (
        # Older gRPC gives no reason.
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not trusted",
        "check ca.pem here, and when the board's certificate expires",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "it does not speak TLS",
        "check the port: HOST:PORT is the agent's with certificates; or reach it over ssh://",
    ),
)
# With TLS 1.3 a server that does not want our certificate hangs up after the handshake, and says nothing.
_HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe")


class _FailedCall(Protocol):
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...


@contextmanager
def translated(target: str) -> Iterator[None]:
    """Turns the failure of a call to `target` into DeviceUnreachableError or RemoteError."""
    try:
        yield
    except grpc.RpcError as error:
        raise translate(cast("_FailedCall", error), target) from error


def translate(call: _FailedCall, target: str) -> EdgellmError:
    """The error that a failed call means."""
    code, message = call.code(), call.details() or ""
    status = _status(call)
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        # gRPC says so itself when there is no connection; a device that answers adds details.
        what, hint = _unreachable(message.rpartition("last error: ")[2], target)
        return DeviceUnreachableError(f"cannot reach the device at {target}: {what}", hint)
    return _remote_error(code.name, message, status or status_pb2.Status())


def _unreachable(message: str, target: str) -> tuple[str, str]:
    """What gRPC's words mean, and what to do about it."""
    for words, meaning, hint in _TLS:
        if words in message:
            return meaning, hint
    hung_up = any(words in message for words in _HUNG_UP)
    if hung_up and target.startswith("ssh:"):
        return message, "try again: the next call connects anew, and says what ssh says"
    if hung_up and not target.startswith("unix:"):
        return message, "is our certificate from the device's authority, and not revoked? see the agent's log"
    return message, "check that edgellm-agent runs there, and the address with `edgellm device list`"


def _status(call: _FailedCall) -> status_pb2.Status | None:
    try:
        return cast("status_pb2.Status | None", rpc_status.from_call(cast("grpc.Call", call)))
    except (ValueError, DecodeError):
        return None


def _remote_error(code: str, message: str, status: status_pb2.Status) -> RemoteError:
    violations, info, retry = (
        error_details_pb2.BadRequest(),
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
    )
    unpacked = {
        detail.DESCRIPTOR.name
        for packed in status.details
        for detail in (violations, info, retry)
        if packed.Unpack(detail)
    }
    field = violations.field_violations[0].field if violations.field_violations else ""
    retry_after_s = retry.retry_delay.ToTimedelta().total_seconds() if "RetryInfo" in unpacked else None
    return RemoteError(
        message or code,
        code=code,
        hint=info.metadata.get("hint") or _hint(code, field, retry_after_s),
        field=field,
        needed_bytes=_count(info.metadata.get("needed_bytes")),
        available_bytes=_count(info.metadata.get("available_bytes")),
        retry_after_s=retry_after_s,
    )


def _hint(code: str, field: str, retry_after_s: float | None) -> str:
    if field:
        return f"correct {field}"
    if retry_after_s is not None:
        return f"try again in {retry_after_s:g} s"
    return _HINTS.get(code, _DEFAULT_HINT)


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
