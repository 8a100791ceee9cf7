"""Text to tokens and back: tokenizer, chat template, and a stream that never shows half a character or a stop
string.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from edgellm.bundle.config import EngineConfig
from edgellm_agent.worker.template import ChatTemplate, TemplateRefusedError
from edgellm_agent.worker.tokenizer import encoded, load_tokenizer, survives_panic


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes a byte as a visible character: itself, or one of those from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class PromptError(ValueError):
    """The prompt cannot be turned into tokens; `field` names what is wrong in the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class TokenTable:
    """What each token of a tokenizer stands for, in bytes: a token may be a part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Its state alone: the whole tokenizer as JSON objects would take 20 MB, and not all of it back.
        decoder = tokenizer.decoder
        self._byte_level = decoder is not None and b"ByteLevel" in bytes(decoder.__getstate__())
        self.special_ids = [i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special]

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __getitem__(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id) or ""
        if self._byte_level and token_id not in self.special_ids and all(c in _BYTE_OF for c in token):
            return bytes(_BYTE_OF[c] for c in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def longest_bytes(self) -> int:
        """Most bytes of text that one token can stand for: a text has at least its bytes over this tokens.

        No bound is known where text may shrink before it is cut into tokens.
        """
        if not self._byte_level or self.tokenizer.normalizer is not None:
            return sys.maxsize
        return max(len(self[i]) for i in range(len(self)))


class TextModel:
    """Tokenizer and chat template of one engine."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        self._tokenizer = load_tokenizer(directory / config.files.tokenizer)
        self.table = TokenTable(self._tokenizer)
        self._tokens = config.tokens
        self._template = None
        if config.files.chat_template is not None:
            self._template = _chat_template(directory / config.files.chat_template)

    def close(self) -> None:
        """Ends the process of the chat template; a later chat starts another."""
        if self._template is not None:
            self._template.close()

    @property
    def longest_token_bytes(self) -> int:
        """Most bytes of a prompt that one token can stand for."""
        return self.table.longest_bytes

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a plain prompt."""
        ids = self._ids("prompt", prompt)
        if self._tokens.add_bos and self._tokens.bos_id is not None and ids[:1] != [self._tokens.bos_id]:
            ids = [self._tokens.bos_id, *ids]
        if not ids:
            raise PromptError("prompt", "the prompt is empty")
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the model was taught to read it, ready for the assistant's answer."""
        if self._template is None:
            raise PromptError("chat", "this engine has no chat template; send `prompt` instead")
        if not messages:
            raise PromptError("chat.messages", "a conversation needs at least one message")
        variables = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "bos_token": self._token(self._tokens.bos_id),
            "eos_token": self._token(self._tokens.eos_ids[0]),
        }
        try:
            return self._template.render(variables)
        except TemplateRefusedError as error:
            raise PromptError("chat.messages", f"the model's chat template refused them: {error}") from error

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what `render_chat` made; there are none if it made nothing."""
        return self._ids("chat.messages", text)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new stream for one answer."""
        return TextStream(self._tokenizer, stop)

    def _ids(self, field: str, text: str) -> list[int]:
        try:
            return encoded(self._tokenizer, text)
        except ValueError as error:
            raise PromptError(field, f"the model's tokenizer refused it: {error}") from error

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else (self._tokenizer.id_to_token(token_id) or "")


class TextStream:
    """Turns the tokens of one answer into text, whole characters at a time.

    Text that could be the beginning of a stop string is held back until it is known to be none.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Text that is now sure; sets `stopped` when a stop string was met and may end the answer."""
        self._held += self._decoded(token)
        if not may_stop:
            return self.finish()
        met = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if met:
            self.stopped = True
            text, self._held = self._held[: min(met)], ""
            return text
        keep = self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _decoded(self, token: int) -> str:
        for _ in range(2):
            try:
                with survives_panic():
                    return self._decoder.step(self._tokenizer, token) or ""
            except Exception:  # noqa: BLE001, PERF203 - the library raises nothing more exact
                # Bytes that make no character (byte-fallback tokenizers) confuse it for good: begin anew.
                self._decoder = DecodeStream(skip_special_tokens=True)
        return ""

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        text, self._held = self._held, ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0


def _chat_template(path: Path) -> ChatTemplate:
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the bundle's chat template {path.name} is not usable: {error}") from error
