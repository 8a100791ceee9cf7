"""Speculative decoding by prompt lookup: guess that what followed these tokens before will follow again.

A guess costs nothing; verifying several tokens in one step costs less than a step each, if enough of them are
right. Drafting from the text itself: Saxena, "Prompt Lookup Decoding", 2023; verifying a draft by sampling
from the model's own distribution: Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023, for the case of a draft without probabilities, where taking the model's own choice and going
on while it equals the draft keeps the distribution as it is.
"""

from __future__ import annotations

import array
from collections.abc import Sequence

_ITEM = array.array("I").itemsize
_LONGEST_MATCH = 4
_SHORTEST_MATCH = 2
# Draft lengths: with the newest token they make steps of 4 and 8, few shapes for a runner to prepare.
_SHORT_DRAFT = 3
_LONG_DRAFT = 7
_GOOD_ACCEPTANCE = 0.4
_FIRST_ACCEPTANCE = 0.5
# New figures weigh so much.
_WEIGHT = 0.3
# A step must bring so much more to be worth its risk.
_MARGIN = 1.05
# A shape that is refused so often (350 times) counts half of its time.
_FORGETTING = 0.998
_FIRST_PAUSE_TOKENS = 8
_LONGEST_PAUSE_TOKENS = 256


class PromptLookup:
    """One sequence's tokens as a searchable text, and how often its guesses were right."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._pause_until = 0
        self._pause_tokens = _FIRST_PAUSE_TOKENS
        self.acceptance = _FIRST_ACCEPTANCE
        """Share of guessed tokens that were right, lately."""

    def propose(self, tokens: Sequence[int], longest: int) -> list[int]:
        """At most so many tokens that followed the longest match of the last ones; none while it pauses."""
        if longest < 1 or len(tokens) < max(self._pause_until, _SHORTEST_MATCH + 1):
            return []
        if self._pause_until:
            # A new start: what follows may be of another kind.
            self._pause_until, self.acceptance = 0, max(self.acceptance, _FIRST_ACCEPTANCE)
        self._text += array.array("I", tokens[len(self._text) // _ITEM :]).tobytes()
        for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            after = self._after_earlier(length)
            if after is not None:
                found = array.array("I", bytes(self._text[after : after + longest * _ITEM]))
                return found.tolist()
        return []

    @property
    def draft_tokens(self) -> int:
        """How many to guess: many while guesses are right, few while they are not."""
        return _LONG_DRAFT if self.acceptance > _GOOD_ACCEPTANCE else _SHORT_DRAFT

    def observe(self, tokens: int, drafted: int, accepted: int, *, paid: bool) -> None:
        """Learns from a verified guess of a sequence of now so many tokens; pauses if it did not pay."""
        self.acceptance += _WEIGHT * (accepted / drafted - self.acceptance)
        if paid and accepted:
            self._pause_tokens = _FIRST_PAUSE_TOKENS
        elif not (paid and self.acceptance > _GOOD_ACCEPTANCE):
            self._pause_until = tokens + self._pause_tokens
            self._pause_tokens = min(2 * self._pause_tokens, _LONGEST_PAUSE_TOKENS)

    def _after_earlier(self, length: int) -> int | None:
        """Byte offset behind the last earlier occurrence of the last `length` tokens."""
        size = length * _ITEM
        end = len(self._text) - _ITEM
        needle = bytes(self._text[-size:])
        while (at := self._text.rfind(needle, 0, end)) >= 0:
            if at % _ITEM == 0:
                return at + size
            end = at + size - 1
        return None


class StepTimes:
    """How long steps of a shape take, learned: rows, and tokens of the longest."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """Learns from one step."""
        known = self._seconds.get((rows, width))
        self._seconds[rows, width] = seconds if known is None else known + _WEIGHT * (seconds - known)

    def pays(self, rows: int, width: int, tokens: float) -> bool:
        """Whether a step of this width that brought so many tokens beat plain ones, as far as is known."""
        plain, wide = self._seconds.get((rows, 1)), self._seconds.get((rows, width))
        return plain is None or wide is None or tokens * plain > rows * wide * _MARGIN

    def worth(self, rows: int, width: int, tokens: float) -> bool:
        """Whether to try a step of this width for so many tokens; unknown ones are tried.

        A refusal makes the next one a little less likely, so that a shape that was slow once is tried again.
        """
        if self.pays(rows, width, tokens):
            return True
        self._seconds[rows, width] *= _FORGETTING
        return False
