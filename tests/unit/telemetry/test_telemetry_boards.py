"""The Jetson's files, read by the real code over trees that show what the boards show."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.detect import detect_source
from edgellm_agent.telemetry.sysfs import SysfsSource, board_name, l4t_release
from tests.support import boards


class Time:
    """A monotonic clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> Clock:
        return Clock(monotonic_ns=lambda: round(self.now_s * 1e9))


def read(source: SysfsSource) -> telemetry_pb2.Telemetry:
    record = telemetry_pb2.Telemetry(sequence=1, monotonic_ns=1)
    for probe in source.probes:
        part = probe.read()
        if part is not None:
            getattr(record, probe.part).CopyFrom(part)
    return record


def rails(record: telemetry_pb2.Telemetry) -> dict[str, float]:
    return {rail.name: rail.power_mw for rail in record.power.rails}


def test_an_orin_nano_reports_its_heat_and_leaves_gated_zones_out(tmp_path: Path) -> None:
    thermal = read(SysfsSource(boards.build(tmp_path, boards.ORIN_NANO))).thermal
    zones = {zone.name: zone.celsius for zone in thermal.zones}
    assert zones == {
        "cpu-thermal": 48.968,
        "gpu-thermal": 47.25,
        "soc0-thermal": 47.125,
        "soc1-thermal": 48.093,
        "soc2-thermal": 46.937,
        "tj-thermal": 49.25,
    }
    assert all((zone.passive_celsius, zone.critical_celsius) == (99.0, 104.5) for zone in thermal.zones)
    assert thermal.max_celsius == 49.25
    assert thermal.margin_celsius == 49.75


def test_an_orin_nano_reports_its_power_from_the_input_rail(tmp_path: Path) -> None:
    record = read(SysfsSource(boards.build(tmp_path, boards.ORIN_NANO)))
    assert rails(record) == {"VDD_IN": 4959.36, "VDD_CPU_GPU_CV": 887.04, "VDD_SOC": 1529.728}
    assert (record.power.rails[0].voltage_mv, record.power.rails[0].current_ma) == (5040, 984)
    assert record.power.total_mw == 4959.36
    assert record.power.mode == "25W"
    over_current = {counter.kind: counter.events for counter in record.power.over_current}
    assert over_current == {"under_voltage": 0, "average": 3, "instantaneous": 1}


def test_an_orin_nano_reports_its_memory(tmp_path: Path) -> None:
    memory = read(SysfsSource(boards.build(tmp_path, boards.ORIN_NANO))).memory
    assert (memory.total_bytes, memory.available_bytes) == (7_802_000 * 1024, 5_321_000 * 1024)
    assert (memory.swap_total_bytes, memory.swap_used_bytes) == (1_300_000 * 1024, 1024 * 1024)
    assert memory.pressure_some_percent == 1.25


def test_an_agx_orin_adds_its_rails_up_and_skips_channels_that_are_not_connected(tmp_path: Path) -> None:
    record = read(SysfsSource(boards.build(tmp_path, boards.AGX_ORIN)))
    assert rails(record) == {
        "VDD_GPU_SOC": 4870.0,
        "VDD_CPU_CV": 1948.0,
        "VIN_SYS_5V0": 4734.504,
        "VDDQ_VDD2_1V8AO": 397.44,
    }
    assert record.power.total_mw == pytest.approx(11_949.944)
    # Off by the kernel's figure rather than by an error.
    assert [zone.name for zone in record.thermal.zones] == ["cpu-thermal", "tj-thermal"]
    # The node of JetPack 5.
    assert (record.compute.gpu_mhz, record.compute.gpu_max_mhz) == (1300.5, 1300.5)


def test_a_thor_reports_the_power_that_its_input_monitor_measures(tmp_path: Path) -> None:
    record = read(SysfsSource(boards.build(tmp_path, boards.THOR)))
    vin = next(rail for rail in record.power.rails if rail.name == "VIN")
    assert (vin.voltage_mv, vin.current_ma, vin.power_mw) == (20_112, 1395, 28_056)
    assert record.power.total_mw == 28_056
    assert record.power.mode == "120W"
    assert (record.compute.gpu_mhz, record.compute.gpu_max_mhz) == (306, 1575)
    assert not record.compute.HasField("gpu_percent")


