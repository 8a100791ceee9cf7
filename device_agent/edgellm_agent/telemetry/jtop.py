"""The source through jetson-stats, for who runs its service anyway: a helper process that is given deadlines.

What jtop does not tell comes from the kernel's files as in `sysfs`: trip points, over-current counters and
memory (jtop's "used" is not what MemAvailable leaves).
"""

import contextlib
import importlib.util
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, cast

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from edgellm.errors import EdgellmError
from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, PartName, Probe
from edgellm_agent.telemetry.files import Discovery
from edgellm_agent.telemetry.memory import MemoryProbe
from edgellm_agent.telemetry.power import OverCurrentCounters
from edgellm_agent.telemetry.thermal import Zone, find_zones, summed_up

log = logging.getLogger(__name__)

HELPER = (sys.executable, "-m", "edgellm_agent.telemetry.jtop_helper")
_MAX_LINE_BYTES = 64 << 10

Name = Annotated[str, Field(min_length=1, max_length=64)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Khz = Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)]
Milli = Annotated[float, Field(ge=-1_000_000, le=1_000_000, allow_inf_nan=False)]


class Rail(BaseModel):
    """One power rail: mV, mA, mW."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mv: Milli | None = None
    ma: Milli | None = None
    mw: Milli


class Sample(BaseModel):
    """One line of the helper's; its docstring has the units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zones: dict[Name, Annotated[float, Field(ge=-60, le=200, allow_inf_nan=False)]] = Field(max_length=64)
    rails: dict[Name, Rail] = Field(max_length=64)
    total_mw: Milli | None = None
    mode: str = Field(default="", max_length=64)
    cpu_percent: Percent | None = None
    cpu_khz: Khz | None = None
    gpu_percent: Percent | None = None
    gpu_khz: Khz | None = None
    gpu_max_khz: Khz | None = None


class _Failure(BaseModel):
    model_config = ConfigDict(extra="forbid")

    error: str


class HelperError(Exception):
    """The helper broke its word: it was late, spoke nonsense, or gave up; the message says which."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for the helper, seconds."""

    # It imports a library and waits for the service's first sample.
    start_s: float = 15.0
    # It speaks once a second; a sample that is older than this is not shown either.
    silence_s: float = 5.0
    # Before it is started again: doubles from the first to the last with each failure, back after a success.
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0


