"""Whose signatures a device takes: the calls of TrustService."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from edgellm.client._sync import Client
from edgellm.signing.keys import PublicKey
from edgellm.v1 import trust_pb2
from edgellm.v1.trust_pb2_grpc import TrustServiceStub

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class KeyInfo:
    """A key as a device knows it; times are UTC, None is no bound, or not revoked."""

    name: str
    key_id: str
    not_before: datetime | None
    not_after: datetime | None
    revoked_at: datetime | None
    provisioned: bool

    @classmethod
    def from_proto(cls, message: trust_pb2.Key) -> Self:
        """Reads the message."""
        return cls(
            message.name,
            message.key_id,
            _time(message, "not_before"),
            _time(message, "not_after"),
            _time(message, "revoked_at"),
            message.provisioned,
        )


class DeviceKeys:
    """The keys of the device that a client is connected to; errors are the client's."""

    def __init__(self, client: Client) -> None:
        self._call = client._call  # noqa: SLF001 - its calls, in a file of their own
        self._stub = TrustServiceStub(client._way.channel)  # noqa: SLF001

    def all(self) -> list[KeyInfo]:
        """All keys, revoked ones too."""
        response = self._call(self._stub.ListKeys, trust_pb2.ListKeysRequest())
        return [KeyInfo.from_proto(key) for key in response.keys]

    def trust(self, key: PublicKey) -> KeyInfo:
        """Trusts a key from now on."""
        message = trust_pb2.Key(name=key.name, public_pem=key.pem)
        if key.not_before_s is not None:
            message.not_before.CopyFrom(Timestamp(seconds=key.not_before_s))
        if key.not_after_s is not None:
            message.not_after.CopyFrom(Timestamp(seconds=key.not_after_s))
        response = self._call(self._stub.TrustKey, trust_pb2.TrustKeyRequest(key=message))
        return KeyInfo.from_proto(response.key)

    def revoke(self, key: str) -> tuple[KeyInfo, list[str]]:
        """Ends the trust in a key, by id or unique name, for good.

        Returns the key, and the digests of the engines for which no other trusted key stands.
        """
        response = self._call(self._stub.RevokeKey, trust_pb2.RevokeKeyRequest(key=key))
        return KeyInfo.from_proto(response.key), [*response.engines]


def _time(message: trust_pb2.Key, field: str) -> datetime | None:
    if not message.HasField(field):  # type: ignore[arg-type]
        return None
    return datetime.fromtimestamp(getattr(message, field).seconds, timezone.utc)
