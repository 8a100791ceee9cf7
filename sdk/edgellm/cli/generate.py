"""Commands that ask a device for text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import DeviceOption, JsonOption, TimeoutOption, note, print_json, print_stream

if TYPE_CHECKING:
    from edgellm.client import Completion, Generation, Message

MaxTokensOption = Annotated[int, typer.Option(min=0, help="Most tokens of an answer; 0 lets the device say.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, max=10.0, help="0 always takes the likeliest token.")
]
TopPOption = Annotated[
    float | None, typer.Option(help="Probability mass to choose from, above 0 and up to 1.")
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given several times.")
]
ModelOption = Annotated[str, typer.Option(help="Name or digest of the engine; default: the active one.")]


def generate(
    device: DeviceOption,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; '-' reads standard input.")] = None,
    model: ModelOption = "",
    max_tokens: MaxTokensOption = 0,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Go on from a text, as it is, without a chat template.

    \b
    edgellm generate --device jetson-01 --prompt "Once upon a time"
    edgellm generate --device jetson-01 --json < story.txt | jq -r .text
    """
    from edgellm.client import Client, Sampling

    if prompt in {None, "-"}:
        if prompt is None and sys.stdin.isatty():
            raise typer.BadParameter("give --prompt TEXT, or text on standard input")
        prompt = sys.stdin.read()
    with (
        Client.for_device(device) as client,
        client.generate(
            prompt or "",
            model=model,
            sampling=Sampling(temperature, top_p, seed),
            max_tokens=max_tokens,
            stop=stop or (),
            timeout_s=timeout,
        ) as answer,
    ):
        _print_answer(answer, json_)


def chat(
    device: DeviceOption,
    system: Annotated[str, typer.Option(help="Instruction that precedes the conversation.")] = "",
    model: ModelOption = "",
    max_tokens: MaxTokensOption = 0,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Talk to a model; on a terminal turn by turn, else one answer to standard input.

    \b
    edgellm chat --device jetson-01
    echo "What is a Jetson?" | edgellm chat --device jetson-01 --max-tokens 100
    """
    from edgellm.client import Client, Message, Sampling

    history = [Message("system", system)] if system else []
    with Client.for_device(device) as client:
        ask = partial(
            client.generate,
            model=model,
            sampling=Sampling(temperature, top_p, seed),
            max_tokens=max_tokens,
            timeout_s=timeout,
        )
        if json_ or not sys.stdin.isatty():
            with ask([*history, Message("user", sys.stdin.read().strip())]) as answer:
                _print_answer(answer, json_)
        else:
            _converse(ask, history)


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
            print_json(chunk)
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
