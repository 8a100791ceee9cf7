"""TrustService: whose signatures this device takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey
from edgellm.v1 import trust_pb2, trust_pb2_grpc
from edgellm_agent.errors import InvalidError
from edgellm_agent.services import status
from edgellm_agent.trust.keys import KnownKey
from edgellm_agent.trust.policy import DeviceTrust, Held


class TrustServicer(trust_pb2_grpc.TrustServiceServicer):
    """List, trust, revoke.

    Args:
        trust: The device's.
        engines: What the device has, for saying whom a revocation leaves without anybody who stands for it.
    """

    def __init__(self, trust: DeviceTrust, engines: Callable[[], Iterable[Held]]) -> None:
        self._trust = trust
        self._engines = engines

    @status.unary
    async def ListKeys(
        self, request: trust_pb2.ListKeysRequest, context: status.Context
    ) -> trust_pb2.ListKeysResponse:
        return trust_pb2.ListKeysResponse(keys=[_message(known) for known in self._trust.known_keys()])

    @status.unary
    async def TrustKey(
        self, request: trust_pb2.TrustKeyRequest, context: status.Context
    ) -> trust_pb2.TrustKeyResponse:
        asked = request.key
        try:
            key = PublicKey.from_pem(
                asked.name,
                asked.public_pem.encode(),
                asked.not_before.seconds if asked.HasField("not_before") else None,
                asked.not_after.seconds if asked.HasField("not_after") else None,
            )
        except SigningError as error:
            raise InvalidError(
                "key", f"{error.message}; {error.hint}" if error.hint else error.message
            ) from None
        return trust_pb2.TrustKeyResponse(key=_message(self._trust.trust(key)))

    @status.unary
    async def RevokeKey(
        self, request: trust_pb2.RevokeKeyRequest, context: status.Context
    ) -> trust_pb2.RevokeKeyResponse:
        revoked, engines = self._trust.revoke(request.key, self._engines)
        return trust_pb2.RevokeKeyResponse(key=_message(revoked), engines=engines)


def _message(known: KnownKey) -> trust_pb2.Key:
    key = known.key
    message = trust_pb2.Key(
        key_id=key.key_id, name=key.name, public_pem=key.pem, provisioned=known.provisioned
    )
    for field, time_s in (
        ("not_before", key.not_before_s),
        ("not_after", key.not_after_s),
        ("revoked_at", known.revoked_at_s),
    ):
        if time_s is not None:
            getattr(message, field).CopyFrom(Timestamp(seconds=int(time_s)))
    return message
