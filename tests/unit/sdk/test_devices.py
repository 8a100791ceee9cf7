"""Known devices are kept whole in one file, and an unknown one says what to do."""

from __future__ import annotations

import pytest

from edgellm import paths
from edgellm.devices import Device, DeviceBook
from edgellm.errors import EdgellmError, UnknownDeviceError


def test_a_device_is_found_again_after_a_restart(home):
    DeviceBook().add("jetson-02", "192.0.2.7:7400")
    DeviceBook().add("jetson-01", "unix:///run/edgellm/agent.sock")
    assert [device.name for device in DeviceBook().all()] == ["jetson-01", "jetson-02"]
    assert DeviceBook().find("jetson-02") == Device("jetson-02", "192.0.2.7:7400")
    assert [path.name for path in home.iterdir()] == ["devices.toml"]


def test_adding_a_known_device_gives_it_the_new_address(home):
    DeviceBook().add("jetson-01", "192.0.2.7:7400")
    DeviceBook().add("jetson-01", "[2001:db8::1]:7400")
    assert DeviceBook().all() == [Device("jetson-01", "[2001:db8::1]:7400")]


def test_a_removed_device_is_unknown(home):
    DeviceBook().add("jetson-01", "192.0.2.7:7400")
    DeviceBook().remove("jetson-01")
    with pytest.raises(UnknownDeviceError):
        DeviceBook().remove("jetson-01")


def test_an_unknown_device_lists_the_known_ones_and_the_command_that_adds_it(home):
    DeviceBook().add("jetson-01", "192.0.2.7:7400")
    with pytest.raises(UnknownDeviceError, match="jetson-01") as error:
        DeviceBook().find("jetson-09")
    assert "edgellm device add jetson-09" in error.value.hint


def test_an_address_needs_no_name(home):
    assert DeviceBook().find("unix:///tmp/x.sock").target == "unix:///tmp/x.sock"


@pytest.mark.parametrize(
    "target", ["", "host", "host:0", "host:65536", "http://host:1", "unix:relative", "a b:1"]
)
def test_a_malformed_address_is_refused(home, target):
    with pytest.raises(EdgellmError, match="not an address"):
        DeviceBook().add("jetson-01", target)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "a:1", "é"])
def test_a_malformed_name_is_refused(home, name):
    with pytest.raises(EdgellmError, match="not a device name"):
        DeviceBook().add(name, "host:1")


@pytest.mark.parametrize(
    "text", ["[devices", "devices = 3", "[devices.a]\nx = 1", '[devices.a]\ntarget = "b"', "\xff"]
)
def test_a_damaged_file_is_named(home, text):
    home.mkdir()
    (home / "devices.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgellmError, match=r"devices\.toml"):
        DeviceBook().all()


def test_the_last_build_is_remembered(home, tmp_path, monkeypatch):
    assert paths.last_build() is None
    monkeypatch.chdir(tmp_path)
    paths.record_last_build(tmp_path / "a.bundle")
    assert paths.last_build() == tmp_path / "a.bundle"


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    paths.write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        paths.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