def test_without_a_passive_trip_point_there_is_no_margin(tmp_path: Path) -> None:
    thermal = read(SysfsSource(boards.build(tmp_path, boards.THOR))).thermal
    assert [zone.name for zone in thermal.zones] == [
        "cpu-thermal",
        "soc012-thermal",
        "soc345-thermal",
        "tj-thermal",
    ]
    assert {zone.critical_celsius for zone in thermal.zones} == {114.5}
    assert thermal.max_celsius == 41.5
    assert not thermal.HasField("margin_celsius")
    assert not any(zone.HasField("passive_celsius") for zone in thermal.zones)


def test_a_channel_that_is_switched_off_is_no_rail_that_fails_to_answer(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.AGX_ORIN)
    monitor = root / "sys/bus/i2c/devices/1-0041/hwmon/hwmon2"
    (monitor / "in2_enable").write_text("0\n")
    # What the driver gives for such a channel is an error.
    (monitor / "in2_input").unlink()
    record = read(SysfsSource(root))
    assert list(rails(record)) == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]
    assert record.power.total_mw == pytest.approx(11_552.504)


def test_a_board_is_named_by_its_most_special_compatible_string_and_its_release(tmp_path: Path) -> None:
    told = {
        name: (board_name(root), l4t_release(root))
        for name, board in boards.BOARDS.items()
        for root in [boards.build(tmp_path / name, board)]
    }
    assert told == {
        "orin-nano": ("nvidia,p3768-0000+p3767-0005", "R36.4.3"),
        "agx-orin": ("nvidia,p3737-0000+p3701-0005", "R35.6.0"),
        "thor": ("nvidia,p4071-0000+p3834-0008", "R38.2.0"),
    }
    assert (board_name(tmp_path), l4t_release(tmp_path)) == ("", "")


def test_processor_load_is_the_share_between_two_records(tmp_path: Path) -> None:
    source = SysfsSource(boards.build(tmp_path, boards.ORIN_NANO))
    first = read(source).compute
    assert not first.HasField("cpu_percent")
    assert first.gpu_percent == 37.5
    assert first.cpu_mhz == 1228.8
    boards.cpu_busy(tmp_path, busy=1025, idle=9075)
    assert read(source).compute.cpu_percent == 25.0
    # No time has passed: unknown, not idle.
    assert not read(source).compute.HasField("cpu_percent")


def test_the_total_is_unknown_when_its_rail_does_not_answer(tmp_path: Path) -> None:
    for name, board, silent in (
        ("nano", boards.ORIN_NANO, "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_input"),
        ("agx", boards.AGX_ORIN, "sys/bus/i2c/devices/1-0041/hwmon/hwmon2/in2_input"),
        ("thor", boards.THOR, "sys/bus/i2c/devices/2-0044/hwmon/hwmon7/power1_input"),
    ):
        root = boards.build(tmp_path / name, board)
        (root / silent).write_text("")
        power = read(SysfsSource(root)).power
        assert power.rails, name
        assert not power.HasField("total_mw"), name


def test_an_empty_machine_gives_an_empty_record(tmp_path: Path) -> None:
    assert read(SysfsSource(tmp_path)) == telemetry_pb2.Telemetry(sequence=1, monotonic_ns=1)


@pytest.mark.parametrize(
    ("path", "absent"),
    [
        ("proc/swaps", ("memory", "swap_total_bytes", "swap_used_bytes")),
        ("proc/pressure/memory", ("memory", "pressure_some_percent")),
        ("proc/stat", ("compute", "cpu_percent")),
        ("sys/devices/system/cpu/cpufreq", ("compute", "cpu_mhz")),
        ("sys/devices/platform/gpu.0/load", ("compute", "gpu_percent")),
        ("sys/class/devfreq", ("compute", "gpu_mhz", "gpu_max_mhz")),
        ("sys/bus/i2c", ("power", "total_mw")),
    ],
)
def test_what_is_missing_is_absent_and_takes_nothing_else_along(
    tmp_path: Path, path: str, absent: tuple[str, ...]
) -> None:
    def present() -> set[str]:
        source = SysfsSource(tmp_path)
        read(source)
        if (tmp_path / "proc/stat").exists():
            boards.cpu_busy(tmp_path, busy=1025, idle=9075)
        record = read(source)
        return {
            f"{part.name}.{field.name}"
            for part, message in record.ListFields()
            if isinstance(message, Message)
            for field, _ in message.ListFields()
        }

    boards.build(tmp_path, boards.ORIN_NANO)
    whole = present()
    boards.cpu_busy(tmp_path, busy=1000, idle=9000)
    missing = tmp_path / path
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    lost = {f"{absent[0]}.{field}" for field in absent[1:]}
    assert lost < whole
    assert whole - present() == lost | ({"power.rails"} if path == "sys/bus/i2c" else set())


