"""Trees of the kernel's files as Jetson boards show them.

No board stood beside this: the trees are rebuilt from public references (the kernel's thermal, hwmon, ina3221
and ina238 documentation, Tegra device trees, jetson-stats and users' listings of Orin and Thor). The figures
in them are plausible, not measured. The files are real, so the real readers run over them.

Of Thor, listings show five zones with a critical trip point at 114.5 °C, of which the GPU's gives EAGAIN
while it is idle, the rails, and an INA238 at the carrier board's input; none shows a passive trip point.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Board:
    """What a tree is built from; units are the kernel's (m°C, mV, mA, µW, Hz, kHz)."""

    compatible: str
    # Temperature; None is a gated zone: reading gives an error.
    zones: dict[str, int | None]
    # I²C address: channel label, mV and mA for the channels 1 to 3.
    ina3221: dict[str, list[tuple[str, int, int]]]
    gpu_clock: str
    gpu_hz: tuple[int, int]
    mode: tuple[int, str]
    modes: dict[int, str]
    total_kib: int
    available_kib: int
    policies: dict[str, int]
    # mV, mA, µW.
    ina238: tuple[int, int, int] | None = None
    gpu_load: str | None = "sys/devices/platform/gpu.0/load"
    # Passive and critical; None where no public listing shows one.
    trips: tuple[int | None, int] = (99_000, 104_500)
    # Of Jetson Linux: release and revision, and its kernel.
    release: tuple[int, str, str] = (36, "4.3", "5.15.148-tegra")


ORIN_NANO = Board(
    compatible="nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
    zones={
        "cpu-thermal": 48_968,
        "gpu-thermal": 47_250,
        "cv0-thermal": None,
        "cv1-thermal": None,
        "cv2-thermal": None,
        "soc0-thermal": 47_125,
        "soc1-thermal": 48_093,
        "soc2-thermal": 46_937,
        "tj-thermal": 49_250,
    },
    ina3221={"1-0040": [("VDD_IN", 5040, 984), ("VDD_CPU_GPU_CV", 5040, 176), ("VDD_SOC", 5032, 304)]},
    gpu_clock="17000000.gpu",
    gpu_hz=(306_000_000, 1_020_000_000),
    mode=(1, "25W"),
    modes={0: "15W", 1: "25W", 2: "MAXN_SUPER"},
    total_kib=7_802_000,
    available_kib=5_321_000,
    policies={"policy0": 1_728_000, "policy4": 729_600},
)
AGX_ORIN = Board(
    compatible="nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    zones={"cpu-thermal": 52_000, "gpu-thermal": None, "cv0-thermal": -256_000, "tj-thermal": 53_500},
    ina3221={
        "1-0040": [("VDD_GPU_SOC", 19_480, 250), ("VDD_CPU_CV", 19_480, 100), ("VIN_SYS_5V0", 4968, 953)],
        "1-0041": [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4968, 80), ("NC", 0, 0)],
    },
    gpu_clock="17000000.ga10b",
    gpu_hz=(1_300_500_000, 1_300_500_000),
    mode=(0, "MAXN"),
    modes={0: "MAXN", 1: "MODE_15W", 2: "MODE_30W", 3: "MODE_50W"},
    total_kib=64_349_000,
    available_kib=60_112_000,
    policies={"policy0": 2_201_600, "policy4": 2_201_600, "policy8": 2_201_600},
    # Its GPU's node has the name of JetPack 5.
    release=(35, "6.0", "5.10.216-tegra"),
)
THOR = Board(
    compatible="nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    zones={
        "cpu-thermal": 41_000,
        "gpu-thermal": None,
        "soc012-thermal": 40_500,
        "soc345-thermal": 40_750,
        "tj-thermal": 41_500,
    },
    ina3221={
        "2-0040": [("VDD_GPU", 20_100, 120), ("VDD_CPU_SOC_MSS", 20_100, 240), ("VIN_SYS_5V0", 5000, 970)]
    },
    ina238=(20_112, 1395, 28_056_000),
    # Its GPU driver tells no load in sysfs.
    gpu_load=None,
    gpu_clock="gpu-gpc-0",
    gpu_hz=(306_000_000, 1_575_000_000),
    mode=(1, "120W"),
    modes={0: "MAXN", 1: "120W", 2: "90W", 3: "70W"},
    total_kib=128_820_000,
    available_kib=120_004_000,
    policies={"policy0": 2_601_000, "policy12": 2_601_000},
    trips=(None, 114_500),
    release=(38, "2.0", "6.8.12-tegra"),
)
BOARDS = {"orin-nano": ORIN_NANO, "agx-orin": AGX_ORIN, "thor": THOR}


