"""What can go wrong in a build."""

from __future__ import annotations

from edgellm.errors import EdgellmError


class BuildError(EdgellmError):
    """A build that cannot go on: the message names the file or field, the hint says the next step."""

    def __init__(self, message: str, hint: str) -> None:
        """Both lines are needed: a build always has a next step."""
        super().__init__(message, hint)


class UnwantedError(BuildError):
    """What was built is whole, but not what the user allows."""
