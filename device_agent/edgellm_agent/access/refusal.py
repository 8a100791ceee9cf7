"""How a refusal is told: its status, and in the details what to do about it."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2

from edgellm_agent.services import status

_DOMAIN = "edgellm"


def to_status(error: Exception) -> status_pb2.Status:
    """As for all errors, with the hint of those that have one."""
    told = status.to_status(error)
    if hint := getattr(error, "hint", ""):
        info = error_details_pb2.ErrorInfo(
            reason=code_pb2.Code.Name(told.code), domain=_DOMAIN, metadata={"hint": hint}
        )
        packed = AnyMessage()
        packed.Pack(info)
        told.details.append(packed)
    return told


def code_name(error: Exception) -> str:
    """Name of the gRPC status that an error is told as."""
    return str(code_pb2.Code.Name(status.to_status(error).code))
