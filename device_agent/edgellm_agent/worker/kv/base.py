"""The contract between the KV pool, which decides, and the memory below it, which holds.

A sequence's keys and values lie in a *slot* of a *space*; a space is one tensor per layer and kind, in which
slots are adjacent. Memory hands out handles: what a handle stands for may move, its content stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm_agent.runtimes.base import KvSpace


@dataclass(frozen=True)
class KvGeometry:
    """What one token takes: shape of the cache of one model."""

    layers: int
    kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.item_bytes


@dataclass(frozen=True)
class Place:
    """Where a handle's content lies now."""

    space: int
    slot: int


class KvMemory(Protocol):
    """Memory for the keys and values of many sequences.

    Who allocates a handle owns it and frees it, once. Nothing here decides who gets memory; the caller sees
    to it that the sum of `bytes_for` stays within its bound.
    """

    @property
    def spaces(self) -> tuple[KvSpace, ...]:
        """The tensors, as a runner needs them."""

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence."""

    def bytes_for(self, tokens: int) -> int:
        """What a sequence of so many tokens takes; 0 for none, and never less for more tokens."""

    def allocate(self, tokens: int) -> int | None:
        """A handle with room for so many tokens; None if no slot of that size is free."""

    def extend(self, handle: int, held_tokens: int, tokens: int) -> bool:
        """Gives a handle room for at least `tokens`, keeping its first `held_tokens`.

        False if no slot is free; it is then as it was.
        """

    def trim(self, handle: int, tokens: int) -> None:
        """Gives back what lies beyond the first so many tokens."""

    def free(self, handle: int) -> None:
        """Gives all of it back."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first so many tokens; the target has room for them."""

    def place(self, handle: int) -> Place:
        """Where it lies, until the next `extend` or `arrange`."""

    def arrange(self, handles: Sequence[int]) -> list[list[int]]:
        """Moves content so that as many of these as possible share a step.

        Returns groups in slot order; those of one group lie in adjacent slots of one space.
        """

    def close(self) -> None:
        """Gives everything back; nobody may touch the spaces afterwards."""