class JtopSource:
    """Owns a thread and a helper process, from construction to `close`."""

    name = "jtop"

    def __init__(
        self,
        root: Path = Path("/"),
        clock: Clock | None = None,
        *,
        patience: Patience | None = None,
        helper: tuple[str, ...] = HELPER,
    ) -> None:
        """Start the helper; raises EdgellmError where jetson-stats is not installed."""
        # Looked for, not imported: that is what the helper is for.
        if helper is HELPER and importlib.util.find_spec("jtop") is None:
            raise EdgellmError(
                "the telemetry source jtop needs jetson-stats, which is not installed",
                "pip install 'edgellm[jetson]', or choose the source sysfs, which needs nothing",
            )
        clock = clock or Clock()
        self._keeper = _Keeper(helper, patience or Patience(), clock)
        latest = self._keeper.latest
        self.probes: tuple[Probe, ...] = (
            _Thermal(latest, root, clock),
            _Power(latest, root, clock),
            _Compute(latest),
            MemoryProbe(root),
        )
        self._keeper.start()

    @property
    def failure(self) -> str:
        """Why there is no sample; empty while there is one, or while the first is waited for."""
        return self._keeper.failure

    @property
    def has_news(self) -> bool:
        """Whether there is a sample, or a reason why not."""
        return bool(self.failure) or self._keeper.latest() is not None

    def wait_for(self, met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a sample or a failure makes a condition true; gives whether it is."""
        with self._keeper.news:
            return self._keeper.news.wait_for(met, timeout_s)

    def close(self) -> None:
        """End the helper, within a second or by force."""
        self._keeper.close()


class _Thermal:
    part: PartName = "thermal"

    def __init__(self, latest: Callable[[], Sample | None], root: Path, clock: Clock) -> None:
        self._latest = latest
        self._zones: Discovery[dict[str, Zone]] = Discovery(
            # jtop shortens "cpu-thermal" to "cpu".
            lambda: {zone.name.split("-")[0]: zone for zone in find_zones(root)},
            clock,
        )

    def read(self) -> telemetry_pb2.Thermal | None:
        if (sample := self._latest()) is None:
            return None
        known = self._zones.get()
        thermal = telemetry_pb2.Thermal()
        for name, celsius in sample.zones.items():
            zone = known.get(name, Zone(name, Path(), None, None))
            thermal.zones.add(
                name=zone.name,
                celsius=celsius,
                passive_celsius=zone.passive_celsius,
                critical_celsius=zone.critical_celsius,
            )
        return summed_up(thermal)


class _Power:
    part: PartName = "power"

    def __init__(self, latest: Callable[[], Sample | None], root: Path, clock: Clock) -> None:
        self._latest = latest
        self._counters = OverCurrentCounters(root, clock)

    def read(self) -> telemetry_pb2.Power | None:
        power = telemetry_pb2.Power(over_current=self._counters.read())
        if (sample := self._latest()) is not None:
            power.mode = sample.mode
            for name, rail in sample.rails.items():
                power.rails.add(name=name, voltage_mv=rail.mv, current_ma=rail.ma, power_mw=rail.mw)
            if sample.total_mw is not None:
                power.total_mw = sample.total_mw
        return power if power.ListFields() else None


class _Compute:
    part: PartName = "compute"

    def __init__(self, latest: Callable[[], Sample | None]) -> None:
        self._latest = latest

    def read(self) -> telemetry_pb2.Compute | None:
        if (sample := self._latest()) is None:
            return None
        compute = telemetry_pb2.Compute(
            cpu_percent=sample.cpu_percent,
            cpu_mhz=_mhz(sample.cpu_khz),
            gpu_percent=sample.gpu_percent,
            gpu_mhz=_mhz(sample.gpu_khz),
            gpu_max_mhz=_mhz(sample.gpu_max_khz),
        )
        return compute if compute.ListFields() else None


def _mhz(khz: float | None) -> float | None:
    # A clock of zero is what jtop says where it knows none.
    return round(khz / 1000, 3) if khz else None


class _Keeper(threading.Thread):
    """Keeps a helper running and its latest sample at hand."""

    def __init__(self, command: tuple[str, ...], patience: Patience, clock: Clock) -> None:
        super().__init__(name="telemetry-jtop", daemon=True)
        # With a lock that may be taken again: a condition that is waited for looks at the sample.
        self.news = threading.Condition(threading.RLock())
        self.failure = ""
        self._command = command
        self._patience = patience
        self._clock = clock
        self._sample: Sample | None = None
        self._sampled_ns = 0
        # Written to by `close`, so that whatever this thread waits for ends at once.
        self._closing, self._closer = os.pipe()

    def latest(self) -> Sample | None:
        """Give the latest sample, None where it is out of date."""
        with self.news:
            age_s = (self._clock.monotonic_ns() - self._sampled_ns) / 1e9
            return self._sample if age_s <= self._patience.silence_s else None

    def run(self) -> None:
        retry_s = self._patience.first_retry_s
        while True:
            served = False
            try:
                with contextlib.closing(_Helper(self._command, self._closing)) as helper:
                    line = helper.line(self._patience.start_s)
                    while line is not None:
                        self._take(_parsed(line))
                        served = True
                        line = helper.line(self._patience.silence_s)
                return
            except (HelperError, OSError) as error:
                retry_s = self._patience.first_retry_s if served else retry_s
                log.warning("telemetry.jtop_failed retry_s=%g reason=%s", retry_s, error)
                self._failed(str(error))
            if _readable(retry_s, self._closing):
                return
            retry_s = min(2 * retry_s, self._patience.last_retry_s)

    def close(self) -> None:
        if self._closer >= 0:
            os.close(self._closer)
            self._closer = -1
            self.join(2.0)
            if not self.is_alive():
                os.close(self._closing)

    def _take(self, sample: Sample) -> None:
        with self.news:
            self._sample, self._sampled_ns, self.failure = sample, self._clock.monotonic_ns(), ""
            self.news.notify_all()

    def _failed(self, reason: str) -> None:
        with self.news:
            self._sample, self.failure = None, reason
            self.news.notify_all()


class _Helper:
    """The helper process, in a group of its own, from construction to `close`."""

    def __init__(self, command: tuple[str, ...], closing: int) -> None:
        self._closing = closing
        self._rest = b""
        # Nothing is ever written to its standard input; that it closes, with this process, ends the helper.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def line(self, deadline_s: float) -> bytes | None:
        """Give the next line; None once the source is closed. Raises HelperError for a line that is late."""
        output = cast("IO[bytes]", self._process.stdout).fileno()
        due_s = time.monotonic() + deadline_s
        while b"\n" not in self._rest:
            if len(self._rest) > _MAX_LINE_BYTES:
                raise HelperError(f"its line is longer than {_MAX_LINE_BYTES} bytes")
            ready = _readable(due_s - time.monotonic(), output, self._closing)
            if self._closing in ready:
                return None
            if not ready:
                raise HelperError(f"it said nothing for {deadline_s:g} s")
            if not (piece := os.read(output, 65536)):
                raise HelperError("it ended without a word")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _readable(timeout_s: float, *descriptors: int) -> set[int]:
    """Wait for something to read, or an end; gives the descriptors that have it, none after the timeout."""
    # Not `select`: it knows no descriptor above 1023.
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)}


def _parsed(line: bytes) -> Sample:
    with contextlib.suppress(pydantic.ValidationError):
        # One line, for the log.
        raise HelperError(" ".join(_Failure.model_validate_json(line).error.split()))
    try:
        return Sample.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise HelperError(f"its sample has no sense: {field:.80}: {first['msg']}") from None
