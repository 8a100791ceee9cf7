"""Passphrases of keys: from a variable that the user names, or from the terminal; never from an argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

PassphraseOption = Annotated[
    str | None,
    typer.Option("--passphrase-env", metavar="VARIABLE", help="Variable with the passphrase of the key."),
]


def new(variable: str | None, *, asked: bool) -> str | None:
    """For a key that is made: from the variable, or typed twice if it was `asked` for; None for none."""
    if variable is not None:
        return read(variable)
    if not asked:
        return None
    return str(typer.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True))


def known(variable: str | None, what: str) -> Callable[[], str] | None:
    """How to get the passphrase of a key that exists; None where nobody can be asked."""
    if variable is not None:
        return lambda: read(variable)
    if not sys.stdin.isatty():
        return None
    return lambda: str(typer.prompt(f"passphrase of {what}", hide_input=True, err=True))


def read(variable: str) -> str:
    """What the variable has, where no list of processes shows it; raises EdgellmError if there is nothing."""
    from edgellm.errors import EdgellmError

    found = os.environ.get(variable)
    if not found:
        raise EdgellmError(f"the variable {variable} is not set", "put the passphrase of the key into it")
    return found
