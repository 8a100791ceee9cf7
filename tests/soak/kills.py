"""The agent is killed again and again on its way from one engine to another: `python -m tests.soak.kills`.

Half of the kills come before a chosen change that the agent makes on its disk, the others at random moments.
After each one the device must be whole (`tests.support.kills`).
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.conftest import make_bundle
from tests.support.agents import Agent
from tests.support.kills import Street, count_changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    # Sockets want short names.
    with tempfile.TemporaryDirectory(prefix="eda-", dir="/tmp") as path:
        return _soak(Path(path), options.kills, random.Random(options.seed))


def _soak(root: Path, kills: int, dice: random.Random) -> int:
    old, new = make_bundle(root / "old", name="old"), make_bundle(root / "new", name="new", seed=1)
    begun = root / "begun"
    street = Street(Agent(_folder(root, "0"), probation_s=0.2), old, new)
    street.begin()
    shutil.copytree(street.agent.state, begun)
    began = time.monotonic()
    changes = count_changes(street, root / "count")
    walk_s = time.monotonic() - began
    seen: Counter[str] = Counter()
    cut = 0
    for kill in range(kills):
        folder = _folder(root, str(kill + 1))
        shutil.copytree(begun, folder / "state")
        street = Street(Agent(folder, probation_s=0.2), old, new)
        try:
            if kill % 2:
                cut += _walk_until(street, dice.uniform(0, walk_s))
            else:
                cut += _cut_at(street, 1 + (kill // 2) % changes, changes)
            street.check()
        finally:
            street.end()
        seen[street.promised[-1] if street.promised else "nothing"] += 1
        shutil.rmtree(folder)
        if sys.stderr.isatty():
            print(f"\r{kill + 1} of {kills} kills", end="", file=sys.stderr)
    print(f"{kills} walks, {cut} of them cut, the others killed at their end; whole after each")
    print(f"{changes} changes on disk in a walk of {walk_s:.1f} s")
    last = ", ".join(f"{what} {count}" for what, count in sorted(seen.items()))
    print(f"last said before it was killed: {last}")
    return 0


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


def _cut_at(street: Street, change: int, changes: int) -> bool:
    """A walk that is killed before a change; not all walks make the last ones of another."""
    was_cut = street.walk(POWER_CUT_AT=str(change))
    assert was_cut or change > 0.9 * changes, f"a walk ended before change {change} of {changes}"
    return was_cut


def _walk_until(street: Street, after_s: float) -> bool:
    """A walk that is killed at a moment of its own."""

    def kill() -> None:
        process = street.agent.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)

    timer = threading.Timer(after_s, kill)
    timer.start()
    try:
        return street.walk()
    finally:
        timer.cancel()
        timer.join()


if __name__ == "__main__":
    sys.exit(main())
