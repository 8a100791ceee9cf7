"""From a verdict on signatures to an endorsement, or to a refusal that says what to do. Pure."""

from __future__ import annotations

from edgellm.bundle import digest as digests
from edgellm.signing.verification import Expected, Keyring, Verdict
from edgellm_agent.errors import UntrustedError
from edgellm_agent.trust.base import Endorsement

_MAX_REASONS = 3


def endorsement(verdict: Verdict, keys: Keyring, expected: Expected, oldest_release: int) -> Endorsement:
    """Who stands for the engine, and as its highest release; raises UntrustedError.

    Args:
        verdict: Of `edgellm.signing.judge`.
        keys: Named in the refusal.
        expected: Named in the refusal.
        oldest_release: Lower ones are refused.
    """
    if not verdict.standing:
        raise UntrustedError(_refusal(verdict.reasons, keys, expected))
    best = max(
        (item.release for item in verdict.standing), key=lambda release: (release.release, release.issued)
    )
    if best.release < oldest_release:
        reason = (
            f"it is release {best.release} of {expected.name},"
            f" and release {oldest_release} was committed on this device before"
        )
        raise UntrustedError(_refusal((reason,), keys, expected))
    names = dict.fromkeys(item.key.name for item in verdict.standing)
    return Endorsement(tuple(names), best.release, float(best.issued))


def _refusal(reasons: tuple[str, ...], keys: Keyring, expected: Expected) -> str:
    why = "; ".join(reasons[:_MAX_REASONS])
    if len(reasons) > _MAX_REASONS:
        why += f"; and {len(reasons) - _MAX_REASONS} more"
    what = f"{expected.name} ({digests.short(expected.digest)}) is not trusted: {why}"
    trusted = ", ".join(key.name for key in keys.trusted)
    if not trusted:
        return f"{what}. No key is trusted here: trust one with `edgellm key trust`"
    return f"{what}. Trusted here: {trusted}. Sign it with `edgellm sign` and push it again"
