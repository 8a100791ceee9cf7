import sqlite3
from contextlib import nullcontext

import pytest

from edgellm_agent.registry import Registry


@pytest.fixture
def registry(tmp_path):
    made = Registry(tmp_path / "registry.db")
    yield made
    made.close()


def test_what_was_written_is_there_after_a_restart(registry, tmp_path):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.end_push("sha256:a", 2.0)
    registry.set_active("sha256:a")
    again = Registry(tmp_path / "registry.db")
    assert [(r.digest, r.name, r.ready) for r in again.engines()] == [("sha256:a", "one", True)]
    assert again.active() == "sha256:a"
    again.close()


def test_pushing_an_engine_again_does_not_make_it_unready(registry):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.end_push("sha256:a", 2.0)
    registry.begin_push("sha256:a", "one", 3.0)
    assert registry.engines()[0].ready


def test_a_push_that_nobody_came_back_to_is_forgotten_and_a_ready_engine_is_not(registry):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.begin_push("sha256:b", "two", 1.0)
    registry.end_push("sha256:b", 1.0)
    registry.begin_push("sha256:c", "three", 9.0)
    registry.forget_pushes_before(5.0)
    assert [r.digest for r in registry.engines()] == ["sha256:b", "sha256:c"]


def test_the_active_engine_cannot_be_forgotten(registry):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.set_active("sha256:a")
    with pytest.raises(sqlite3.IntegrityError):
        registry.remove("sha256:a")


def test_there_is_one_active_engine(registry):
    for digest in ("sha256:a", "sha256:b"):
        registry.begin_push(digest, digest, 1.0)
        registry.set_active(digest)
    assert registry.active() == "sha256:b"


def test_a_pin_and_what_was_desired_are_there_after_a_restart(registry, tmp_path):
    assert (registry.pinned(), registry.desired()) == (False, None)
    registry.set_pinned(True)
    registry.set_desired('{"generation": 1}')
    registry.set_desired('{"generation": 2}')
    again = Registry(tmp_path / "registry.db")
    assert (again.pinned(), again.desired()) == (True, '{"generation": 2}')
    again.set_pinned(False)
    assert not registry.pinned()
    again.close()


def test_attestations_are_replaced_as_a_whole_and_keep_their_order(registry, tmp_path):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.set_attestations("sha256:a", [b"3", b"1", b"2"])
    registry.set_attestations("sha256:a", [b"2", b"9", b"1"])
    again = Registry(tmp_path / "registry.db")
    assert again.attestations("sha256:a") == [b"2", b"9", b"1"]
    again.close()


@pytest.mark.parametrize("together", [True, False])
def test_attestations_that_cannot_all_be_written_leave_the_old_ones(registry, tmp_path, together):
    registry.begin_push("sha256:a", "one", 1.0)
    registry.set_attestations("sha256:a", [b"old"])
    # The table takes bytes only, so the second one fails when the old ones are deleted already.
    with pytest.raises(sqlite3.Error), registry.together() if together else nullcontext():
        registry.set_attestations("sha256:a", [b"new", "not bytes"])
    again = Registry(tmp_path / "registry.db")
    assert registry.attestations("sha256:a") == again.attestations("sha256:a") == [b"old"]
    again.close()


def test_what_is_done_within_two_together_is_one_transaction(registry):
    registry.begin_push("sha256:a", "one", 1.0)

    def cut_short():
        with registry.together():
            registry.set_attestations("sha256:a", [b"new"])
            registry.set_active("sha256:unknown")

    with pytest.raises(sqlite3.Error):
        cut_short()
    assert registry.attestations("sha256:a") == []
