"""What goes wrong with keys and signatures."""

from __future__ import annotations

from edgellm.errors import EdgellmError


class SigningError(EdgellmError):
    """A key, an envelope or a statement is missing, malformed or not what it should be."""
