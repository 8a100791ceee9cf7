"""Known devices are kept whole in one file, and an unknown one says what to do."""

from __future__ import annotations

import pytest

from edgellm import paths
from edgellm.devices import Device, DeviceBook, SshTarget, TlsFiles
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


@pytest.mark.parametrize(
    ("address", "over"),
    [
        ("unix:///tmp/x.sock", "unix"),
        ("192.0.2.7:7400", "tls"),
        ("[2001:db8::1]:7400", "tls"),
        ("ssh.example:7400", "tls"),
        ("ssh://board", "ssh"),
        ("ssh://edge@[2001:db8::1]:22/run/a.sock", "ssh"),
    ],
)
def test_an_address_needs_no_name(home, address, over):
    device = DeviceBook().find(address)
    assert (device, device.over) == (Device(address, address), over)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("ssh://board", SshTarget("board", None, None, "/run/edgellm/agent.sock")),
        ("ssh://board/", SshTarget("board")),
        (
            "ssh://edge@board:2222/run/user/1000/a.sock",
            SshTarget("board", "edge", 2222, "/run/user/1000/a.sock"),
        ),
        ("ssh://[2001:db8::1]:22", SshTarget("2001:db8::1", None, 22)),
    ],
)
def test_an_ssh_address_says_where_ssh_goes_and_to_which_socket(address, parts):
    assert SshTarget.parse(address) == parts


def test_groups_and_tls_files_are_found_again(home, tmp_path):
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / "a.pem", tmp_path / "a.key", "board")
    DeviceBook().add("a", "192.0.2.7:7400", groups=["street", "canary", "street"], tls=files)
    assert DeviceBook().find("a") == Device("a", "192.0.2.7:7400", ("canary", "street"), files)


def test_a_new_address_leaves_groups_and_files_as_they_are_while_they_make_sense(home, tmp_path):
    files = TlsFiles(ca_file=tmp_path / "ca.pem")
    DeviceBook().add("a", "192.0.2.7:7400", groups=["street"], tls=files)
    assert DeviceBook().add("a", "192.0.2.8:7400") == Device("a", "192.0.2.8:7400", ("street",), files)
    assert DeviceBook().add("a", "ssh://board") == Device("a", "ssh://board", ("street",))
    assert DeviceBook().add("a", "ssh://board", groups=[]).groups == ()
    assert DeviceBook().find("a") == Device("a", "ssh://board")


def test_a_group_is_all_its_devices_by_name(home):
    for name, groups in (("b", ["street"]), ("a", ["street", "canary"]), ("c", [])):
        DeviceBook().add(name, "ssh://board", groups=groups)
    assert [device.name for device in DeviceBook().group("street")] == ["a", "b"]
    assert [device.name for device in DeviceBook().group("canary")] == ["a"]


def test_an_unknown_group_lists_the_known_ones(home):
    DeviceBook().add("a", "ssh://board", groups=["street", "canary"])
    with pytest.raises(UnknownDeviceError, match="'yard'; known groups: canary, street") as error:
        DeviceBook().group("yard")
    assert "--group" in error.value.hint


@pytest.mark.parametrize("target", ["ssh://board", "unix:///run/a.sock"])
def test_tls_files_are_for_tls_alone(home, tmp_path, target):
    with pytest.raises(EdgellmError, match="takes no certificate"):
        DeviceBook().add("a", target, tls=TlsFiles(ca_file=tmp_path / "ca.pem"))
    assert not DeviceBook().path.exists()


def test_a_certificate_without_its_key_is_refused(home, tmp_path):
    with pytest.raises(EdgellmError, match="needs its key"):
        DeviceBook().add("a", "host:1", tls=TlsFiles(cert_file=tmp_path / "a.pem"))


@pytest.mark.parametrize("group", ["", "a b", "-x", "a/b"])
def test_a_malformed_group_is_refused(home, group):
    with pytest.raises(EdgellmError, match="not a group's name"):
        DeviceBook().add("a", "host:1", groups=[group])


@pytest.mark.parametrize(
    "target",
    ["", "host", "host:0", "host:65536", "http://host:1", "unix:relative", "a b:1", "-host:1", "ssh://-x"],
)
def test_a_malformed_address_is_refused(home, target):
    with pytest.raises(EdgellmError, match="not an address"):
        DeviceBook().add("jetson-01", target)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "a:1", "é"])
def test_a_malformed_name_is_refused(home, name):
    with pytest.raises(EdgellmError, match="not a device name"):
        DeviceBook().add(name, "host:1")


@pytest.mark.parametrize(
    "text",
    [
        "[devices",
        "devices = 3",
        "[devices.a]\nx = 1",
        '[devices.a]\ntarget = "b"',
        "\xff",
        '[devices.a]\ntarget = "b:1"\ngroups = [3]',
        '[devices.a]\ntarget = "b:1"\ntls = 3',
        '[devices.a]\ntarget = "b:1"\ntls = {ca_file = 3}',
    ],
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
