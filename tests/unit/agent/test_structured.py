import ast
import json
import os
import random
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import BPE

from edgellm.v1.inference_pb2 import Constraint
from edgellm_agent.worker import structured
from edgellm_agent.worker.structured import GrammarError, Grammars
from edgellm_agent.worker.text import PromptError, TextStream, TokenTable
from edgellm_buildhost.checkpoint import open_checkpoint
from tests.support.tiny_models import tiny_tokenizer_json

MODEL = Path(__file__).parents[3] / ".edgellm/models/SmolLM2-135M-Instruct.Q4_1.gguf"
# Both tokenizers have their special tokens first, these among them.
EOS_IDS = (2, 0)
# Padding, and not a multiple of 32.
PADDED = 45

real = pytest.param(
    "real",
    marks=[
        pytest.mark.real_model,
        pytest.mark.skipif(not MODEL.exists(), reason="`make model` fetches the weights"),
    ],
)
# llguidance wants DEL escaped, which JSON leaves open.
PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=5)
# A seed decides an answer; the fixture serves all of them.
sampled = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Engine:
    """A tokenizer and what enforces constraints over it."""

    path: Path
    tokenizer: Tokenizer
    grammars: Grammars

    @property
    def special(self):
        return {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}

    def compile(self, **constraint):
        return self.grammars.compile(Constraint(**constraint))

    def answer(self, seed, max_tokens=400, **constraint):
        """Text of an answer whose every token is drawn evenly from those that are allowed."""
        rng, matcher = random.Random(seed), self.compile(**constraint)
        stream, text = TextStream(self.tokenizer), ""
        for _ in range(max_tokens):
            token = int(rng.choice(allowed(matcher)))
            matcher.accept(token)
            if token not in EOS_IDS:
                text += stream.push(token)
            if matcher.ended:
                return text + stream.finish()
        raise AssertionError(f"no end within {max_tokens} tokens: {text}")

    def takes(self, text, **constraint):
        """Whether the constraint allows the text, tokenized as the model would, and then an end."""
        matcher = self.compile(**constraint)
        try:
            for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
                matcher.accept(token)
        except ValueError:
            return False
        return set(EOS_IDS) <= set(allowed(matcher))


def allowed(matcher):
    return np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))


@pytest.fixture(scope="module", params=["tiny", real])
def engine(request, tmp_path_factory):
    if request.param == "tiny":
        source = tiny_tokenizer_json(400).encode()
    else:
        source = open_checkpoint(MODEL).tokenizer.tokenizer_json
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    path.write_bytes(source)
    tokenizer = Tokenizer.from_file(str(path))
    grammars = Grammars(TokenTable(tokenizer), tokenizer.get_vocab_size() + PADDED, EOS_IDS)
    yield Engine(path, tokenizer, grammars)
    grammars.close()


class Gait(Enum):
    WALK = "walk"
    TROT = "trot"


class Pose(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: Annotated[float, Field(ge=-10, le=10)]
    yaw: Annotated[int, Field(ge=-180, le=180)]


class Move(BaseModel):
    model_config = ConfigDict(extra="forbid")
    action: Literal["move"]
    to: Pose
    gait: Gait
    note: Annotated[str, Field(max_length=6)]
    via: Annotated[list[Pose], Field(max_length=2)]
    after: bool | None


@given(seed=st.integers(0, 2**32))
@sampled
def test_any_answer_under_a_schema_is_json_that_the_schema_accepts(engine, seed):
    text = engine.answer(seed, json_schema=json.dumps(Move.model_json_schema()))
    TypeAdapter(Move).validate_json(text, strict=True)


REGEXES = [
    r"[a-z]{1,8}(-[0-9]{2}){0,3}",
    r"(yes|no|perhaps), because [a-z ]{1,20}\.",
    r"-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,3})?",
    r"a/b\\c\n[\t ]{1,3}\"",
    r"[äöüß€😀漢]{1,6}",
    r".{1,12}",
    r"",
]


@pytest.mark.parametrize("regex", REGEXES)
@given(seed=st.integers(0, 2**32))
@sampled
def test_any_answer_under_a_regex_matches_it_as_a_whole(engine, regex, seed):
    assert re.fullmatch(regex, engine.answer(seed, regex=regex))


ARITHMETIC = r"""
start: sum
sum: product (" + " product){0,2}
product: factor ("*" factor){0,2}
factor: NUMBER | "(" NUMBER "-" NUMBER ")"
NUMBER: /[1-9][0-9]{0,3}/
"""


@given(seed=st.integers(0, 2**32))
@sampled
def test_any_answer_under_a_lark_grammar_belongs_to_its_language(engine, seed):
    text = engine.answer(seed, lark=ARITHMETIC)
    assert re.fullmatch(r"[0-9 +*()-]+", text)
    ast.parse(text, mode="eval")


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | PLAIN_TEXT, st.lists, max_leaves=5))
@sampled
def test_the_empty_schema_takes_any_value_as_json_writes_it(engine, value):
    text = json.dumps(value, ensure_ascii=False)
    # SmolLM2 has no token for some bytes of rare characters.
    assume(engine.tokenizer.decode(engine.tokenizer.encode(text).ids) == text)
    assert engine.takes(text, json_schema="{}")


