"""The program `edgellm`: its commands, and what happens when one fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgellm.cli import (
    bench,
    bundle,
    device,
    engine,
    export,
    failures,
    fleet,
    generate,
    key,
    pki,
    plan,
    plugins,
    push,
    setup,
    sign,
    top,
)
from edgellm.cli.output import JsonOption, print_facts, print_json

# Base of wrong options and arguments; older typers take it from click, newer ones bring their own.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Root(TyperGroup):
    """The root command: adds the commands of other packages, and turns every failure into two lines."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command of this package, or of another one, which is imported only then."""
        return super().get_command(ctx, cmd_name) or plugins.load_commands().get(cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in plugins.load_commands() if name not in own)]

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs a command line; exits with 1 for a failure and 2 for wrong usage."""
        args = sys.argv[1:] if args is None else list(args)
        as_json = "--json" in args
        extra.setdefault("standalone_mode", not as_json)
        try:
            code = super().main(args, *rest, **extra)
        except _UsageError as error:
            failures.report_json("UsageError", {"message": error.format_message()})
            sys.exit(2)
        except typer.Abort:
            failures.report_json("Interrupted", {})
            sys.exit(130)
        except Exception as error:
            if "--debug" in args:
                raise
            failures.report(failures.explained(error), as_json=as_json)
            sys.exit(1)
        # Without standalone mode an exit code comes back as a value.
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Prepare a language model once; run it, bounded, on a fleet of Jetson boards.

    \b
    edgellm build MODEL --profile orin-nano-8gb    on the build host
    edgellm device add jetson-01 192.0.2.7:7400    once
    edgellm push engine --device jetson-01         sends what is missing, then activates
    edgellm chat --device jetson-01
    """,
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of a failure.")] = False,
) -> None:
    """Takes the options of the program itself; `Root.main` has read them by then."""


@app.command()
def version(json_: JsonOption = False) -> None:
    """Print the version of edgellm."""
    from importlib import metadata

    number = metadata.version("edgellm")
    python = ".".join(str(part) for part in sys.version_info[:3])
    if json_:
        print_json({"edgellm": number, "python": python})
    else:
        print_facts([("edgellm", number), ("python", python)])


app.command("inspect")(bundle.inspect)
app.command("plan")(plan.plan)
app.add_typer(key.app, name="key")
app.command("sign")(sign.sign)
app.command("verify")(sign.verify)
app.add_typer(push.app, name="push")
device.app.command("setup")(setup.setup)
app.add_typer(device.app, name="device")
app.add_typer(engine.app, name="engine")
app.add_typer(fleet.app, name="fleet")
app.add_typer(pki.app, name="pki")
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.add_typer(export.app, name="export")
app.command("top")(top.top)
app.command("bench")(bench.bench)


def main() -> None:
    """Entry point of the console script."""
    # What gRPC would print itself about a handshake that failed, an error says in its two lines.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()
