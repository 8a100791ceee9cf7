"""Command line: runs the benchmarks one after the other and prints one table."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import daemon, graph, idle, memory, push, quality, sampler, serving, serving_alone, start
from benchmarks.inputs import Inputs
from benchmarks.machine import describe
from benchmarks.report import Failure, Report, Row, Skipped

BENCHMARKS: dict[str, Callable[[Inputs], Sequence[Row | Skipped]]] = {
    "int8": graph.int8,
    "int4": graph.int4,
    "sampler": sampler.sampler_cost,
    "daemon": daemon.daemon_cost,
    "idle": idle.idle_agent,
    "push": push.push_rate,
    "start": start.start,
    "memory": memory.worker_memory,
    "serving-int8": serving.int8,
    "serving-int4": serving.int4,
    "lookup": serving_alone.prompt_lookup,
    "interference": serving_alone.long_prompt,
    "prefix": serving_alone.cached_prefix,
    "quality": quality.tilted,
    "quality-rotated": quality.rotated,
}
_ROUNDS = 7
_QUICK_ROUNDS = 3


def main() -> int:
    """Slow is a result, not a failure: the exit status is 1 only when something does not run."""
    options = _parse()
    # So that the servers that were started are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    machine = describe(options.model)
    inputs = Inputs(
        model=options.model,
        model_sha256=machine.model_sha256,
        cache=options.cache.resolve(),
        bandwidth_bytes_per_s=machine.bandwidth_bytes_per_s,
        rounds=_QUICK_ROUNDS if options.quick else _ROUNDS,
    )
    rows: list[Row | Skipped] = []
    failures: list[Failure] = []
    for name in options.only or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows += BENCHMARKS[name](inputs)
        except Exception as error:  # noqa: BLE001 - the others still run
            traceback.print_exc()
            failures.append(Failure(name, f"{type(error).__name__}: {error}"))
    measured = [row for row in rows if isinstance(row, Row)]
    skipped = [row for row in rows if isinstance(row, Skipped)]
    report = Report(machine, measured, failures, skipped)
    print(report.to_markdown())
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n", "utf-8")
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="GGUF", help="the model that all sides run"
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too, as JSON")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROUNDS} turns instead of {_ROUNDS}")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(".edgellm/bench"),
        metavar="DIR",
        help="where engines and the peers' files are kept",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
