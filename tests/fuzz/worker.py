"""What reaches the engine's process: frames, requests, and the programs inside bundles and requests."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import socket
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tokenizers import Regex

from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent import ipc
from edgellm_agent.worker.requests import parse_request
from edgellm_agent.worker.sampler import Draw, SamplerState, sample
from edgellm_agent.worker.structured import GrammarError, Grammars
from edgellm_agent.worker.template import ChatTemplate, TemplateRefusedError
from edgellm_agent.worker.text import PromptError, TextModel
from edgellm_agent.worker.tokenizer import check_pattern, encoded, load_tokenizer
from tests.fuzz.mutate import changed_bytes, changed_json, changed_message
from tests.fuzz.run import Target
from tests.support.chat_templates import BOMBS, FAMILIES
from tests.support.tiny_bundle import make_config
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer_json

_REQUESTS = [
    inference_pb2.GenerateRequest(prompt="Hello there", max_tokens=8),
    inference_pb2.GenerateRequest(
        chat={"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hé"}]},
        sampling=inference_pb2.Sampling(
            temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, logit_bias={7: 3.5}
        ),
        stop=["END"],
        stop_token_ids=[5],
        top_logprobs=3,
    ),
    inference_pb2.GenerateRequest(prompt="x", constraint=inference_pb2.Constraint(regex="[ab]+")),
]


def _to_worker() -> list[bytes]:
    messages = [
        worker_pb2.ToWorker(submit=worker_pb2.Submit(id=1, request=request, credit_tokens=9))
        for request in _REQUESTS
    ]
    messages += [
        worker_pb2.ToWorker(cancel=worker_pb2.Cancel(id=1)),
        worker_pb2.ToWorker(ping=worker_pb2.Ping()),
    ]
    return [ipc.encode(message) for message in messages]


def worker_frame(stack: ExitStack, folder: Path) -> Target:
    """Frames that come to the worker."""

    def run(data: bytes) -> str:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(data[:100_000])
            ours.close()
            channel = ipc.WorkerChannel(theirs)
            try:
                return f"{min(9, len(channel.receive(0)))} messages"
            except ipc.FrameError:
                return "FrameError"
            except EOFError:
                return "EOFError"

    return Target("worker-frame", [*_to_worker(), b"".join(_to_worker())], run, folder=folder)


def agent_frame(stack: ExitStack, folder: Path) -> Target:
    """Frames that come to the agent."""
    step = worker_pb2.Step(deltas=[worker_pb2.Delta(id=1, text="é", token_ids=[1, 2])])
    corpus = [
        ipc.encode(worker_pb2.FromWorker(step=step)),
        ipc.encode(worker_pb2.FromWorker(stats=worker_pb2.Stats(running_sequences=3))),
        ipc.encode(worker_pb2.FromWorker(drained=worker_pb2.Drained())),
    ]
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)

    async def read(data: bytes) -> str:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        for count in range(10):
            try:
                await ipc.read_from_worker(reader)
            except ipc.FrameError:  # noqa: PERF203 - a handful
                return "FrameError"
            except asyncio.IncompleteReadError:
                return f"end after {count}"
        return "10 messages"

    return Target("agent-frame", corpus, lambda data: loop.run_until_complete(read(data)), folder=folder)


def _text_model(stack: ExitStack, folder: Path) -> TextModel:
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(300))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    model = TextModel(folder, make_config())
    stack.callback(model.close)
    return model


def request(stack: ExitStack, folder: Path) -> Target:
    """A request's fields, and a token drawn by its parameters from all kinds of logits."""
    model, settings = _text_model(stack, folder), make_config()

    def run(data: bytes) -> str:
        asked = inference_pb2.GenerateRequest()
        try:
            asked.ParseFromString(data)
            parsed = parse_request(asked, model, settings, context_tokens=512)
        except PromptError as error:
            return f"refused: {error.field.partition('[')[0]}"
        except Exception as error:
            if type(error).__name__ != "DecodeError":
                raise
            return "no message"
        rows = np.random.default_rng(len(data)).normal(size=(5, 300)).astype(np.float32)
        rows[1] *= 1e30
        rows[2, 7:] = -np.inf
        rows[3] = 0
        rows[4, ::2] = np.nan
        state = SamplerState(parsed.sampling, parsed.tokens, parsed.seed)
        for choice in sample(rows, [Draw(state)] * 5):
            assert -1 <= choice.token < 300
            assert not math.isnan(choice.logprob or 0)
            state.push(max(0, choice.token))
        return "drawn"

    corpus = [made.SerializeToString() for made in _REQUESTS]
    return Target("request", corpus, run, changed_message(inference_pb2.GenerateRequest), folder)


def _changed_template(rng: random.Random, corpus: list[bytes]) -> bytes:  # type: ignore[override]
    if rng.random() < 0.3:
        words = [
            b"{{",
            b"}}",
            b"{%",
            b"%}",
            b"for",
            b"in",
            b"range(9**9)",
            b"~",
            b"*",
            b"|",
            b"(",
            b")",
            b"[",
            b"]",
            b"set x =",
            b"messages",
            b"x",
            b"'a'",
            b"center",
            b"join",
            b"map",
            b"if",
            b"endif",
            b"endfor",
            b"macro",
            b"9" * 9,
        ]
        return b" ".join(rng.choice(words) for _ in range(rng.randrange(40)))
    return changed_bytes(rng, corpus)


