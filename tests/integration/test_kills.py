"""The agent is killed at the changes that it makes on disk, one after the other; the device stays whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.bundle import Bundle
from tests.support.agents import Agent
from tests.support.kills import Street, count_changes

KILLS = 20


@pytest.fixture(scope="module")
def begun(tiny: Bundle, other_tiny: Bundle) -> Iterator[tuple[Path, int]]:
    """State of a device with the old engine, and how many changes the way to the new one makes."""
    with tempfile.TemporaryDirectory(prefix="eda-", dir="/tmp") as path:
        street = Street(Agent(Path(path), probation_s=0.2), tiny, other_tiny)
        street.begin()
        shutil.copytree(street.agent.state, Path(path) / "begun")
        yield Path(path) / "begun", count_changes(street, Path(path) / "count")


def test_a_walk_makes_enough_changes_to_be_cut_at(begun: tuple[Path, int]) -> None:
    assert begun[1] > 2 * KILLS


@pytest.mark.parametrize("cut", range(KILLS))
def test_an_agent_killed_between_two_changes_on_disk_is_whole_after_its_start(
    cut: int, begun: tuple[Path, int], short_dir: Path, tiny: Bundle, other_tiny: Bundle
) -> None:
    state, changes = begun
    shutil.copytree(state, short_dir / "state")
    street = Street(Agent(short_dir, probation_s=0.2), tiny, other_tiny)
    try:
        assert street.walk(POWER_CUT_AT=str(1 + cut * changes // KILLS)), "it was not cut"
        street.check()
    finally:
        street.end()
