"""How `edgellm plan` shows what fits: boards beside precisions, or the whole division of one board."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

from edgellm.cli.output import human_bytes, print_table

if TYPE_CHECKING:
    from edgellm.fits import Fit


def print_boards(rows: Sequence[Sequence[Fit]], context: int | None) -> None:
    """One row for each board, one column for each precision."""
    first = rows[0][0]
    print_table(
        ("BOARD", "AVAILABLE", *(each.label for each in rows[0])),
        [(row[0].board, human_bytes(row[0].available_bytes), *(_cell(each) for each in row)) for row in rows],
    )
    typer.echo()
    typer.echo(f"a number: the longest context, tokens, for {_sequences(first)} at once")
    if any(not each.fits for row in rows for each in row):
        least = next(each for row in rows for each in row if not each.fits).context_tokens
        asked = "" if context is not None else ", the least that a device accepts"
        typer.echo(f"needs: does not fit; what {_sequences(first)} of {least} tokens would take{asked}")


def print_division(row: Sequence[Fit]) -> None:
    """One board's memory, divided for each precision."""
    board = row[0]
    typer.echo(f"{board.board}: {human_bytes(board.available_bytes)} available, {_sequences(board)} at once")
    typer.echo()
    lines: list[tuple[str, Callable[[Fit], str]]] = [
        ("weights", lambda each: human_bytes(each.weights_bytes)),
        ("workspace", lambda each: human_bytes(each.workspace_bytes)),
        ("headroom", lambda each: human_bytes(each.headroom_bytes)),
        ("KV cache", lambda each: human_bytes(each.kv_bytes)),
        ("a token", lambda each: human_bytes(each.kv_bytes_per_token)),
        ("context", lambda each: f"{each.context_tokens} tokens"),
        ("needs", lambda each: human_bytes(each.needed_bytes)),
        ("fits", _spare),
        ("longest", lambda each: f"{each.largest_context_tokens} tokens"),
    ]
    if board.decode_bound_tokens_per_s is not None:
        lines.append(("decode", lambda each: f"< {each.decode_bound_tokens_per_s:.0f} tokens/s"))
    print_table(
        ("", *(each.label for each in row)),
        [(name, *(say(each) for each in row)) for name, say in lines],
    )
    if board.decode_bound_tokens_per_s is not None:
        typer.echo()
        typer.echo("decode: a bound, not a promise: one sequence, were memory as fast as its datasheet says")


def print_engines(found: Sequence[Fit]) -> None:
    """One row for each board, with the engine that suits it."""
    print_table(
        ("BOARD", "AVAILABLE", "ENGINE", "LONGEST CONTEXT"),
        [(each.board, human_bytes(each.available_bytes), each.engine, _cell(each)) for each in found],
    )


def _cell(each: Fit) -> str:
    if each.fits:
        return str(each.largest_context_tokens)
    return f"needs {human_bytes(each.needed_bytes)}"


def _spare(each: Fit) -> str:
    spare_bytes = each.available_bytes - each.needed_bytes
    return f"{human_bytes(spare_bytes)} left" if each.fits else f"no: {human_bytes(-spare_bytes)} short"


def _sequences(each: Fit) -> str:
    return "1 sequence" if each.max_sequences == 1 else f"{each.max_sequences} sequences"
