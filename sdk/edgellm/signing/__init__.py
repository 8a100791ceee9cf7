"""Who stands for an engine: keys, signed envelopes, the statements in them, and what they are worth."""

from edgellm.signing.dsse import Envelope
from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey
from edgellm.signing.statements import Release, Statement
from edgellm.signing.verification import Expected, Keyring, Standing, Verdict, judge

__all__ = [
    "Envelope",
    "Expected",
    "Keyring",
    "PublicKey",
    "Release",
    "SigningError",
    "Standing",
    "Statement",
    "Verdict",
    "judge",
]
