"""`edgellm-agent doctor`: what this machine tells of itself, what not and why; and recordings of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from edgellm.cli.output import human_bytes, print_facts, print_json, print_table
from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry import compute, memory, power, thermal
from edgellm_agent.telemetry.base import Clock, Part, PartName, Probe, Source
from edgellm_agent.telemetry.files import Wanted, read_bytes
from edgellm_agent.telemetry.jtop import JtopSource
from edgellm_agent.telemetry.recorder import Recorder, refuse_existing
from edgellm_agent.telemetry.sysfs import board_name, l4t_release

# The first sample of jtop may take this long.
_PATIENCE_S = 20.0
# Healthy sensors answer in milliseconds.
_READ_S = 2.0
_SANDBOX_S = 20.0
State = Literal["ok", "absent", "missing"]


@dataclass(frozen=True)
class Figure:
    """A figure of the record, how to show it, the files it comes from, and what to do where it is absent."""

    part: PartName
    name: str
    shown: Callable[[telemetry_pb2.Telemetry], str | None]
    files: tuple[Wanted, ...]
    advice: str
    # Sources without which the agent cannot do its work on such a machine.
    needed: tuple[str, ...] = ()

    @property
    def from_kernel(self) -> bool:
        """Whether the source jtop takes it from the kernel's files, too."""
        return self.part == "memory" or self.name in {"over-current", "margin"}


