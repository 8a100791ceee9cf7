"""How much of a prompt one step computes: as much as fits into a time budget on this machine, as measured."""

from __future__ import annotations

# Chunks are whole multiples: few shapes for a runner to prepare, and full tiles for its kernels.
_TILE_TOKENS = 16
_WEIGHT = 0.3


class PrefillBudget:
    """Turns seconds into tokens.

    Args:
        seconds: How long a chunk may hold up the running streams.
        longest_tokens: What the memory plan's workspace was counted for.

    """

    def __init__(self, seconds: float, longest_tokens: int) -> None:
        self._seconds = seconds
        self._longest_tokens = longest_tokens
        self._token_s: float | None = None

    def tokens(self, *, others_wait: bool) -> int:
        """Tokens of the next chunk; as many as allowed if no stream waits for it to end."""
        if not others_wait:
            return self._longest_tokens
        if self._token_s is None:
            return min(2 * _TILE_TOKENS, self._longest_tokens)
        tiles = int(self._seconds / self._token_s) // _TILE_TOKENS
        return min(max(1, tiles) * _TILE_TOKENS, self._longest_tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learns from a chunk. A slower one counts at once, a faster one little by little."""
        if tokens < _TILE_TOKENS:
            return
        token_s = seconds / tokens
        if self._token_s is None or token_s > self._token_s:
            self._token_s = token_s
        else:
            self._token_s += _WEIGHT * (token_s - self._token_s)
