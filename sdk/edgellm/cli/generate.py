"""Commands that ask a device for text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import DeviceOption, JsonOption, TimeoutOption, note, print_json, print_stream

if TYPE_CHECKING:
    from edgellm.client import Chunk, Completion, Constraint, Generation, Message, TokenChance

MaxTokensOption = Annotated[int, typer.Option(min=0, help="Most tokens of an answer; 0 lets the device say.")]
MinTokensOption = Annotated[
    int, typer.Option(min=0, help="Neither the model's end nor a stop ends the answer before so many tokens.")
]
TemperatureOption = Annotated[
    float,
    typer.Option(min=0.0, max=10.0, help="0 always takes the likeliest token; 1 is the model as it is."),
]
TopPOption = Annotated[
    float | None, typer.Option(help="Probability mass to choose from, above 0 and up to 1.")
]
TopKOption = Annotated[int, typer.Option(min=0, help="Only so many likeliest tokens; 0 means all.")]
MinPOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Only tokens at least so likely as this share of the likeliest; 0 means all."
    ),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(
        max=10.0, help="Above 1 makes tokens less likely that are in prompt or answer; 1.1 is a mild dose."
    ),
]
PresenceOption = Annotated[
    float, typer.Option(min=-2.0, max=2.0, help="Subtracted from the logits of tokens in the answer.")
]
FrequencyOption = Annotated[
    float,
    typer.Option(min=-2.0, max=2.0, help="Subtracted once for each time that the token is in the answer."),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given several times.")
]
JsonSchemaOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT", help="The answer is JSON of this JSON Schema; '{}' takes any JSON value."
    ),
]
RegexOption = Annotated[
    str | None,
    typer.Option(help="The whole answer matches this regular expression, in Rust's syntax."),
]
LarkOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT", help="The answer follows this Lark grammar, whose start rule is 'start'."
    ),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=20,
        help="With --json: each token's log probability, and those of so many likeliest alternatives.",
    ),
]
ModelOption = Annotated[str, typer.Option(help="Name or digest of the engine; default: the active one.")]


def generate(
    device: DeviceOption,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; '-' reads standard input.")] = None,
    model: ModelOption = "",
    max_tokens: MaxTokensOption = 0,
    min_tokens: MinTokensOption = 0,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    lark: LarkOption = None,
    logprobs: LogprobsOption = None,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Go on from a text, as it is, without a chat template.

    \b
    edgellm generate --device jetson-01 --prompt "Once upon a time"
    edgellm generate --device jetson-01 --json < story.txt | jq -r .text
    edgellm generate --device jetson-01 --prompt "Is water wet? " --regex "yes|no"
    """
    from edgellm.client import Client, Sampling

    _check_logprobs(logprobs, json_)
    constraint = _constraint(json_schema, regex, lark)
    text = _prompt(prompt)
    with (
        Client.for_device(device) as client,
        client.generate(
            text,
            model=model,
            sampling=Sampling(
                temperature,
                top_p,
                seed,
                top_k,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
            ),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop or (),
            top_logprobs=logprobs,
            constraint=constraint,
            timeout_s=timeout,
        ) as answer,
    ):
        _print_answer(answer, json_)


def chat(
    device: DeviceOption,
    system: Annotated[str, typer.Option(help="Instruction that precedes the conversation.")] = "",
    model: ModelOption = "",
    max_tokens: MaxTokensOption = 0,
    min_tokens: MinTokensOption = 0,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    seed: SeedOption = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    lark: LarkOption = None,
    logprobs: LogprobsOption = None,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Talk to a model; on a terminal turn by turn, else one answer to standard input.

    \b
    edgellm chat --device jetson-01
    echo "What is a Jetson?" | edgellm chat --device jetson-01 --max-tokens 100
    echo "Name a city." | edgellm chat --device jetson-01 --json-schema city.json
    """
    from edgellm.client import Client, Message, Sampling

    _check_logprobs(logprobs, json_)
    constraint = _constraint(json_schema, regex, lark)
    history = [Message("system", system)] if system else []
    with Client.for_device(device) as client:
        ask = partial(
            client.generate,
            model=model,
            sampling=Sampling(
                temperature,
                top_p,
                seed,
                top_k,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
            ),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            top_logprobs=logprobs,
            constraint=constraint,
            timeout_s=timeout,
        )
        if json_ or not sys.stdin.isatty():
            with ask([*history, Message("user", sys.stdin.read().strip())]) as answer:
                _print_answer(answer, json_)
        else:
            _converse(ask, history)


def _prompt(given: str | None) -> str:
    if given not in {None, "-"}:
        return given or ""
    if given is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, or text on standard input")
    return sys.stdin.read()


def _check_logprobs(logprobs: int | None, as_json: bool) -> None:
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log probabilities are for programs: add --json", param_hint="--logprobs")


def _constraint(json_schema: str | None, regex: str | None, lark: str | None) -> Constraint | None:
    from edgellm.client import Constraint

    if sum(given is not None for given in (json_schema, regex, lark)) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex and --lark")
    if json_schema is not None:
        # A schema is an object, and no file of that name is likely.
        text = json_schema if json_schema.lstrip().startswith("{") else _read("--json-schema", json_schema)
        return Constraint.json_schema(text)
    if lark is not None:
        # Every rule of a grammar has a colon.
        return Constraint.lark(lark if ":" in lark else _read("--lark", lark))
    return None if regex is None else Constraint.regex(regex)


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint=option) from error


def _converse(ask: Callable[[list[Message]], Generation], history: list[Message]) -> None:
    """Reads and answers until the input ends; Ctrl-C stops an answer, or the conversation between two."""
    import readline  # noqa: F401 - gives input() its line editing

    from edgellm.cli import failures
    from edgellm.client import Message
    from edgellm.errors import RemoteError

    note("Ctrl-D ends the conversation, Ctrl-C stops an answer.", shown=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not text:
            continue
        asked = [*history, Message("user", text)]
        try:
            with ask(asked) as answer:
                completion = _print_answer(answer, as_json=False)
        except KeyboardInterrupt:
            typer.echo()
        except RemoteError as error:
            # The conversation goes on: the device may only be busy, or this turn too long.
            failures.report(error, as_json=False)
        else:
            history = [*asked, Message("assistant", completion.text)]


def _print_answer(answer: Generation, as_json: bool) -> Completion:
    for chunk in answer:
        if as_json:
            print_json(_chunk_facts(chunk))
        else:
            print_stream(chunk.text)
    completion = answer.completion
    if as_json:
        summary = {name: value for name, value in asdict(completion).items() if name != "text"}
        print_json({**summary, "decode_tokens_per_s": completion.decode_tokens_per_s})
        return completion
    typer.echo()
    note(
        f"{completion.completion_tokens} tokens, {completion.decode_tokens_per_s:.1f} per second, "
        f"first after {completion.ttft_s:.2f} s",
        shown=True,
    )
    return completion


def _chunk_facts(chunk: Chunk) -> dict[str, object]:
    facts: dict[str, object] = {"text": chunk.text, "token_ids": chunk.token_ids}
    if chunk.logprobs:
        facts["logprobs"] = [
            {**_token_facts(item.token), "top": [_token_facts(other) for other in item.top]}
            for item in chunk.logprobs
        ]
    return facts


def _token_facts(token: TokenChance) -> dict[str, object]:
    """A token may be a part of a character, which only its bytes tell."""
    text = token.text.decode("utf-8", "replace")
    return {"id": token.id, "logprob": token.logprob, "text": text, "bytes": [*token.text]}