@dataclass(frozen=True)
class Finding:
    """What came of one figure; `missing` is a fault, `absent` is not."""

    part: PartName
    figure: str
    state: State
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says."""

    source: str
    board: str
    l4t: str
    # Of the source as a whole; empty if there is none.
    problem: str
    findings: tuple[Finding, ...]
    # What confines the engine's worker here.
    sandbox: str = ""

    @property
    def healthy(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.state != "missing" for finding in self.findings)


def _files(group: Sequence[Wanted], *words: str) -> tuple[Wanted, ...]:
    return tuple(wanted for wanted in group if any(word in wanted.pattern for word in words))


def _temperature(record: telemetry_pb2.Telemetry) -> str | None:
    zones = record.thermal.zones
    if not zones:
        return None
    hottest = max(zones, key=lambda zone: zone.celsius)
    return f"{len(zones)} zones, hottest {hottest.name} {hottest.celsius:.1f} °C"


def _margin(record: telemetry_pb2.Telemetry) -> str | None:
    if not record.thermal.HasField("margin_celsius"):
        return None
    return f"{record.thermal.margin_celsius:.1f} °C to the next passive trip point"


def _rails(record: telemetry_pb2.Telemetry) -> str | None:
    rails = [f"{rail.name} {rail.power_mw / 1000:.2f} W" for rail in record.power.rails]
    return ", ".join(rails) or None


def _over_current(record: telemetry_pb2.Telemetry) -> str | None:
    return ", ".join(f"{each.kind} {each.events}" for each in record.power.over_current) or None


def _swap(record: telemetry_pb2.Telemetry) -> str | None:
    total, used = record.memory.swap_total_bytes, record.memory.swap_used_bytes
    if not record.memory.HasField("swap_total_bytes"):
        return None
    return f"{human_bytes(used)} of {human_bytes(total)} used" if total else "off"


def _field(part: PartName, name: str, form: str, unit: float = 1.0) -> Callable[..., str | None]:
    def shown(record: telemetry_pb2.Telemetry) -> str | None:
        figures = getattr(record, part)
        return form.format(getattr(figures, name) / unit) if figures.HasField(name) else None

    return shown


_SENSOR_RIGHTS = "run the agent as a user who may read it"
FIGURES = (
    Figure(
        "thermal",
        "temperature",
        _temperature,
        _files(thermal.FILES, "zone*/temp"),
        "a virtual machine has no sensors",
        ("sysfs", "jtop", "replay"),
    ),
    Figure(
        "thermal",
        "margin",
        _margin,
        _files(thermal.FILES, "trip_point"),
        "the governor has no trip point to keep away from",
    ),
    Figure(
        "power",
        "total",
        _field("power", "total_mw", "{:.2f} W", 1000),
        _files(power.FILES, "curr", "in[1-3]_input", "power1"),
        "without it there are no joules: look for the drivers ina3221 and ina238 in the kernel's log",
        ("sysfs", "jtop", "replay"),
    ),
    Figure("power", "rails", _rails, _files(power.FILES, "in[1-3]_label", "_input"), "as for the total"),
    Figure(
        "power",
        "over-current",
        _over_current,
        _files(power.FILES, "event_cnt"),
        "kernels of JetPack 5.1 and later count it",
    ),
    Figure(
        "power",
        "mode",
        lambda record: record.power.mode or None,
        _files(power.FILES, "nvpmodel"),
        "set one with nvpmodel, which leaves its choice there",
    ),
    Figure(
        "compute",
        "cpu load",
        _field("compute", "cpu_percent", "{:.1f} %"),
        _files(compute.FILES, "proc/stat"),
        "",
    ),
    Figure(
        "compute",
        "cpu clock",
        _field("compute", "cpu_mhz", "{:.0f} MHz"),
        _files(compute.FILES, "cpufreq"),
        "a virtual machine tells none",
    ),
    Figure(
        "compute",
        "gpu load",
        _field("compute", "gpu_percent", "{:.1f} %"),
        _files(compute.FILES, "load"),
        "Thor's driver tells it to NVML only: the source jtop has it",
    ),
    Figure(
        "compute",
        "gpu clock",
        _field("compute", "gpu_mhz", "{:.0f} MHz"),
        _files(compute.FILES, "cur_freq"),
        "is the GPU's driver loaded?",
    ),
    Figure(
        "memory",
        "available",
        lambda record: human_bytes(record.memory.available_bytes) if record.HasField("memory") else None,
        _files(memory.FILES, "meminfo"),
        "the agent cannot plan an engine without it",
        ("sysfs", "jtop", "replay", "host"),
    ),
    Figure("memory", "swap", _swap, _files(memory.FILES, "swaps"), ""),
    Figure(
        "memory",
        "pressure",
        _field("memory", "pressure_some_percent", "{:.2f} % of 10 s"),
        _files(memory.FILES, "pressure"),
        "the kernel needs CONFIG_PSI, and psi=1 on its command line where it is off by default",
    ),
)


def diagnose(source: Source, reading: Reading, root: Path) -> Diagnosis:
    """Tell what was read of a source, and why the rest was not."""
    findings = tuple(_finding(figure, source, reading, root) for figure in FIGURES)
    problem = source.failure if isinstance(source, JtopSource) else ""
    return Diagnosis(source.name, board_name(root), l4t_release(root), problem, findings, _sandbox())


def _sandbox() -> str:
    """What holds in the worker's sandbox: tried in a process of its own, which it cannot leave again."""
    command = [sys.executable, "-m", "edgellm_agent.worker.sandbox"]
    try:
        found = json.loads(
            subprocess.run(command, capture_output=True, timeout=_SANDBOX_S, check=True).stdout
        )
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        return f"cannot be tried: {error}"
    layers = [
        f"Landlock {found['landlock_abi']}" if found["landlock_abi"] else "no Landlock",
        "system calls filtered" if found["system_calls"] else "system calls not filtered",
    ]
    return "; ".join([*layers, *found["problems"]])


def _finding(figure: Figure, source: Source, reading: Reading, root: Path) -> Finding:
    if (shown := figure.shown(reading.record)) is not None:
        return Finding(figure.part, figure.name, "ok", shown)
    state: State = "missing" if source.name in figure.needed else "absent"
    if figure.part not in {probe.part for probe in source.probes}:
        return Finding(figure.part, figure.name, state, f"the source {source.name} does not tell it")
    if figure.part in reading.hung:
        waited = f"reading the {figure.part} part did not end within {_READ_S:g} s"
        return Finding(figure.part, figure.name, state, waited, "look for its driver in the kernel's log")
    if source.name == "host":
        return Finding(figure.part, figure.name, state, "this machine tells none")
    if isinstance(source, JtopSource) and not figure.from_kernel:
        return Finding(figure.part, figure.name, state, "jtop does not tell it")
    reason, advice = _why(figure, root)
    return Finding(figure.part, figure.name, state, reason, advice)


