"""An exported Triton repository answers as the engine does: its model.py runs in a process that has nothing
of edgellm, under a stand-in of Triton's Python backend. No Triton server takes part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from packaging.version import Version
from tokenizers import Tokenizer

from edgellm.bundle import Bundle, BundleWriter
from edgellm.export import ServingOptions, TritonExport, export_triton
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import KvName, QuantName
from edgellm_buildhost.runner import Runner
from tests.conftest import make_bundle
from tests.support.tiny_models import make_tiny_hf
from tests.support.triton.config import read_config

STUB = Path(__file__).parents[1] / "support" / "triton" / "stub.py"
PROMPTS = ("the time is in the", "one, two", "and then it was of an old", "x")


class Server:
    """A model under the stand-in: requests in, responses out."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []

    def say(self, **command: object) -> None:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def execute(self, **inputs_by_id: dict[str, Any]) -> None:
        """One batch, as the dynamic batcher makes it; every input gets the dimension of the batch."""
        requests = [
            {"id": name, "inputs": {key: [value] for key, value in inputs.items()}}
            for name, inputs in inputs_by_id.items()
        ]
        self.say(execute=requests)

    def until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Reads what comes up to that event."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))
            if done(self.events[-1]):
                return self.events[-1]
        raise AssertionError(f"the model ended early: {self.events[-3:]}")

    def final(self, *names: str) -> None:
        left = set(names) - {event.get("id") for event in self.events if event.get("final")}
        while left:
            left.discard(self.until(lambda event: event.get("final", False))["id"])

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("id") == name]

    def tokens(self, name: str) -> list[int]:
        return [event["token_id"] for event in self.of(name) if "token_id" in event]

    def answer(self, name: str, **inputs: Any) -> list[dict[str, Any]]:
        self.execute(**{name: inputs})
        self.final(name)
        return self.of(name)


