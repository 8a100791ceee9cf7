"""The place of a build is its own: kept when it may go on, gone when it cannot, whole or not there at all."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from edgellm_buildhost import workspace as workspaces
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.workspace import key_of, workspace

KEY = key_of({"a": 1})
OTHER = key_of({"a": 2})
DAY_S = 24 * 3600


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    return tmp_path / "work"


def leave(key: str) -> Path:
    """What an interrupted build leaves."""
    with suppress(KeyboardInterrupt), workspace(key) as directory:
        (directory / "checkpoint").mkdir()
        (directory / "checkpoint" / "layer").write_text("done")
        raise KeyboardInterrupt
    return directory


def let_pass(directory: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    for path in (directory, *directory.iterdir()):
        os.utime(path, (then, then))


def test_facts_name_a_build_whatever_their_order() -> None:
    assert key_of({"a": 1, "b": "x"}) == key_of({"b": "x", "a": 1}) != key_of({"a": "1", "b": "x"})


def test_nothing_is_kept_of_a_build_that_ended_well(work: Path) -> None:
    with workspace(KEY) as directory:
        (directory / "file").write_text("x")
    assert list(work.iterdir()) == []


def test_what_an_interrupted_build_did_is_found_by_the_next_of_its_key_alone(work: Path) -> None:
    left = leave(KEY)
    with workspace(OTHER) as directory:
        assert [path.name for path in directory.iterdir()] == ["lock"]
    with workspace(KEY) as directory:
        assert directory == left
        assert (directory / "checkpoint" / "layer").read_text() == "done"
    assert list(work.iterdir()) == []


def test_a_full_disk_keeps_what_was_done_and_a_bad_source_does_not(work: Path) -> None:
    with pytest.raises(BuildError), workspace(KEY) as directory:
        raise BuildError("full", "free some") from OSError(28, "No space left on device")
    assert list(work.iterdir()) == [directory]
    with pytest.raises(OSError, match="gone"), workspace(KEY):
        raise OSError("gone")
    assert list(work.iterdir()) == [directory]
    with pytest.raises(BuildError), workspace(KEY):
        raise BuildError("damaged", "fetch it again") from ValueError("nan")
    assert list(work.iterdir()) == []


def test_one_build_of_a_key_at_a_time_and_any_of_another(work: Path) -> None:
    with workspace(KEY) as directory:
        with pytest.raises(BuildError) as refused, workspace(KEY):
            pass
        assert str(directory) in refused.value.message
        assert "another process" in refused.value.message
        with workspace(OTHER):
            pass
        assert (directory / "lock").exists()
    with workspace(KEY):
        pass


def test_a_week_later_what_nobody_came_back_for_is_removed(work: Path) -> None:
    left = leave(KEY)
    let_pass(left, 6.9)
    with workspace(OTHER):
        assert left.exists()
    let_pass(left, 7.1)
    with workspace(OTHER):
        assert not left.exists()


def test_whoever_comes_back_after_weeks_still_finds_his_own(work: Path) -> None:
    let_pass(leave(KEY), 30)
    with workspace(KEY) as directory:
        assert (directory / "checkpoint" / "layer").exists()


def test_a_build_that_has_been_at_work_for_weeks_is_not_disturbed(work: Path) -> None:
    with workspace(KEY) as directory:
        let_pass(directory, 30)
        with workspace(OTHER):
            pass
        assert (directory / "lock").exists()
        assert workspaces._last_change(directory) < time.time() - 29 * DAY_S


def test_a_removal_that_was_cut_off_leaves_nothing_to_be_taken_for_the_whole(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(KEY)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    half = shutil.rmtree
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt), workspace(KEY) as directory:
        patch.setattr(shutil, "rmtree", lambda path, **_: cut() if path.exists() else half(path, True))
    assert not directory.exists()
    with workspace(KEY) as directory:
        assert [path.name for path in directory.iterdir()] == ["lock"]
    assert list(work.iterdir()) == []


def test_a_directory_that_its_last_user_removes_at_that_moment_is_made_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the lock and the locking: then the lock that is held is that of nothing."""
    import fcntl

    flock, removed = fcntl.flock, []

    def late(file: object, how: int) -> None:
        if not removed:
            removed.append(True)
            shutil.rmtree(work / KEY[:16])
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with workspace(KEY) as directory:
        assert (directory / "lock").exists()
        with pytest.raises(BuildError), workspace(KEY):
            pass


def test_another_build_that_finishes_meanwhile_is_no_failure(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(OTHER)
    last_change = workspaces._last_change

    def finished(directory: Path) -> float:
        shutil.rmtree(directory)
        return last_change(directory)

    monkeypatch.setattr(workspaces, "_last_change", finished)
    with workspace(KEY):
        assert not left.exists()
