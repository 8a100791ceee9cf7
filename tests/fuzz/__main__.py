"""`python -m tests.fuzz [--inputs N] [--target T] [--seed S] [--input FILE]`: a table, or what failed."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tests.fuzz.run import Fault, Result, Target, bound_memory, run, try_one, watch
from tests.fuzz.targets import NAMES, targets


def main() -> int:
    """Runs what the command line says; 1 if an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--target", choices=NAMES, help="this one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path, help="try the input in this file; needs --target")
    options = parser.parse_args()
    if options.input is not None and options.target is None:
        parser.error("--input needs --target")
    # What is refused is logged, thousands of times.
    logging.disable(logging.CRITICAL)
    bound_memory()
    watch()
    names = NAMES if options.target is None else (options.target,)
    with targets(names) as chosen:
        if options.input is not None:
            return _again(chosen[0], options.input)
        results, faults = [], []
        for target, inputs in _divided(chosen, options.inputs):
            try:
                results.append(run(target, inputs, options.seed, _progress))
            except Fault as fault:  # noqa: PERF203 - the other targets are tried all the same
                faults.append(fault)
        _print_table(results)
        print(*faults, sep="\n")
    return 1 if faults else 0


def _again(target: Target, path: Path) -> int:
    try:
        print(try_one(target, path.read_bytes()))
    except Fault as fault:
        print(fault)
        return 1
    return 0


def _divided(chosen: list[Target], inputs: int) -> list[tuple[Target, int]]:
    """Each target with its number of inputs, by their shares."""
    total = sum(target.share for target in chosen)
    return [(target, max(1, round(inputs * target.share / total))) for target in chosen]


def _progress(result: Result) -> None:
    if result.inputs % 100 == 0 and sys.stderr.isatty():
        rate = result.inputs / max(result.seconds, 0.001)
        print(
            f"\r{result.target:<16} {result.inputs:>8,} {rate:>8,.0f}/s ", end="", file=sys.stderr, flush=True
        )


def _print_table(results: list[Result]) -> None:
    print(f"{'target':<16} {'inputs':>8} {'seconds':>8}  outcomes")
    for result in results:
        common = ", ".join(f"{name} {count:,}" for name, count in result.outcomes.most_common(5))
        more = len(result.outcomes) - 5
        tail = f", {more} more" if more > 0 else ""
        print(f"{result.target:<16} {result.inputs:>8,} {result.seconds:>8.1f}  {common}{tail}")
    inputs, seconds = sum(r.inputs for r in results), sum(r.seconds for r in results)
    print(
        f"{'all':<16} {inputs:>8,} {seconds:>8.1f}  {sum(len(r.outcomes) for r in results)} distinct outcomes"
    )


if __name__ == "__main__":
    sys.exit(main())