@contextmanager
def serving(export: TritonExport) -> Iterator[Server]:
    config = read_config(export.path.parent / "config.pbtxt")
    command = [sys.executable, "-W", "error", str(STUB), str(export.path), json.dumps(config)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with process:
            server = Server(process)
            first = server.until(lambda event: "ready" in event or "failed" in event)
            assert "ready" in first, first
            yield server
            server.say(finalize=True)
            last = server.until(lambda event: "finalized" in event)
            assert (last["ours"], last["warned"]) == ([], [])
    finally:
        process.kill()


def exported(bundle: Bundle, repository: Path, **options: Any) -> TritonExport:
    return export_triton(bundle, bundle.variants[0], repository, ServingOptions(**options))


def greedy(export: TritonExport, prompt: str, count: int) -> list[int]:
    """What the engine itself answers, one sequence alone, up to the token that ends a text."""
    folder = export.path / "engine"
    config = json.loads((folder / "engine.json").read_bytes())
    fed = Tokenizer.from_file(str(folder / config["files"]["tokenizer"])).encode(prompt).ids
    engine, tokens, past = Runner(folder / config["files"]["graph"], len(fed) + count), [], 0
    logits = np.empty((1, config["model"]["vocab_size"]), np.float32)
    for _ in range(count):
        engine.feed(np.array([fed], np.int64), past, logits)
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in config["tokens"]["eos_ids"]:
            break
        fed, past = tokens[-1:], past + len(fed)
    return tokens


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An engine whose answers go from token to token; with a tied head, random weights repeat one."""
    shape = {"layers": 6, "hidden": 128, "heads": 8, "kv_heads": 4, "ffn": 512, "tied": False}
    return make_bundle(tmp_path_factory.mktemp("varied"), name="varied", shape=shape)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(varied: Bundle, repository: Path) -> TritonExport:
    return exported(varied, repository, max_batch=2, context_tokens=1024, threads=1)


@pytest.fixture(scope="module")
def server(model: TritonExport) -> Iterator[Server]:
    with serving(model) as running:
        yield running


def test_a_batch_answers_each_prompt_with_the_tokens_that_the_engine_gives_it_alone(model, server):
    # Two rows for four prompts of different lengths and answers: rows end, move and are taken again.
    lengths = (12, 3, 25, 7)
    asked = {
        f"batch{i}": {"text_input": [prompt], "max_tokens": [count]}
        for i, (prompt, count) in enumerate(zip(PROMPTS, lengths, strict=True))
    }
    server.execute(**asked)
    server.final(*asked)
    for (name, inputs), prompt in zip(asked.items(), PROMPTS, strict=True):
        expected = greedy(model, prompt, inputs["max_tokens"][0])
        assert server.tokens(name) == expected
        assert len(set(expected)) > 1
        reasons = [event["finish_reason"] for event in server.of(name)]
        assert reasons[:-1] == [""] * (len(expected) - 1)
        assert reasons[-1] == ("length" if len(expected) == inputs["max_tokens"][0] else "stop")


def test_the_text_is_what_the_tokens_decode_to(model, server):
    answer = server.answer("text", text_input=["the thing is"], max_tokens=[40])
    config = json.loads((model.path / "engine" / "engine.json").read_bytes())
    tokenizer = Tokenizer.from_file(str(model.path / "engine" / config["files"]["tokenizer"]))
    # Half a character is held back to the end, and never shown as a replacement.
    text = "".join(event["text_output"] for event in answer)
    assert text
    assert tokenizer.decode(server.tokens("text")).startswith(text.rstrip("�"))


def test_token_ids_may_be_given_instead_of_a_text(model, server):
    config = json.loads((model.path / "engine" / "engine.json").read_bytes())
    tokenizer = Tokenizer.from_file(str(model.path / "engine" / config["files"]["tokenizer"]))
    server.answer("ids", input_ids=tokenizer.encode(PROMPTS[0]).ids, max_tokens=[5])
    assert server.tokens("ids") == greedy(model, PROMPTS[0], 5)


def test_a_prompt_of_several_chunks_gives_the_same_tokens(model, server):
    prompt = PROMPTS[0] * 60
    server.answer("long", text_input=[prompt], max_tokens=[4])
    assert server.tokens("long") == greedy(model, prompt, 4)


def test_a_short_answer_does_not_wait_for_a_long_one(server):
    server.execute(slow={"text_input": ["the"], "max_tokens": [1000]})
    server.until(lambda event: event.get("id") == "slow")
    server.execute(quick={"text_input": ["of"], "max_tokens": [2]})
    server.final("quick")
    assert not any(event["final"] for event in server.of("slow"))
    server.say(cancel="slow")
    server.final("slow")


def test_a_cancelled_request_ends_with_that_error_and_makes_room(server):
    server.execute(
        one={"text_input": ["a"], "max_tokens": [1000]}, two={"text_input": ["b"], "max_tokens": [1000]}
    )
    server.until(lambda event: event.get("id") == "two")
    for name in ("one", "two"):
        server.say(cancel=name)
    server.final("one", "two")
    assert {server.of(name)[-1].get("code") for name in ("one", "two")} == {"CANCELLED"}
    assert len(server.answer("after", text_input=["c"], max_tokens=[2])) == 2


def test_a_seed_repeats_an_answer_and_another_seed_gives_another_one(server):
    drawn = {"text_input": ["the"], "max_tokens": [30], "temperature": [1.5], "top_p": [0.95]}
    server.execute(s1=drawn | {"seed": [7]}, s2=drawn | {"seed": [8]})
    server.execute(s3=drawn | {"seed": [7]})
    server.final("s1", "s2", "s3")
    assert server.tokens("s1") == server.tokens("s3") != server.tokens("s2")


def test_a_tiny_top_p_leaves_only_the_likeliest_token(model, server):
    server.answer("top", text_input=[PROMPTS[0]], max_tokens=[6], temperature=[1.0], top_p=[1e-6])
    assert server.tokens("top") == greedy(model, PROMPTS[0], 6)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "text_input or input_ids"),
        ({"text_input": ["a"], "input_ids": [5]}, "text_input or input_ids"),
        ({"text_input": [""]}, "the prompt is empty"),
        ({"text_input": ["\udcff"]}, "text_input is not UTF-8"),
        ({"text_input": ["a"], "max_tokens": [0]}, "max_tokens is 0"),
        ({"text_input": ["a"], "temperature": [-1.0]}, "temperature is -1.0"),
        ({"text_input": ["a"], "temperature": [float("nan")]}, "temperature is nan"),
        ({"text_input": ["a"], "top_p": [0.0]}, "top_p is 0.0"),
        ({"input_ids": [5, 300]}, "input_ids: a token"),
        ({"input_ids": [-1]}, "input_ids: a token"),
        ({"input_ids": [5] * 1024}, "the prompt has 1024 tokens; there is room for 1023"),
    ],
)
def test_a_bad_input_is_named_and_its_neighbour_is_answered(server, inputs, named, request):
    name = request.node.callspec.id
    server.execute(**{name: inputs, f"{name}-good": {"text_input": ["a"], "max_tokens": [2]}})
    server.final(name, f"{name}-good")
    (refused,) = server.of(name)
    assert refused["code"] == "INVALID_ARG"
    assert named in refused["error"]
    assert len(server.tokens(f"{name}-good")) == 2


def test_a_request_of_several_sequences_is_refused(server):
    server.say(execute=[{"id": "many", "inputs": {"text_input": [["a"], ["b"]]}}])
    server.final("many")
    assert "one sequence in a request" in server.of("many")[0]["error"]


def test_an_answer_ends_where_the_context_does(server):
    answer = server.answer("edge", input_ids=[5] * 1000, max_tokens=[100])
    assert (len(answer), answer[-1]["finish_reason"]) == (24, "length")


def test_unloading_ends_a_running_answer_with_unavailable(model):
    with serving(model) as server:
        server.execute(running={"text_input": ["the"], "max_tokens": [1000]})
        server.until(lambda event: event.get("id") == "running")
    last = server.of("running")[-1]
    assert (last["final"], last["code"]) == (True, "UNAVAILABLE")


def test_the_token_that_ends_a_text_ends_the_answer(varied, tmp_path):
    """One of the engine's own tokens, which it has not given before, is declared to be such a token."""
    plain = exported(varied, tmp_path / "plain", threads=1)
    tokens = greedy(plain, PROMPTS[0], 20)
    at = next(i for i in range(2, 20) if tokens[i] not in tokens[:i])
    path = plain.path / "engine" / "engine.json"
    config = json.loads(path.read_bytes())
    config["tokens"]["eos_ids"] = [tokens[at]]
    path.write_text(json.dumps(config))
    with serving(plain) as server:
        answer = server.answer("stop", text_input=[PROMPTS[0]], max_tokens=[50])
    assert server.tokens("stop") == tokens[: at + 1]
    assert answer[-1]["finish_reason"] == "stop"


def test_an_instance_on_a_gpu_is_refused_when_it_is_loaded(model, tmp_path):
    config = read_config(model.path.parent / "config.pbtxt")
    config["instance_group"][0]["kind"] = "KIND_GPU"
    command = [sys.executable, str(STUB), str(model.path), json.dumps(config)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "KIND_CPU" in json.loads(ended.stdout)["failed"]


@pytest.mark.skipif(
    Version(ort.__version__) < Version("1.32"), reason="an INT8 cache needs ONNX Runtime 1.32"
)
def test_an_engine_with_an_int8_cache_answers_too(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "hf"))
    config = build_engine(checkpoint, QuantName.INT8, files, profile="host", kv=KvName.INT8)
    with BundleWriter(tmp_path / "tiny.bundle") as writer:
        writer.add(files, config)
    model = exported(Bundle.open(tmp_path / "tiny.bundle"), tmp_path / "models", threads=1)
    with serving(model) as server:
        server.answer("one", text_input=[PROMPTS[0]], max_tokens=[8])
    assert server.tokens("one") == greedy(model, PROMPTS[0], 8)
