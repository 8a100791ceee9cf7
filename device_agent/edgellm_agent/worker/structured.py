"""Structured output: JSON Schema, regular expressions and Lark grammars, enforced token by token.

llguidance (an Earley parser over a lexer of regex derivatives) tells which tokens may follow. This module
bounds what a constraint may cost and makes errors of what llguidance keeps as a state.
"""

from __future__ import annotations

import functools
import json
import re
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from edgellm.v1 import inference_pb2
from edgellm_agent.worker.text import PromptError, TokenTable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_TEXT_BYTES = 64 << 10
# Verdicts kept; with the bound above, at most 4 MiB of grammars.
_MAX_VERDICTS = 32
# Trials take processor time, which is bounded; this is for a machine that gives them none.
_TRIAL_WAIT_S = 5.0
_MAX_MESSAGE = 400
# JSON in one line, as most code writes it. Were all whitespace allowed, a small model could go on with it
# forever, and next to nothing would be forced.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Any bytes but 0xff, which is in no UTF-8 text and marks special tokens and padding for llguidance: the
# tokens that may start it are all that carry text.
_ANY_TEXT = '%llguidance {"allow_invalid_utf8": true}\nstart: /(?-u:[\\x00-\\xFE])*/'

Mask = npt.NDArray[np.uint32]


class GrammarError(RuntimeError):
    """A grammar cannot be followed any further, for instance because a step costs more than allowed."""


