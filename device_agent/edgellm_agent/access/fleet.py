"""The fleet as a caller: what comes over MQTT is bounded by the same table, and told in the same log."""

from __future__ import annotations

from edgellm_agent.access import rules
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.refusal import code_name
from edgellm_agent.access.settings import RoleName
from edgellm_agent.errors import DeniedError

_NAME = "fleet"


class Fleet:
    """Asks for, and writes down, what the fleet does here.

    Args:
        role: What the settings allow it.
        audit: None where nothing is written down.
    """

    def __init__(self, role: RoleName, audit: AuditLog | None = None) -> None:
        self.caller = Caller(_NAME, Role[role.upper()])
        self._audit = audit

    def check(self, method: str) -> None:
        """Raises DeniedError if the fleet may not do this."""
        try:
            rules.check(self.caller, method)
        except DeniedError as error:
            if self._audit is not None:
                self._audit.note_refusal(_NAME, str(self.caller.role), method, code_name(error))
            raise

    async def did(self, method: str, subject: str, error: Exception | None = None) -> None:
        """Writes down what became of something that it asked for, if the method's rule says so."""
        if self._audit is not None and rules.RULES[method].audited:
            outcome = "OK" if error is None else code_name(error)
            await self._audit.note(self.caller, method, subject, outcome)