def test_swap_that_is_off_is_known_to_be_zero(tmp_path: Path) -> None:
    boards.build(tmp_path, boards.ORIN_NANO)
    boards.write(tmp_path, "proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n")
    memory = read(SysfsSource(tmp_path)).memory
    assert memory.HasField("swap_total_bytes")
    assert (memory.swap_total_bytes, memory.swap_used_bytes) == (0, 0)


def test_a_power_mode_is_matched_by_name_and_follows_a_change(tmp_path: Path) -> None:
    source = SysfsSource(boards.build(tmp_path, boards.ORIN_NANO))
    assert read(source).power.mode == "25W"
    boards.write(tmp_path, "var/lib/nvpmodel/status", "pmode:0002 fmode:cool\n")
    assert read(source).power.mode == "MAXN_SUPER"
    boards.write(tmp_path, "var/lib/nvpmodel/status", "pmode:0009\n")
    assert read(source).power.mode == ""


def test_a_sensor_that_comes_back_under_another_number_is_found_again(tmp_path: Path) -> None:
    time = Time()
    source = SysfsSource(boards.build(tmp_path, boards.ORIN_NANO), time.clock())
    assert read(source).power.HasField("total_mw")
    hwmon = tmp_path / "sys/bus/i2c/devices/1-0040/hwmon"
    (hwmon / "hwmon1").rename(hwmon / "hwmon5")
    assert not read(source).power.HasField("total_mw")
    time.now_s += 6
    assert read(source).power.total_mw == 4959.36


def test_a_driver_that_loads_late_is_found(tmp_path: Path) -> None:
    time = Time()
    source = SysfsSource(tmp_path, time.clock())
    assert not read(source).HasField("thermal")
    boards.build(tmp_path, boards.ORIN_NANO)
    time.now_s += 6
    assert read(source).thermal.max_celsius == 49.25


def test_a_gated_zone_does_not_make_every_read_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    source = SysfsSource(boards.build(tmp_path, boards.ORIN_NANO), time.clock())
    read(source)
    searched = []
    monkeypatch.setattr(Path, "glob", lambda path, pattern: searched.append(path) or iter(()))
    for _ in range(50):
        time.now_s += 1
        read(source)
    assert searched == []


def test_a_tegra_board_is_read_by_its_files_and_anything_else_as_a_host(tmp_path: Path) -> None:
    assert detect_source(boards.build(tmp_path / "orin", boards.ORIN_NANO)).name == "sysfs"
    assert detect_source(boards.build(tmp_path / "thor", boards.THOR)).name == "sysfs"
    boards.write(tmp_path, "old/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3\n")
    assert detect_source(tmp_path / "old").name == "sysfs"
    assert detect_source(tmp_path / "nowhere").name == "host"


@pytest.fixture(scope="module")
def garbled_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board with every kind of file, none of whose figures is zero."""
    board = replace(boards.ORIN_NANO, ina238=(20_112, 1395, 28_056_000))
    root = boards.build(tmp_path_factory.mktemp("garbled"), board)
    boards.write(root, "sys/class/hwmon/hwmon4/oc1_event_cnt", "2\n")
    assert 0 not in figures(read(SysfsSource(root)))
    return root


NO_NUMBERS = [
    b"nan\n",
    b"inf",
    b"1e3\n",
    b"0x0",
    b"0_0\n",
    "\u0660".encode(),
    b"0.0",
    b"+0",
    b"9" * 40,
    b"\0" * 8,
    b"",
]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), garbage=st.binary(max_size=64) | st.sampled_from(NO_NUMBERS))
def test_no_bytes_in_any_file_raise_or_pass_for_a_measurement(
    garbled_root: Path, data: st.DataObject, garbage: bytes
) -> None:
    file = data.draw(st.sampled_from(sorted(path for path in garbled_root.rglob("*") if path.is_file())))
    good = file.read_bytes()
    try:
        file.write_bytes(garbage)
        found = figures(read(SysfsSource(garbled_root)))
    finally:
        file.write_bytes(good)
    assert all(math.isfinite(figure) for figure in found)
    if not garbage.strip(b" \t\r\n\0").removeprefix(b"-").isdigit():
        assert 0 not in found


def figures(message: Message) -> list[float]:
    """Give every number that a reader of the message would take for one, however deep."""
    found: list[float] = []
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            continue
        if isinstance(value, int | float):
            found.append(value)
        elif isinstance(value, Message):
            found += figures(value)
        elif not isinstance(value, str):
            found += [figure for item in value for figure in figures(item)]
    return found
