"""Makes the recordings that ship with the agent: `python scripts/scenarios.py`.

They are computed, not measured: a thermal model of an Orin Nano developer kit (25 W mode) in a room of 35 °C.
The module's heat flows through a small resistance into its heatsink, which has one heat capacity, and from
there into the air through a resistance that depends on the fan. The figures are plausible; the capacity is
about a third of a real heatsink's, so that minutes tell what takes a board a quarter of an hour. Trip points,
rails, zones and modes are those of the public device trees and listings.

Only additions and multiplications of Python's floats go in, so every machine makes the same bytes.
"""

import gzip
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm_agent.telemetry.recording import Content, Header, Snapshot, Unreadable, changes, encoded

FOLDER = Path(__file__).parent.parent / "device_agent/edgellm_agent/telemetry/scenarios"
AMBIENT_CELSIUS = 35.0
IDLE_W = 4.9
# Kelvin per watt: from the die to the heatsink, and from there to the air with the fan and without it.
DIE_TO_SINK, SINK_TO_AIR, STILL_AIR = 0.6, 2.05, 5.5
CAPACITY_J_PER_K = 30.0
PASSIVE_CELSIUS = 99.0
CLOCKS_HZ = (1_020_000_000, 918_000_000, 816_000_000, 714_000_000, 612_000_000, 510_000_000, 408_000_000)
IDLE_HZ = 306_000_000


@dataclass(frozen=True)
class Moment:
    """What a scenario prescribes for one second: watts of a load at full clock, fan, over-current events."""

    load_w: float = 0.0
    fan: bool = True
    average: int = 0
    instantaneous: int = 0


@dataclass
class Board:
    """What the model knows of the board; ticks are the kernel's, 100 a second and core."""

    die_celsius: float
    sink_celsius: float
    watts: float = IDLE_W
    seconds: int = 0
    # Index of CLOCKS_HZ that the board allows itself.
    step: int = 0
    busy_ticks: int = 60_000
    idle_ticks: int = 900_000
    average: int = 0
    instantaneous: int = 0

    def pass_second(self, moment: Moment) -> None:
        """Let a second pass under a load."""
        self._throttle()
        self.watts = IDLE_W + moment.load_w * (CLOCKS_HZ[self.step] / CLOCKS_HZ[0])
        to_air = SINK_TO_AIR if moment.fan else STILL_AIR
        for _ in range(10):
            lost_w = (self.sink_celsius - AMBIENT_CELSIUS) / to_air
            self.sink_celsius += (self.watts - lost_w) / CAPACITY_J_PER_K * 0.1
        self.die_celsius = self.sink_celsius + DIE_TO_SINK * self.watts
        busy = 24 if moment.load_w == 0 else 210
        self.busy_ticks += busy
        self.idle_ticks += 600 - busy
        self.average += moment.average
        self.instantaneous += moment.instantaneous

    def _throttle(self) -> None:
        """Take a step every fourth second: down beyond the trip point, up again 2 °C below it."""
        self.seconds += 1
        if self.seconds % 4:
            return
        if self.die_celsius >= PASSIVE_CELSIUS:
            self.step = min(self.step + 1, len(CLOCKS_HZ) - 1)
        elif self.die_celsius < PASSIVE_CELSIUS - 2:
            self.step = max(self.step - 1, 0)


def heat_up(second: int) -> Moment:
    """A load from second 20 to 230 brings the die near its trip point; then it cools."""
    return Moment(load_w=18.8 if 20 <= second < 230 else 0.0)


def over_current(second: int) -> Moment:
    """Under a steady load come short peaks, which the counters count."""
    if second < 15:
        return Moment()
    if second % 12 in (5, 6):
        return Moment(load_w=21.0, instantaneous=2, average=1 if second % 36 == 5 else 0)
    return Moment(load_w=11.5)


def fan_failure(second: int) -> Moment:
    """The fan stops under a load; past the trip point the board lowers its own clock."""
    return Moment(load_w=16.0 if second >= 10 else 0.0, fan=second < 40)


SCENARIOS: dict[str, tuple[Callable[[int], Moment], int]] = {
    "heat-up": (heat_up, 290),
    "over-current": (over_current, 150),
    "fan-failure": (fan_failure, 240),
}