def template(stack: ExitStack, folder: Path) -> Target:
    """The source of a chat template: its process ends what it does, and nothing outlives it."""
    variables = {
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "{{ 7 }}"}],
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }

    def run(data: bytes) -> str:
        made = None
        try:
            made = ChatTemplate(data.decode(errors="replace"))
            text = made.render(variables)
        except TemplateRefusedError as error:
            refusal = str(error)
            assert "failed" not in refusal or "ended" in refusal
            return next((word for word in ("processor", "memory", "nested") if word in refusal), "refused")
        finally:
            if made is not None:
                made.close()
        assert len(text.encode()) <= 4 << 20
        return "rendered"

    sources = [text.encode() for text in (*FAMILIES.values(), *BOMBS.values())]
    return Target("template", sources, run, _changed_template, folder, share=0.2)  # type: ignore[arg-type]


def _small_tokenizer() -> bytes:
    """A tokenizer of few tokens with parts of many kinds."""
    document = json.loads(tiny_tokenizer_json(300))
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}],
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)"},
        "behavior": "Isolated",
        "invert": False,
    }
    document["pre_tokenizer"]["pretokenizers"].insert(0, split)
    return json.dumps(document).encode()


def tokenizer(stack: ExitStack, folder: Path) -> Target:
    """A tokenizer.json: loaded or refused, and if loaded, it encodes or refuses."""
    texts = ("", "Hello  there", "a" * 2000, " " * 2000, "\u0301é世界🙂" * 50)
    _quiet_panics(stack)

    def run(data: bytes) -> str:
        path = folder / "tokenizer.json"
        path.write_bytes(data)
        try:
            loaded = load_tokenizer(path)
        except ValueError:
            return "refused"
        finally:
            path.unlink()
        try:
            assert all(len(encoded(loaded, text)) <= 64 * 8 * (len(text) + 1) for text in texts)
        except ValueError:
            return "refused a text"
        return "encodes"

    corpus = [_small_tokenizer(), tiny_tokenizer_json(300).encode()]
    return Target("tokenizer", corpus, run, changed_json, folder, share=0.5)


def _changed_pattern(rng: random.Random, corpus: list[bytes]) -> bytes:
    pieces = [
        "a",
        "b",
        "\\s",
        "\\p{L}",
        "[ab]",
        "[^a]",
        "(",
        ")",
        "(?:",
        "(?i:",
        "(?!",
        "|",
        "*",
        "+",
        "?",
        "{2}",
        "{1,3}",
        "{2,}",
        ".",
        "^",
        "$",
        "\\b",
        "++",
        "*?",
        "[[:alpha:]]",
        "\\R",
        "\\X",
        "(?=",
        "(?<=",
        "(?>",
        "[a&&b]",
    ]
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14))).encode()


def pattern(stack: ExitStack, folder: Path) -> Target:
    """Regular expressions that pass our check, run on texts that make others hang."""
    from tokenizers import pre_tokenizers

    from tests.unit.agent.test_tokenizer import byte_level

    _quiet_panics(stack)
    texts = ("a" * 60 + "c", "ab" * 40 + "!", " " * 80 + "x")

    def run(data: bytes) -> str:
        text = data.decode(errors="replace")
        try:
            check_pattern(text)
        except ValueError:
            return "refused"
        try:
            split = pre_tokenizers.Split(Regex(text), "isolated")
        except Exception:  # noqa: BLE001 - the library raises nothing more exact for what is no pattern
            return "no pattern"
        try:
            for hard in texts:
                encoded(byte_level(pre_tokenizer=split), hard)
        except ValueError as error:
            # Its limit of ten million steps: what passes our check does not come near it on such short texts.
            if "retry-limit" in str(error):
                raise
            return "refused a text"
        return "matched"

    return Target("pattern", [rb"\p{L}+|\s+(?!\S)"], run, _changed_pattern, folder)  # type: ignore[arg-type]


def constraint(stack: ExitStack, folder: Path) -> Target:
    """Schemas, regular expressions and grammars from clients."""
    model = _text_model(stack, folder)
    grammars = Grammars(model.table, 300, (2,))
    stack.callback(grammars.close)
    kinds = ("json_schema", "regex", "lark")

    def run(data: bytes) -> str:
        kind = kinds[data[0] % 3] if data else "regex"
        asked = inference_pb2.Constraint(**{kind: data[1:].decode(errors="replace")})
        try:
            grammars.compile(asked).allowed()
        except (PromptError, GrammarError) as error:
            return f"{kind}: {type(error).__name__}"
        return f"{kind}: compiled"

    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"enum": [1, "x"]}}},
        "required": ["a"],
    }
    texts = [
        b"\x00" + json.dumps(schema).encode(),
        b"\x01[a-z]{1,9}(x|y)*",
        b'\x02start: "a" b+\nb: /[0-9]+/ | start',
    ]
    # The first one loads the vocabulary, starts the trial process and its pipes.
    grammars.compile(inference_pb2.Constraint(regex="a"))
    return Target("constraint", texts, run, folder=folder, share=0.1)


def _quiet_panics(stack: ExitStack) -> None:
    """The library writes each panic to stderr, by file descriptor."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)

    def back() -> None:
        os.dup2(kept, 2)
        os.close(kept)

    stack.callback(back)