def build(root: Path, board: Board) -> Path:
    """Write a board's tree below a root and give the root."""
    write(root, "proc/device-tree/compatible", board.compatible)
    major, revision, kernel = board.release
    write(root, "proc/sys/kernel/osrelease", f"{kernel}\n")
    write(root, "etc/nv_tegra_release", f"# R{major} (release), REVISION: {revision}, BOARD: generic\n")
    _thermal(root, board)
    for hwmon, (address, channels) in enumerate(board.ina3221.items(), start=1):
        _ina3221(root, f"sys/bus/i2c/devices/{address}/hwmon/hwmon{hwmon}", channels)
    if board.ina238 is not None:
        _ina238(root, "sys/bus/i2c/devices/2-0044/hwmon/hwmon7", board.ina238)
    _soctherm(root)
    _compute(root, board)
    write(root, "var/lib/nvpmodel/status", f"pmode:{board.mode[0]:04d}\n")
    models = "".join(
        f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1\n\n"
        for number, name in board.modes.items()
    )
    write(
        root, "etc/nvpmodel.conf", f"< PARAM TYPE=FILE NAME=CPU_ONLINE >\n\n{models}< PM_CONFIG DEFAULT=0 >\n"
    )
    _memory(root, board)
    return root


def write(root: Path, path: str, text: str) -> Path:
    """Write one file of a tree, and the folders above it."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def cpu_busy(root: Path, busy: int, idle: int) -> None:
    """Set the CPU's counters, in ticks since boot."""
    write(
        root,
        "proc/stat",
        f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 {busy} 0 0 {idle} 0 0 0 0 0 0\nintr 1 2 3\n",
    )


def _thermal(root: Path, board: Board) -> None:
    for number, (name, milli) in enumerate(board.zones.items()):
        zone = f"sys/class/thermal/thermal_zone{number}"
        write(root, f"{zone}/type", f"{name}\n")
        if milli is None:
            # Reading a folder fails with an OSError, as reading a gated zone does.
            (root / zone / "temp").mkdir()
        else:
            write(root, f"{zone}/temp", f"{milli}\n")
        points = (("critical", board.trips[1]), ("active", 51_000), ("passive", board.trips[0]))
        for point, (kind, temperature) in enumerate(points):
            if temperature is not None:
                write(root, f"{zone}/trip_point_{point}_type", f"{kind}\n")
                write(root, f"{zone}/trip_point_{point}_temp", f"{temperature}\n")


def _ina3221(root: Path, folder: str, channels: list[tuple[str, int, int]]) -> None:
    write(root, f"{folder}/name", "ina3221\n")
    for channel, (label, mv, ma) in enumerate(channels, start=1):
        write(root, f"{folder}/in{channel}_label", f"{label}\n")
        write(root, f"{folder}/in{channel}_input", f"{mv}\n")
        write(root, f"{folder}/curr{channel}_input", f"{ma}\n")
        write(root, f"{folder}/in{channel}_enable", "1\n")
        write(root, f"{folder}/curr{channel}_crit", "32760\n")
        write(root, f"{folder}/curr{channel}_crit_alarm", "0\n")
        write(root, f"{folder}/in{channel + 3}_input", "800\n")
    write(root, f"{folder}/in7_label", "sum of shunt voltages\n")
    write(root, f"{folder}/in7_input", "2400\n")
    write(root, f"{folder}/curr4_input", "1500\n")


def _ina238(root: Path, folder: str, figures: tuple[int, int, int]) -> None:
    write(root, f"{folder}/name", "ina238\n")
    for name, value in zip(("in1_input", "curr1_input", "power1_input"), figures, strict=True):
        write(root, f"{folder}/{name}", f"{value}\n")
    write(root, f"{folder}/in0_input", "7\n")
    write(root, f"{folder}/temp1_input", "38000\n")


def _soctherm(root: Path) -> None:
    write(root, "sys/class/hwmon/hwmon0/name", "pwmfan\n")
    write(root, "sys/class/hwmon/hwmon4/name", "soctherm_oc\n")
    for number, events in ((1, 0), (2, 3), (3, 1)):
        write(root, f"sys/class/hwmon/hwmon4/oc{number}_event_cnt", f"{events}\n")
        write(root, f"sys/class/hwmon/hwmon4/oc{number}_throt_en", "1\n")


def _compute(root: Path, board: Board) -> None:
    cpu_busy(root, busy=1000, idle=9000)
    for policy, khz in board.policies.items():
        write(root, f"sys/devices/system/cpu/cpufreq/{policy}/scaling_cur_freq", f"{khz}\n")
    if board.gpu_load is not None:
        write(root, board.gpu_load, "375\n")
    clock = f"sys/class/devfreq/{board.gpu_clock}"
    write(root, f"{clock}/cur_freq", f"{board.gpu_hz[0]}\n")
    write(root, f"{clock}/max_freq", f"{board.gpu_hz[1]}\n")


def _memory(root: Path, board: Board) -> None:
    meminfo = (
        f"MemTotal: {board.total_kib:>12} kB\nMemFree: 1000 kB\nMemAvailable: {board.available_kib} kB\n"
    )
    write(root, "proc/meminfo", meminfo)
    swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" + "".join(
        f"/dev/zram{number}                              partition\t650000\t\t{used}\t\t5\n"
        for number, used in enumerate((1024, 0))
    )
    write(root, "proc/swaps", swaps)
    pressure = "avg10=1.25 avg60=0.40 avg300=0.10 total=123456\n"
    write(root, "proc/pressure/memory", f"some {pressure}full {pressure}")