def lines(name: str) -> Iterator[bytes]:
    """Give a scenario line by line."""
    prescribed, seconds = SCENARIOS[name]
    note = f"{(prescribed.__doc__ or '').strip()} Computed with scripts/scenarios.py, not measured."
    yield encoded(
        Header(
            board="nvidia,p3768-0000+p3767-0005",
            kernel="5.15.148-tegra",
            l4t="R36.4.3",
            started="2026-01-01T00:00:00+00:00",
            note=note,
        )
    )
    noise = random.Random(name)  # noqa: S311 - repeatable is what it has to be
    sink = AMBIENT_CELSIUS + IDLE_W * SINK_TO_AIR
    board = Board(die_celsius=sink + IDLE_W * DIE_TO_SINK, sink_celsius=sink)
    before: dict[str, Content] = {}
    for second in range(seconds + 1):
        moment = prescribed(second)
        board.pass_second(moment)
        after = {**_constant(), **_varying(board, moment, noise)}
        yield encoded(Snapshot(t_s=float(second), files=changes(before, after)))
        before = after


def _constant() -> dict[str, Content]:
    compatible = "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0"
    names = enumerate(("15W", "25W", "MAXN_SUPER"))
    modes = "".join(f"< POWER_MODEL ID={number} NAME={name} >\n" for number, name in names)
    files: dict[str, Content] = {
        "proc/device-tree/compatible": compatible,
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, BOARD: generic, EABI: aarch64\n",
        "etc/nvpmodel.conf": modes,
        "var/lib/nvpmodel/status": "pmode:0001\n",
        "sys/class/devfreq/17000000.gpu/max_freq": f"{CLOCKS_HZ[0]}\n",
        "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/name": "ina3221\n",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 3810304 0 5\n",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    }
    for channel, label in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), start=1):
        files[f"sys/bus/i2c/devices/1-0040/hwmon/hwmon1/in{channel}_label"] = f"{label}\n"
    for number, (name, _) in enumerate(ZONES):
        zone = f"sys/class/thermal/thermal_zone{number}"
        files[f"{zone}/type"] = f"{name}-thermal\n"
        for point, (kind, milli) in enumerate((("critical", 104_500), ("passive", 99_000))):
            files[f"{zone}/trip_point_{point}_type"] = f"{kind}\n"
            files[f"{zone}/trip_point_{point}_temp"] = f"{milli}\n"
    return files


# Kelvin that a zone is cooler than the hottest place; None: gated, for nothing uses those engines.
ZONES: tuple[tuple[str, float | None], ...] = (
    ("cpu", 1.4),
    ("gpu", 0.3),
    ("cv0", None),
    ("cv1", None),
    ("cv2", None),
    ("soc0", 2.6),
    ("soc1", 1.9),
    ("soc2", 2.9),
    ("tj", 0.0),
)


def _varying(board: Board, moment: Moment, noise: random.Random) -> dict[str, Content]:
    busy = moment.load_w > 0
    files: dict[str, Content] = {
        "proc/stat": f"cpu  {board.busy_ticks} 0 0 {board.idle_ticks} 0 0 0 0 0 0\n",
        "proc/meminfo": _meminfo(noise, busy=busy),
        "sys/class/devfreq/17000000.gpu/cur_freq": f"{CLOCKS_HZ[board.step] if busy else IDLE_HZ}\n",
        "sys/devices/platform/gpu.0/load": f"{930 + _jitter(noise, 60) if busy else 0}\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": f"{1_728_000 if busy else 729_600}\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": f"{1_344_000 if busy else 729_600}\n",
        "sys/class/hwmon/hwmon3/oc2_event_cnt": f"{board.average}\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": f"{board.instantaneous}\n",
    }
    for number, (_, cooler) in enumerate(ZONES):
        if cooler is None:
            value: Content = Unreadable(errno="EAGAIN")
        else:
            value = f"{round((board.die_celsius - cooler) * 1000) + _jitter(noise, 90)}\n"
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = value
    for channel, share in enumerate((1.0, 0.52 if busy else 0.18, 0.21 if busy else 0.31), start=1):
        # The supply gives way a little under load.
        mv = round((5.09 - 0.006 * board.watts) / 0.008) * 8
        ma = round(board.watts * share * 1_000_000 / mv / 8) * 8 + 8 * _jitter(noise, 2)
        files[f"sys/bus/i2c/devices/1-0040/hwmon/hwmon1/in{channel}_input"] = f"{mv}\n"
        files[f"sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr{channel}_input"] = f"{ma}\n"
    return files


def _meminfo(noise: random.Random, *, busy: bool) -> str:
    available = (3_950_000 if busy else 4_180_000) + _jitter(noise, 2000)
    return f"MemTotal:        7802000 kB\nMemAvailable:    {available} kB\n"


def _jitter(noise: random.Random, width: int) -> int:
    """Give an integer from -width to width; `random()` alone is the same in every release of Python."""
    return int(noise.random() * (2 * width + 1)) - width


def main() -> None:
    """Write all scenarios."""
    for name in SCENARIOS:
        file = FOLDER / f"{name}.jsonl.gz"
        file.write_bytes(gzip.compress(b"".join(lines(name)), 9, mtime=0))
        print(f"{file.name}: {file.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
