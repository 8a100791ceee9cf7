"""Prompts of a wanted length in tokens, all different, without knowing the model's tokenizer."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass

from edgellm.bench.target import Request, Target
from edgellm.errors import EdgellmError

# Common words of four letters: one token each where a vocabulary has words, five where it has only bytes.
# So the number of tokens follows from the number of words.
_TEXT = (
    "able also area away back base best body book both call case city come cost data days deal does done "
    "door down each even ever fact fall farm feel feet felt find fine fire five food form four free full "
    "game gave girl give goes gold gone good half hand hard head hear held help here high hold home hope "
    "hour idea into just keep kind king knew know lack land last late lead left less life line list live "
    "long look lost love made main make many mark mind miss moon more most move much must name near need "
    "next nice note once only open over page part pass past path plan play poor pull push rain rate read "
    "real rest rich ring rise risk road rock role room rule safe said same sand save seat seen self sell "
    "send ship shop show side sign site size snow soft soil some song soon sort stay step stop such sure "
    "take talk tall task team tell term test text than that them then they this time tone took town tree "
    "true turn type unit upon used vast very view vote wait walk wall want warm wash wave week well went "
    "were west what when wide wife wild will wind wish with wood word work yard year your zone"
)
WORDS = _TEXT.split()

# Two lengths give a line; so many words fit the smallest context even at a token per byte.
_FEW_WORDS, SAFE_WORDS = 8, 40


@dataclass(frozen=True)
class WordFit:
    """How many tokens a prompt of so many words has: `overhead_tokens + words * tokens_per_word`."""

    tokens_per_word: float
    overhead_tokens: float

    def words(self, tokens: int) -> int:
        """Words of a prompt of about so many tokens, at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))


@dataclass(frozen=True)
class PromptSource:
    """Deterministic prompts: seed and number give the text, and no two numbers begin alike for long."""

    seed: int
    fit: WordFit

    def prompt(self, number: int, tokens: int, shared_tokens: int = 0) -> str:
        """A prompt of about `tokens`, of which the first `shared_tokens` are the same for every number."""
        count = self.fit.words(tokens)
        shared = min(count, self.fit.words(shared_tokens)) if shared_tokens else 0
        own = words(self.seed, f"prompt {number}", count - shared)
        return " ".join([*words(self.seed, "shared", shared), *own])


def words(seed: int, name: str, count: int) -> list[str]:
    """So many words; the same for the same seed and name."""
    return random.Random(f"{seed} {name}").choices(WORDS, k=count)  # noqa: S311 - no secret


async def fit_words(target: Target, seed: int, most_words: int = SAFE_WORDS) -> WordFit:
    """Learns from two prompts how the target counts tokens; the longer one has `most_words`, more than 8.

    Raises what the target raises, and EdgellmError if it does not say how many tokens a prompt had.
    """
    few, many = _FEW_WORDS, most_words
    few_tokens, many_tokens = [
        await _prompt_tokens(target, " ".join(words(seed, f"probe {count}", count))) for count in (few, many)
    ]
    tokens_per_word = (many_tokens - few_tokens) / (many - few)
    if tokens_per_word <= 0:
        raise EdgellmError(
            f"the target counts {few_tokens} tokens for {few} words and {many_tokens} for {many}",
            "check that it reports the tokens of the prompt",
        )
    return WordFit(tokens_per_word, few_tokens - few * tokens_per_word)


async def _prompt_tokens(target: Target, prompt: str) -> int:
    counted = None
    async with contextlib.aclosing(target.generate(Request(prompt, output_tokens=1))) as pieces:
        async for piece in pieces:
            counted = piece.usage.prompt_tokens if piece.usage else counted
    if counted is None:
        raise EdgellmError(
            "the target does not say how many tokens a prompt has",
            "use the WordFit of a target that serves the same model",
        )
    return counted
