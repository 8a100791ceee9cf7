"""The options of `edgellm generate` and `edgellm chat` say what the API says, in the same words."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgellm.cli.main import app
from edgellm.v1 import inference_pb2


@pytest.fixture
def ask(home, target):
    """Runs a command against the device, with "Hi" on standard input."""

    def run(command: str, *args: object):
        words = [command, "--device", "jetson-01", *map(str, args)]
        return CliRunner().invoke(app, words, input="Hi")

    assert CliRunner().invoke(app, ["device", "add", "jetson-01", target]).exit_code == 0
    return run


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_a_request_can_say_has_an_option_of_the_same_name(ask, device, command):
    options = {
        "temperature": 0.5,
        "top_p": 0.25,
        "seed": 7,
        "top_k": 40,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
    }
    lengths = {"min_tokens": 2, "max_tokens": 3}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, **lengths}.items()]
    assert ask(command, *args).exit_code == 0
    (request,) = device.requests
    assert request.sampling == inference_pb2.Sampling(**options)
    assert (request.min_tokens, request.max_tokens) == (2, 3)


def test_a_constraint_is_given_as_text_or_in_a_file(ask, device, tmp_path):
    schema, grammar = tmp_path / "city.json", tmp_path / "city.lark"
    schema.write_text('{"type": "string"}')
    grammar.write_text('start: "Oslo"\n')
    for option, value in (
        ("--json-schema", " {}"),
        ("--json-schema", schema),
        ("--lark", 'start: "a"'),
        ("--lark", grammar),
        ("--regex", "yes|no"),
    ):
        for command in ("generate", "chat"):
            assert ask(command, option, value).exit_code == 0
    sent = [request.constraint for request in device.requests]
    assert sent[::2] == sent[1::2]
    assert [(item.WhichOneof("kind"), getattr(item, item.WhichOneof("kind"))) for item in sent[::2]] == [
        ("json_schema", " {}"),
        ("json_schema", '{"type": "string"}'),
        ("lark", 'start: "a"'),
        ("lark", 'start: "Oslo"\n'),
        ("regex", "yes|no"),
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--regex", "a", "--lark", 'start: "a"'), "give one of --json-schema, --regex and --lark"),
        (("--json-schema", "nowhere.json"), "cannot read nowhere.json"),
        (("--lark", "nowhere.lark"), "cannot read nowhere.lark"),
        (("--logprobs", "3"), "add --json"),
        (("--min-p", "1.1"), "--min-p"),
        (("--presence-penalty", "-3"), "--presence-penalty"),
        (("--logprobs", "21", "--json"), "--logprobs"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_wrong_options_are_wrong_usage_and_ask_nothing_of_the_device(ask, device, command, args, words):
    result = ask(command, *args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())
    assert device.requests == []


def test_json_chunks_carry_log_probabilities_when_asked(ask, device):
    device.answer = ("é",)
    lines = ask("generate", "--json", "--logprobs", 1).stdout.splitlines()
    chunk, summary = [json.loads(line) for line in lines]
    other = {"id": 100, "logprob": -1.5, "text": "\ufffd", "bytes": [0xC3]}
    assert chunk["logprobs"] == [
        {"id": 0, "logprob": -0.5, "text": "é", "bytes": [0xC3, 0xA9], "top": [other]}
    ]
    assert (summary["cached_tokens"], summary["accepted_draft_tokens"]) == (2, 1)
    plain = ask("generate", "--json").stdout.splitlines()
    assert json.loads(plain[0]) == {"text": "é", "token_ids": [0]}
