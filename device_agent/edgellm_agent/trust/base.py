"""What the life of an engine asks about trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import EngineManifest
from edgellm.signing.verification import Expected, Keyring
from edgellm_agent.trust.retention import retained


@dataclass(frozen=True)
class Endorsement:
    """Who stands for an engine, and as which release."""

    signed_by: tuple[str, ...] = ()
    """Names of trusted keys."""
    release: int = 0
    """0 where none was signed."""
    issued_s: float = 0
    """When the release was signed, seconds since 1970; 0 where none was."""


class Trust(Protocol):
    """Says whether an engine may run here."""

    def retained(
        self,
        manifest: EngineManifest,
        config: EngineConfig,
        stored: Sequence[bytes],
        arrived: Sequence[bytes],
    ) -> list[bytes]:
        """Which attestations about an engine are kept, in the order in which they arrived; see `retention`.

        Raises InvalidError for too many or too large ones at once.
        """

    def admit(
        self,
        manifest: EngineManifest,
        config: EngineConfig,
        attestations: Sequence[bytes],
        *,
        proven: bool,
    ) -> Endorsement:
        """Judges an engine before it is copied, and again before it is activated; raises UntrustedError.

        Args:
            manifest: Of the engine; its digest is what a signature must be about.
            config: Of the engine.
            attestations: DSSE envelopes, JSON, as `retained` chose them; nothing else has been checked.
            proven: It was committed here before: then an older release is no reason to refuse it.
        """

    def committed(self, config: EngineConfig, endorsement: Endorsement) -> None:
        """The engine has proven itself: older releases of the same name are refused from now on."""


class TrustAnyone:
    """Where no key is trusted, no signature is asked for."""

    def retained(
        self,
        manifest: EngineManifest,
        config: EngineConfig,
        stored: Sequence[bytes],
        arrived: Sequence[bytes],
    ) -> list[bytes]:
        """No key, so no signature, goes before others."""
        return retained(stored, arrived, Keyring(), Expected(manifest.digest, config.name, None, now_s=0))

    def admit(
        self,
        manifest: EngineManifest,  # noqa: ARG002
        config: EngineConfig,  # noqa: ARG002
        attestations: Sequence[bytes],  # noqa: ARG002
        *,
        proven: bool,  # noqa: ARG002
    ) -> Endorsement:
        """Nobody stands for it, and nobody has to."""
        return Endorsement()

    def committed(self, config: EngineConfig, endorsement: Endorsement) -> None:
        """Nothing to remember."""
