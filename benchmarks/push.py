"""How fast a bundle reaches a device over loopback, beside copying and hashing the same bytes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.agent import running_agent
from benchmarks.inputs import Inputs
from benchmarks.report import TIMES, Bound, Row
from benchmarks.timing import take_turns
from edgellm_buildhost.recipe import QuantName

# The kernel writes to the disk for both sides, in threads of its own.
_WRITEBACK_CORES = 0.5


def push_rate(inputs: Inputs) -> list[Row]:
    """Activation is not part of it; both sides write to the same file system."""
    engine = inputs.engine(QuantName.INT4)
    digest = engine.variant.digest
    blobs = [engine.bundle.blob_path(blob.digest) for blob in engine.variant.manifest.blobs()]
    size_bytes = sum(path.stat().st_size for path in blobs)
    with running_agent(inputs.cache, {}) as agent, agent.client() as client:

        def push() -> float:
            began = time.perf_counter()
            result = client.push(engine.bundle, digest)
            elapsed_s = time.perf_counter() - began
            client.remove(digest)
            # The manifest itself travels too, but is not one of its blobs.
            return result.sent_bytes / elapsed_s

        samples = take_turns(
            {"push": push, "copy": lambda: _copy_rate(blobs, inputs.cache)}, inputs.rounds, _WRITEBACK_CORES
        )
    return [
        Row(
            benchmark="push",
            what="push over a Unix socket beside cp and sha256sum",
            ours=f"{samples.median('push') / 1e6:.0f} MB/s",
            peer=f"{samples.median('copy') / 1e6:.0f} MB/s (cp, sha256sum)",
            figure=samples.ratio("push", "copy"),
            unit=TIMES,
            floor=Bound(at_least=0.4),
            goal=Bound(at_least=0.7),
            settings=f"{size_bytes / 1e6:.1f} MB of INT4 engine, warm; push ends with fsync, {samples}",
        )
    ]


def _copy_rate(blobs: list[Path], scratch: Path) -> float:
    with tempfile.TemporaryDirectory(prefix="copy-", dir=scratch) as target:
        began = time.perf_counter()
        subprocess.run(["cp", *blobs, target], check=True)
        copies = [Path(target) / path.name for path in blobs]
        subprocess.run(["sha256sum", *copies], check=True, stdout=subprocess.DEVNULL)
        return sum(path.stat().st_size for path in copies) / (time.perf_counter() - began)