def test_special_tokens_and_padding_are_allowed_by_no_grammar(engine):
    text_ids = set(range(engine.tokenizer.get_vocab_size())) - engine.special
    for constraint in ({"regex": "(?s:.*)"}, {"lark": "start: <[*]>"}, {"lark": "start: /.*/ <[1-200]>"}):
        ids = set(allowed(engine.compile(**constraint)))
        assert ids - set(EOS_IDS) <= text_ids
        assert len(ids) > 250


@pytest.mark.parametrize(
    "lark", ["start: <|im_start|>", 'start: "a" <|im_end|> "b"', "start: <[1]>", "start: <[999]>"]
)
def test_a_special_token_cannot_be_asked_for(engine, lark):
    with pytest.raises(PromptError, match=r"cannot name tokens|no text") as refusal:
        engine.compile(lark=lark)
    assert refusal.value.field == "constraint.lark"


def test_an_end_inside_of_the_answer_is_none(engine):
    matcher = engine.compile(lark='start: "a" <[0]> "b" | "ac"')
    matcher.accept(engine.tokenizer.token_to_id("a"))
    assert not set(allowed(matcher)) & set(EOS_IDS)


def test_where_the_answer_may_end_or_go_on_every_end_is_allowed_beside_text(engine):
    matcher = engine.compile(regex="a+")
    assert not set(allowed(matcher)) & set(EOS_IDS)
    matcher.accept(engine.tokenizer.token_to_id("a"))
    assert not matcher.ended
    ids = set(allowed(matcher))
    assert set(EOS_IDS) < ids
    for eos in EOS_IDS:
        matcher = engine.compile(regex="a+")
        matcher.accept(engine.tokenizer.token_to_id("a"))
        matcher.accept(eos)
        assert matcher.ended


@pytest.mark.parametrize("regex", ["a", ""])
def test_where_nothing_but_the_end_may_follow_the_answer_has_ended(engine, regex):
    matcher = engine.compile(regex=regex)
    for letter in regex:
        assert not matcher.ended
        matcher.accept(engine.tokenizer.token_to_id(letter))
    assert matcher.ended
    assert set(allowed(matcher)) == set(EOS_IDS)
    assert matcher.forced() == []
    with pytest.raises(ValueError, match="not allowed"):
        matcher.accept(engine.tokenizer.token_to_id("a"))


@pytest.mark.parametrize("token", ["b", "<|im_start|>", "<|im_end|>", -1, 10**6])
def test_a_forbidden_token_is_refused_and_changes_nothing(engine, token):
    matcher = engine.compile(regex="[ac]{2}")
    before = matcher.allowed().copy()
    with pytest.raises(ValueError, match="not allowed"):
        matcher.accept(token if isinstance(token, int) else engine.tokenizer.token_to_id(token))
    assert (matcher.allowed() == before).all()


def test_forced_text_is_known_as_tokens_and_nothing_else_is_allowed(engine):
    schema = {"const": {"status": "ready", "battery": "full"}}
    matcher = engine.compile(json_schema=json.dumps(schema))
    tokens = []
    while not matcher.ended:
        forced = matcher.forced()
        tokens += forced or [int(allowed(matcher)[0])]
        for token in forced or tokens[-1:]:
            if forced:
                assert set(allowed(matcher)) == {token}
                with pytest.raises(ValueError, match="not allowed"):
                    matcher.accept(token + 1)
            matcher.accept(token)
    assert json.loads(engine.tokenizer.decode(tokens)) == schema["const"]


def test_a_choice_forces_nothing(engine):
    assert engine.compile(regex="[ab]+").forced() == []


def _chain(rules, name):
    links = "\n".join(f"{name}{i}: {name}{i + 1}" for i in range(rules))
    return f'start: {name}0\n{links}\n{name}{rules}: "a"'