def _why(figure: Figure, root: Path) -> tuple[str, str]:
    """Give what the figure's files lack, and what to do about it."""
    paths = [path for wanted in figure.files for path in sorted(root.glob(wanted.pattern))]
    if not paths:
        return f"no {figure.files[0].pattern}", figure.advice
    for path in paths:
        error = _refusal(path)
        if isinstance(error, PermissionError):
            return f"no right to read {path.relative_to(root)}", _SENSOR_RIGHTS
        if error is not None:
            return f"{path.relative_to(root)}: {error.strerror}", "switched off at the moment, or broken"
    return f"{paths[0].relative_to(root)} tells nothing of it", figure.advice


def _refusal(path: Path) -> OSError | None:
    try:
        read_bytes(path, 4096)
    except OSError as error:
        return error
    return None


@dataclass(frozen=True)
class Reading:
    """A record, and the parts whose read did not end."""

    record: telemetry_pb2.Telemetry
    hung: frozenset[PartName]


async def examine(source: Source, clock: Clock) -> Reading:
    """Read a source twice, a second apart: a load is a share of the time between two reads."""
    if isinstance(source, JtopSource):
        wait = functools.partial(source.wait_for, lambda: source.has_news, _PATIENCE_S)
        await asyncio.to_thread(wait)
    first = _read(source.probes)
    await clock.sleep(1.0)
    second = _read([probe for probe in source.probes if probe.part not in first.hung])
    return Reading(second.record, first.hung | second.hung)


def _read(probes: Sequence[Probe]) -> Reading:
    record = telemetry_pb2.Telemetry()
    hung: set[PartName] = set()
    for probe in probes:
        parts = _within(_READ_S, probe.read)
        if not parts:
            hung.add(probe.part)
        elif parts[0] is not None:
            getattr(record, probe.part).CopyFrom(parts[0])
    return Reading(record, frozenset(hung))


def _within(deadline_s: float, read: Callable[[], Part | None]) -> list[Part | None]:
    """Give what was read, alone in a list; an empty one after the deadline."""
    parts: list[Part | None] = []
    # A wedged sensor keeps its reader for good: a thread that may be left behind.
    thread = threading.Thread(target=lambda: parts.append(read()), daemon=True)
    thread.start()
    thread.join(deadline_s)
    return parts


def report(diagnosis: Diagnosis, *, as_json: bool) -> None:
    """Print it, as an aligned table or one JSON object."""
    if as_json:
        print_json({**dataclasses.asdict(diagnosis), "healthy": diagnosis.healthy})
        return
    print_facts(
        [
            ("source", diagnosis.source),
            ("board", diagnosis.board or "no Jetson"),
            ("L4T", diagnosis.l4t or "-"),
            ("sandbox", diagnosis.sandbox),
            *([("problem", diagnosis.problem)] if diagnosis.problem else []),
        ]
    )
    typer.echo()
    rows = [
        (each.part, each.figure, each.state, "; ".join(text for text in (each.detail, each.advice) if text))
        for each in diagnosis.findings
    ]
    print_table(("PART", "FIGURE", "STATE", "DETAIL"), rows)


def record_sysfs(root: Path, file: Path, seconds: float, interval_s: float, clock: Clock) -> None:
    """Record the board's files; Ctrl-C ends it early and keeps what there is. Raises EdgellmError."""
    refuse_existing(file)
    recorder = Recorder(root, clock)
    with _progress(seconds) as progress, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(recorder.run(seconds, interval_s, progress))
    size = recorder.save(file)
    typer.echo(f"{file}: {human_bytes(size)} with {recorder.count} snapshots of {recorder.files} files")
    typer.echo(
        "It holds temperatures, power, clocks, load, memory, the power modes, the board's type and its "
        "releases of kernel and Jetson Linux; no serial number, name, address or process. `zless` shows it."
    )


@contextlib.contextmanager
def _progress(seconds: float) -> Iterator[Callable[[float], None]]:
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    # Imported here: only a terminal pays for it.
    from rich import progress as bars  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (bars.TextColumn("recording"), bars.BarColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("recording", total=seconds)
        yield lambda done: bar.update(task, completed=done)
