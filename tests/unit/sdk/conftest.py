"""An engine of a few bytes, its bundle, and a device that takes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.bundle import Bundle, BundleWriter, EngineConfig
from tests.support.fake_device import FakeDevice, serve
from tests.support.tiny_bundle import make_config, make_files


@pytest.fixture
def config() -> EngineConfig:
    return make_config()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return make_files(tmp_path / "files")


@pytest.fixture
def bundle(tmp_path: Path, files: Path, config: EngineConfig) -> Bundle:
    with BundleWriter(tmp_path / "tiny.bundle") as writer:
        writer.add(files, config)
    return Bundle.open(tmp_path / "tiny.bundle")


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def target(device: FakeDevice, tmp_path: Path) -> Iterator[str]:
    address = f"unix://{tmp_path}/agent.sock"
    server, _ = serve(device, address)
    yield address
    device.cancelled.set()
    server.stop(grace=None).wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
