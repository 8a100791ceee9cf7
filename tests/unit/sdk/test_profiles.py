"""Profiles are data, and every one of them can be planned for."""

from __future__ import annotations

import pytest

from edgellm.errors import EdgellmError
from edgellm.profiles import load_profile, profile_names

BOARDS = {
    "orin-nano-4gb",
    "orin-nano-8gb",
    "orin-nx-8gb",
    "orin-nx-16gb",
    "agx-orin-32gb",
    "agx-orin-64gb",
    "agx-orin-industrial",
    "thor-t4000",
    "thor-t5000",
}


def test_every_supported_board_and_the_host_have_a_profile():
    assert set(profile_names()) == BOARDS | {"host"}


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_a_board_has_consistent_figures(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.memory_bytes is not None
    assert profile.usable_bytes is not None
    assert 0 < profile.headroom_bytes < profile.usable_bytes < profile.memory_bytes
    assert profile.sm == ("11.0" if name.startswith("thor") else "8.7")
    assert profile.architecture == "arm64"
    assert profile.part_numbers
    assert profile.stacks


def test_the_host_has_no_limit_of_its_own():
    assert load_profile("host").usable_bytes is None


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(EdgellmError, match=r"nano-9000") as error:
        load_profile("nano-9000")
    assert "orin-nano-8gb" in error.value.hint


def test_a_profile_name_is_not_a_path():
    with pytest.raises(EdgellmError):
        load_profile("../profiles/host")