COSTLY = [
    ("json_schema", {"type": "integer", "multipleOf": 999983}, "takes"),
    (
        "json_schema",
        {"allOf": [{"pattern": f"a.*{c}", "type": "string"} for c in "abcdefghij" * 4]},
        "takes|empty",
    ),
    (
        "json_schema",
        {"properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
        "takes",
    ),
    ("json_schema", {"const": "x" * 65000}, "takes"),
    ("json_schema", {"enum": ["x" * 65536]}, "64 KiB"),
    ("regex", "a?" * 20000 + "a", "takes"),
    ("regex", r"\w\W" * 8000, "takes"),
    ("regex", "a{1000000000}", "takes"),
    ("regex", "(" * 30000 + "a" + ")" * 30000, "nest"),
    ("regex", "a" * 65537, "64 KiB"),
    ("lark", _chain(4500, "r"), "nested too deeply|takes"),
    ("lark", _chain(4500, "R"), "nested too deeply|takes"),
    ("lark", "start: " + "(" * 30000 + '"a"' + ")" * 30000, "nested"),
    (
        "lark",
        "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "a"',
        "takes|too big",
    ),
]
WRONG = [
    ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
    ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"allOf": [{"type": "integer"}, {"type": "string"}]}, "Unsatisfiable"),
    ("json_schema", {"$ref": "#"}, "no text can match"),
    ("json_schema", {"$ref": "https://example.com/x.json"}, "example.com"),
    ("json_schema", {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, r'"if", "then"'),
    ("json_schema", {"type": "string", "format": "iri"}, "iri"),
    ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion limit"),
    ("json_schema", '{"type": "integer"', "EOF"),
    ("json_schema", '{}}], "max_tokens": 1, "x": [{"y": {}', "trailing"),
    ("json_schema", "true", "object"),
    ("regex", "(", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"[^\s\S]", "no text can match"),
    ("lark", "start: missing", "missing"),
    ("lark", 'start: "a', "lexer error"),
    ("lark", 'begin: "a"', "no start rule"),
    ("lark", "", "no start rule"),
    ("lark", "start: start", "no text can match"),
    ("lark", '{"grammars": [{"json_schema": {}}]}', "expecting rule"),
]


@pytest.mark.parametrize(("kind", "source", "why"), COSTLY + WRONG)
def test_what_costs_too_much_or_means_nothing_is_refused_by_its_field(engine, kind, source, why):
    text = source if isinstance(source, str) else json.dumps(source)
    with pytest.raises(PromptError, match=why) as refusal:
        engine.compile(**{kind: text})
    assert refusal.value.field == f"constraint.{kind}"
    assert len(str(refusal.value)) < 500


def test_a_constraint_without_a_kind_is_refused(engine):
    with pytest.raises(PromptError, match="set `json_schema`") as refusal:
        engine.compile()
    assert refusal.value.field == "constraint"


@pytest.mark.parametrize(
    "constraint",
    [
        {"lark": 'start: "a" start'},
        {"lark": 'start: "a"{1000000}'},
        {"lark": 'start: e\ne: e e | "a" | '},
        {"regex": r"(\w{1,100}\p{L}{1,100}){1,100}"},
    ],
)
def test_a_grammar_that_explodes_later_ends_its_own_answer_and_no_other(engine, constraint):
    answer, other = engine.compile(**constraint), engine.compile(**constraint)
    before = other.allowed().copy()

    def go_on():
        for _ in range(2000):
            ids = [t for t in allowed(answer) if t not in EOS_IDS]
            answer.accept(int(ids[0]))

    with pytest.raises(GrammarError):
        go_on()
    assert (other.allowed() == before).all()
    assert engine.compile(regex="a").forced()


def test_a_verdict_is_remembered(engine):
    engine.compile(regex="remember me")
    with pytest.raises(PromptError):
        engine.compile(regex="remember me(")
    engine.grammars.close()
    engine.compile(regex="remember me")
    with pytest.raises(PromptError):
        engine.compile(regex="remember me(")
    assert engine.grammars._trials._process is None


def test_a_trial_process_that_died_is_replaced(engine):
    engine.compile(regex="before")
    process = engine.grammars._trials._process
    process.kill()
    process.wait()
    assert engine.compile(regex="after").forced()


def test_a_trial_process_that_hangs_fails_one_request_and_is_replaced(engine, monkeypatch):
    engine.compile(regex="awake")
    os.kill(engine.grammars._trials._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(structured, "_TRIAL_WAIT_S", 0.05)
    with pytest.raises(GrammarError, match="no answer"):
        engine.compile(regex="asleep")
    monkeypatch.undo()
    assert engine.compile(regex="asleep").forced()


def test_threads_may_compile_at_once(engine):
    texts = [f"thread {i} says [a-z]{{1,5}}" for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: engine.answer(0, regex=text), texts))
    assert all(re.fullmatch(text, answer) for text, answer in zip(texts, answers, strict=True))


def test_an_engine_that_is_never_asked_loads_nothing():
    grammars = Grammars(TokenTable(Tokenizer(BPE())), 400, EOS_IDS)
    assert grammars._vocabulary is None
    assert grammars._trials._process is None


def test_without_llguidance_a_constraint_is_refused_with_what_to_install(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PromptError, match=r"edgellm\[agent\]") as refusal:
        Grammars(TokenTable(engine.tokenizer), 400, EOS_IDS).compile(Constraint(regex="a"))
    assert refusal.value.field == "constraint.regex"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(engine):
    with pytest.raises(PromptError, match="this engine's tokenizer") as refusal:
        Grammars(TokenTable(engine.tokenizer), 299, EOS_IDS).compile(Constraint(lark='start: "a"'))
    assert refusal.value.field == "constraint.lark"
