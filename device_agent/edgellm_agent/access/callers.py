"""Who is at the other end of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from edgellm_agent.access.caller import Caller
from edgellm_agent.access.relay import Relay
from edgellm_agent.access.users import Users
from edgellm_agent.errors import UnauthenticatedError
from edgellm_agent.services.status import Context

if TYPE_CHECKING:
    # An agent without a port shall not pay for its libraries.
    from edgellm_agent.access.certificates import Certificates

_RELAYED = "unix-abstract:"
_PEM = "x509_pem_cert"


class StrangerError(UnauthenticatedError):
    """No user of this machine, and no certificate."""

    hint = "connect to the agent's Unix socket, or over TLS with a certificate of the device's authority"


class Callers:
    """Recognises callers: by their user on the Unix socket, by their certificate over TLS.

    Args:
        users: Roles of this machine's users.
        relay: The Unix socket; knows who came through it.
        certificates: None where the API is on no port.
    """

    def __init__(self, users: Users, relay: Relay, certificates: Certificates | None) -> None:
        self._users = users
        self._relay = relay
        self._certificates = certificates

    def recognise(self, context: Context) -> Caller:
        """Raises UnauthenticatedError, or DeniedError for a user without a role."""
        address = unquote(context.peer())
        if address.startswith(_RELAYED):
            peer = self._relay.peer(address.removeprefix(_RELAYED))
            if peer is not None:
                return self._users.caller(peer)
        elif self._certificates is not None:
            for pem in context.auth_context().get(_PEM, ()):
                return self._certificates.caller(pem)
        raise StrangerError("nobody knows who calls")