class Grammars:
    """Compiles constraints for one engine; thread-safe, and meant to be used off the step thread.

    What is kept is the verdict on a constraint, not its compiled form: copies of an `LLMatcher` share one
    lexer, so a step that costs too much in one answer would end all others of the same constraint. A fresh
    one takes 0.6 ms for a typical schema.
    """

    def __init__(self, tokens: TokenTable, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._trials = _Trials()
        self._verdict = functools.lru_cache(maxsize=_MAX_VERDICTS)(self._trials.verdict)

    def compile(self, constraint: inference_pb2.Constraint) -> Matcher:
        """A matcher for one answer.

        The first call loads the vocabulary, which holds the GIL (SmolLM2's 49,152 tokens: 0.2 s).

        Raises PromptError with the field that is wrong, or GrammarError if the trial process cannot run.
        """
        kind = constraint.WhichOneof("kind")
        if kind is None:
            raise PromptError("constraint", "set `json_schema`, `regex` or `lark`")
        field = f"constraint.{kind}"
        text: str = getattr(constraint, kind)
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise PromptError(field, f"must have at most {MAX_TEXT_BYTES >> 10} KiB")
        vocabulary = self._load(field)
        try:
            grammar = _GRAMMAR_OF[kind](text)
        except ValueError as error:
            raise PromptError(field, _readable(str(error))) from error
        verdict = self._verdict(grammar)
        if verdict:
            raise PromptError(field, _readable(verdict))
        try:
            matcher = Matcher(_new_matcher(vocabulary.tokenizer, grammar), vocabulary)
            matcher.allowed()
        except GrammarError as error:
            raise PromptError(field, str(error)) from error
        return matcher

    def close(self) -> None:
        """Ends the trial process; a later `compile` starts another."""
        self._trials.close()

    def _load(self, field: str) -> _Vocabulary:
        with self._lock:
            try:
                self._vocabulary = self._vocabulary or _Vocabulary.load(
                    self._tokens, self._vocab_size, self._eos_ids
                )
            except ImportError as error:
                raise PromptError(
                    field, "this agent has no llguidance; install it with the extra `edgellm[agent]`"
                ) from error
            except ValueError as error:
                raise PromptError(field, f"not possible with this engine's tokenizer: {error}") from error
            return self._vocabulary


class Matcher:
    """What one answer has matched so far, and what may follow; used by one thread."""

    def __init__(self, llm: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._mask: Mask = np.zeros_like(vocabulary.text)
        # Asking again for the rest of a long forced text would tokenize it again, for each of its tokens.
        self._forced: deque[int] = deque()
        self._ended = False
        # Nothing was consumed, but only now does llguidance see that an empty grammar has ended.
        llm.consume_tokens([])
        self._check()

    def allowed(self) -> Mask:
        """Bitmask over the model's vocabulary, [ceil(vocab / 32)], valid until the next call.

        Token t is bit t % 32 of word t // 32. Only tokens that carry text are ever allowed, and once the
        answer may end, the eos ids. Raises GrammarError if the step costs too much.
        """
        if self.ended:
            np.copyto(self._mask, self._vocabulary.eos)
        elif self._look_ahead():
            self._mask.fill(0)
            self._mask[self._forced[0] >> 5] = 1 << (self._forced[0] & 31)
        else:
            _fill(self._llm, self._mask)
            self._check()
            self._mask &= self._vocabulary.text
            if self._llm.is_accepting():
                self._mask |= self._vocabulary.eos
        if not self._mask.any():
            raise GrammarError("no text can match it any more")
        return self._mask

    def accept(self, token: int) -> None:
        """Moves on by the token that was chosen.

        Raises ValueError if the grammar forbids it, which leaves the matcher as it was, or GrammarError.
        """
        if token in self._vocabulary.eos_ids and (self.ended or self._llm.is_accepting()):
            self._ended = True
            return
        in_order = not self._forced or token == self._forced[0]
        if self.ended or not in_order or not self._vocabulary.has_text(token):
            raise ValueError(f"token {token} is not allowed here")
        consumed = self._llm.try_consume_tokens([token])
        self._check()
        if consumed != 1:
            raise ValueError(f"token {token} is not allowed here")
        if self._forced:
            self._forced.popleft()

    @property
    def ended(self) -> bool:
        """The answer is complete: nothing but the end may follow."""
        return self._ended or self._llm.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must follow now, one after the other; [] if there is a choice.

        The text that must follow may be longer: its last characters may yet merge with what the model
        chooses. Raises GrammarError.
        """
        self._look_ahead()
        return list(self._forced)

    def _look_ahead(self) -> bool:
        """Whether tokens are forced now, after asking for them if none are known."""
        if not self._forced and not self.ended:
            tokens = self._llm.compute_ff_tokens()
            self._check()
            if all(self._vocabulary.has_text(token) for token in tokens):
                self._forced.extend(tokens)
        return bool(self._forced)

    def _check(self) -> None:
        if self._llm.is_error():
            raise GrammarError(_readable(self._llm.get_error()))


@dataclass(frozen=True)
class _Vocabulary:
    """The model's tokens as llguidance sees them; `text` and `eos` are bitmasks."""

    tokenizer: LLTokenizer
    eos_ids: frozenset[int]
    text: Mask
    eos: Mask

    @classmethod
    def load(cls, tokens: TokenTable, vocab_size: int, eos_ids: Sequence[int]) -> _Vocabulary:
        from llguidance import LLTokenizer  # noqa: PLC0415

        shared = cast("Any", _SharedTokenizer(tokens, vocab_size, eos_ids[0]))
        tokenizer = LLTokenizer(shared, n_vocab=vocab_size, eos_token=list(eos_ids))
        # llguidance has its own copy now.
        shared.tokens = []
        text, eos = (np.zeros((vocab_size + 31) // 32, np.uint32) for _ in range(2))
        for token in eos_ids:
            eos[token >> 5] |= np.uint32(1 << (token & 31))
        _fill(_new_matcher(tokenizer, _ANY_TEXT), text)
        text &= ~eos
        return cls(tokenizer, frozenset(eos_ids), text, eos)

    def has_text(self, token: int) -> bool:
        return 0 <= token >> 5 < len(self.text) and bool(self.text[token >> 5] >> (token & 31) & 1)


class _SharedTokenizer:
    """The engine's tokenizer as llguidance wants it: a second one would take 16 MB more (SmolLM2)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: TokenTable, vocab_size: int, eos_id: int) -> None:
        if len(tokens) > vocab_size:
            raise ValueError(f"it has {len(tokens)} tokens, the model {vocab_size}")
        self.eos_token_id = eos_id
        self.special_token_ids = tokens.special_ids
        # Padding stands for nothing.
        self.tokens = [tokens[i] for i in range(len(tokens))] + [b""] * (vocab_size - len(tokens))
        self._tokenizer = tokens.tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class _Trials:
    """Owns the process that compiles grammars on trial (grammar_trial.py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def verdict(self, grammar: str) -> str:
        """Why the grammar is refused; "" if it is fine."""
        with self._lock:
            try:
                return self._ask(grammar)
            except (OSError, ValueError) as error:
                self._end()
                raise GrammarError(f"the grammar could not be tried: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, grammar: str) -> str:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-m", "edgellm_agent.worker.grammar_trial"]
            # An allocation that fails is reported to stderr, by the client's doing and not ours.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        question, answer = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        question.write(json.dumps(grammar).encode() + b"\n")
        question.flush()
        if not select.select([answer], [], [], _TRIAL_WAIT_S)[0]:
            raise TimeoutError(f"no answer within {_TRIAL_WAIT_S:.0f} s")
        return str(json.loads(answer.readline()))

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            # communicate() closes the pipes, and what was written to a dead process is lost.
            self._process.communicate()
            self._process = None


def _new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher  # noqa: PLC0415

    from edgellm_agent.worker.grammar_trial import limits  # noqa: PLC0415

    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits())


def _fill(llm: LLMatcher, mask: Mask) -> None:
    from llguidance.numpy import fill_next_token_bitmask  # noqa: PLC0415

    fill_next_token_bitmask(llm, mask.view(np.int32)[np.newaxis])


def _json_schema(text: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE)  # type: ignore[arg-type]


def _regex(text: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    return LLMatcher.grammar_from_regex(text)


def _lark(text: str) -> str:
    # Passed bare, a text that begins with a brace would be taken for llguidance's own format.
    return json.dumps({"grammars": [{"lark_grammar": text}]})


_GRAMMAR_OF: dict[str, Callable[[str], str]] = {"json_schema": _json_schema, "regex": _regex, "lark": _lark}


def _readable(message: str) -> str:
    """What llguidance says, without its marks, in a length that fits a status."""
    if "NoExtensionBias" in message:
        return "no text can match it"
    if "unknown special token" in message or "Token range end too large" in message:
        # The trial process knows bytes, not the model's tokens.
        return "a grammar of text cannot name tokens of the model"
    cause = re.search("^error: (.+)", message, re.MULTILINE)
    if cause:
        return f"invalid regex: {cause[1]}"
    text = message.partition("<backtrace>")[0].replace("<non-verbose/>", "")
    return " ".join(text.split())[:_MAX_MESSAGE]
