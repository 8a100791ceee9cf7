"""Keys and signed releases for tests; time is given, never read."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.signing import Envelope, PublicKey, Release, times
from edgellm.signing.ed25519 import SigningKey

# 2027-01-15, later than any release of the agent that these tests come with.
NOW_S = 1_800_000_000
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Signer:
    """Both halves of a key."""

    private: SigningKey
    public: PublicKey

    @classmethod
    def make(cls, name: str = "release", begins: int | None = None, ends: int | None = None) -> Signer:
        private = SigningKey.generate()
        return cls(private, PublicKey.from_pem(name, private.public_pem.encode(), begins, ends))

    def release(self, digest: str, **changes: object) -> bytes:
        """An envelope as `edgellm sign` makes it, for `changes` of the release."""
        return release_envelope(digest, **changes).signed(self.private).to_json()


def release_envelope(digest: str, **changes: object) -> Envelope:
    predicate = {
        "name": "tiny-int4",
        "release": 7,
        "issued": times.to_text(NOW_S - DAY_S),
        "expires": times.to_text(NOW_S + 90 * DAY_S),
        "profiles": [],
    }
    return Envelope(Release.checked({**predicate, **changes}).about(digest).to_json())
