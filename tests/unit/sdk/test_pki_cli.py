"""`edgellm pki` from the first command to the last, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgellm.cli.main import app
from edgellm.cli.pki import RoleName
from edgellm.pki.certificates import ROLES

pytestmark = pytest.mark.usefixtures("home")


def run(*args: object, **options):
    return CliRunner().invoke(app, ["pki", *map(str, args)], **options)


def good_json(*args: object):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(*args: object) -> dict[str, str]:
    result = run(*args, "--json")
    assert result.exit_code == 1, result.stdout
    return json.loads(result.stderr)["error"]


def test_the_way_of_a_certificate(home):
    assert good_json("init")["folder"] == str(home / "pki")
    issued = good_json("issue", "alice", "--role", "operator")
    assert issued["files"]["cert"] == str(home / "pki" / "alice.pem")
    assert (issued["kind"], issued["role"], issued["state"]) == ("client", "operator", "valid")
    board = good_json("issue", "jetson-01", "--device", "--san", "192.0.2.7")
    assert (board["kind"], board["role"], board["sans"]) == ("device", "", ["192.0.2.7"])
    renewed = good_json("renew", "jetson-01", "--days", 10)
    assert renewed["serial"] != board["serial"]
    revoked = good_json("revoke", "alice")
    assert [entry["serial"] for entry in revoked["revoked"]] == [issued["serial"]]
    assert Path(revoked["crl"]).is_file()
    listed = good_json("list")["certificates"]
    assert [(entry["name"], entry["state"]) for entry in listed] == [
        ("alice", "revoked"),
        ("jetson-01", "valid"),
        ("jetson-01", "valid"),
    ]


def test_people_are_told_the_files_and_the_next_step(home):
    assert "good until" in run("init").stdout
    assert "begin with" in run("list").stdout
    assert str(home / "pki" / "alice.key") in run("issue", "alice", "--role", "app").stdout
    assert run("list").stdout.splitlines()[1].split()[:3] == ["alice", "app", "valid"]
    assert "copy" in run("revoke", "alice").stdout
    assert "no certificate that still counts" in run("revoke", "alice").stdout


def test_another_folder_is_used_when_it_is_named(home, tmp_path):
    run("init", tmp_path / "stick")
    good_json("issue", "alice", "--role", "app", "--dir", tmp_path / "stick")
    assert (tmp_path / "stick" / "alice.pem").is_file()
    assert not (home / "pki").exists()


def test_an_encrypted_key_is_opened_with_a_variable_or_at_a_prompt(monkeypatch):
    monkeypatch.setenv("SECRET", "open sesame")
    assert good_json("init", "--passphrase-env", "SECRET")["encrypted"] is True
    assert "--passphrase-env" in failure("issue", "alice", "--role", "app")["hint"]
    assert (
        "NOT_SET is not set"
        in failure("issue", "a", "--role", "app", "--passphrase-env", "NOT_SET")["message"]
    )
    good_json("issue", "alice", "--role", "app", "--passphrase-env", "SECRET")


def test_a_passphrase_is_asked_for_twice(tmp_path):
    result = run("init", tmp_path / "a", "--passphrase", input="one\ntwo\none\none\n")
    assert result.exit_code == 0
    assert b"ENCRYPTED" in (tmp_path / "a" / "ca.key").read_bytes()


@pytest.mark.parametrize(
    "words", [(), ("--device", "--role", "app"), ("--role", "app", "--san", "x"), ("--role", "root")]
)
def test_a_certificate_is_for_a_client_or_for_a_board(home, words):
    run("init")
    assert run("issue", "alice", *words).exit_code == 2
    assert not (home / "pki" / "alice.key").exists()


def test_what_is_not_there_is_said_in_words():
    assert "pki init" in failure("list")["hint"]
    run("init")
    assert "pki list" in failure("revoke", "nobody")["hint"]
    assert "pki list" in failure("renew", "nobody")["hint"]
    assert "exists already" in failure("init")["message"]


def test_the_roles_to_choose_from_are_those_of_certificates():
    assert tuple(role.value for role in RoleName) == ROLES
