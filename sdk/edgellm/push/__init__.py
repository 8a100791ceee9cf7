"""Pushing one bundle to many devices at once."""

from edgellm.push.rollout import Options, Outcome, Rollout, Watcher

__all__ = ["Options", "Outcome", "Rollout", "Watcher"]
