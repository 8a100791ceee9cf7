"""How a failed command ends: one line of what is wrong, one of what to do, and exit code 1."""

from __future__ import annotations

import json

import typer

from edgellm.errors import EdgellmError


def explained(error: Exception) -> EdgellmError:
    """The error as a user should see it."""
    if isinstance(error, EdgellmError):
        return error
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return EdgellmError(
            f"{where}{error.strerror or error}", "check the path, its permissions and the free space"
        )
    return EdgellmError(
        f"unexpected {type(error).__name__}: {error}",
        "run it again with `edgellm --debug ...` and report the trace",
    )


def report(error: EdgellmError, *, as_json: bool) -> None:
    """Prints the error on standard error, for people or as one JSON object."""
    if as_json:
        facts = {name: value for name, value in vars(error).items() if value not in (None, "")}
        report_json(type(error).__name__, facts)
        return
    typer.secho("error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
    typer.echo(error.message, err=True)
    if error.hint:
        typer.secho("  try: ", err=True, bold=True, nl=False)
        typer.echo(error.hint, err=True)


def report_json(kind: str, facts: dict[str, object]) -> None:
    """Prints an error as one JSON object on standard error."""
    typer.echo(json.dumps({"error": {"kind": kind, **facts}}, ensure_ascii=False), err=True)
