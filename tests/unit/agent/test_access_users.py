"""Which role a user of the machine has."""

import grp
import os
import pwd
import socket

import pytest
from pydantic import ValidationError

from edgellm_agent.access.caller import Role
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.access.users import Peer, Users, read_peer
from edgellm_agent.errors import DeniedError

AGENT_UID = 990


def role(peer, **settings):
    return Users(AccessSettings(**settings), AGENT_UID).caller(peer).role


def peer(uid=1000, gid=1000, *groups):
    return Peer(uid, gid, 1, frozenset(groups))


@pytest.mark.parametrize("uid", [0, AGENT_UID])
def test_root_and_the_agents_own_user_are_admins_whatever_the_lists_say(uid):
    assert role(peer(uid), viewers=(str(uid),), others="none") is Role.ADMIN


def test_whoever_may_open_the_socket_and_is_in_no_list_is_an_app():
    assert role(peer()) is Role.APP


def test_others_may_have_another_role_or_none():
    assert role(peer(), others="viewer") is Role.VIEWER
    with pytest.raises(DeniedError, match="uid 1000 has no role") as error:
        role(peer(), others="none")
    assert error.value.hint


def test_a_list_names_users_by_name_or_number():
    nobody = pwd.getpwnam("nobody")
    assert role(peer(nobody.pw_uid), operators=("nobody",)) is Role.OPERATOR
    assert role(peer(4242), operators=("4242",)) is Role.OPERATOR
    assert role(peer(4243), operators=("4242",)) is Role.APP


def test_a_list_names_groups_and_supplementary_ones_count():
    group = grp.getgrgid(0).gr_name
    assert role(peer(1000, 0), operators=(f"@{group}",)) is Role.OPERATOR
    assert role(peer(1000, 1000, 7, 4242), operators=("@4242",)) is Role.OPERATOR


def test_a_users_number_is_not_a_groups():
    assert role(peer(4242, 1000), operators=("@4242",)) is Role.APP
    assert role(peer(1000, 4242), operators=("4242",)) is Role.APP


def test_in_several_lists_the_highest_role_counts():
    lists = {"viewers": ("1000",), "operators": ("@4242",), "apps": ("1000", "@4242")}
    assert role(peer(1000, 4242), **lists) is Role.OPERATOR
    assert role(peer(1000, 1000), **lists) is Role.APP


def test_a_listed_viewer_is_no_app_though_others_are():
    assert role(peer(1000), viewers=("1000",), others="app") is Role.VIEWER


def test_a_name_that_nobody_has_gives_nobody_a_role_and_is_told(caplog):
    assert role(peer(), admins=("no-such-user", "@no-such-group")) is Role.APP
    assert "no-such-user" in caplog.text
    assert "@no-such-group" in caplog.text


def test_the_default_group_of_operators_need_not_be_there(caplog):
    Users(AccessSettings(), AGENT_UID)
    assert caplog.text == ""


@pytest.mark.parametrize("entry", ["", "@", "a b", "a\nb", "@@x", "-x", "99999999999", "x" * 40])
def test_what_can_be_no_user_or_group_is_refused_with_examples(entry):
    with pytest.raises(ValidationError, match="must be a user or a group"):
        AccessSettings(apps=(entry,))


def test_the_kernel_tells_who_connected(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client.connect(str(tmp_path / "s"))
        with listener.accept()[0] as accepted:
            found = read_peer(accepted)
    assert (found.uid, found.gid, found.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert found.groups == set(os.getgroups())
