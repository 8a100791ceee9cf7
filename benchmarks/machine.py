"""What the figures were measured on: cores, memory bandwidth, versions, the model."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

_READ_BYTES = 256 << 20
_READS = 5
_DISTRIBUTIONS = ("edgellm", "onnxruntime", "llama-cpp-python", "grpcio", "numpy")


@dataclass(frozen=True)
class Machine:
    """The machine, the versions and the model of one report."""

    processor: str
    cores: int
    kernel: str
    bandwidth_bytes_per_s: float
    python: str
    versions: dict[str, str]
    model: str
    model_sha256: str
    load_average: float

    def facts(self) -> list[str]:
        """A line for each fact."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        bandwidth = self.bandwidth_bytes_per_s / 1e9
        return [
            f"machine: {self.processor}, {self.cores} cores, Linux {self.kernel}",
            f"read bandwidth: {bandwidth:.1f} GB/s (all cores); load at the start: {self.load_average:.2f}",
            f"versions: Python {self.python}, {versions}",
            f"model: {self.model}, sha256 {self.model_sha256}",
        ]


def describe(model: Path) -> Machine:
    """Measures the bandwidth and reads the rest."""
    cores = usable_cores()
    return Machine(
        processor=_processor(),
        cores=cores,
        kernel=platform.release(),
        bandwidth_bytes_per_s=_read_bandwidth(cores),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in _DISTRIBUTIONS},
        model=model.name,
        model_sha256=sha256(model),
        load_average=os.getloadavg()[0],
    )


def usable_cores() -> int:
    """Cores that this process may run on; both sides get a thread for each."""
    return len(os.sched_getaffinity(0))


def sha256(path: Path) -> str:
    """Digest of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return hasher.hexdigest()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.machine()


def _read_bandwidth(threads: int) -> float:
    """Best of a few passes over more than a cache holds; numpy's `max` reads as wide as the core can."""
    blocks = [np.ones(_READ_BYTES // 8, np.int64) for _ in range(threads)]
    best_s = float("inf")
    for _ in range(_READS):
        workers = [threading.Thread(target=block.max) for block in blocks]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best_s = min(best_s, time.perf_counter() - began)
    return threads * _READ_BYTES / best_s
