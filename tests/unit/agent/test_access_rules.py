"""The table of rules: complete, and what it means."""

import pytest

from edgellm_agent.access import rules
from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.errors import DeniedError
from tests.support.guarded import METHODS


def allowed(role):
    return {name for name in rules.RULES if _may(Caller("uid 1000", role), name)}


def _may(caller, name):
    try:
        rules.check(caller, name)
    except DeniedError:
        return False
    return True


def test_every_method_of_every_service_has_a_rule():
    assert METHODS.keys() - rules.RULES.keys() == set()


def test_no_rule_is_for_a_method_that_there_is_not():
    # Newer versions of gRPC's health service can list, older ones cannot.
    assert rules.RULES.keys() - METHODS.keys() <= {"grpc.health.v1.Health/List"}


def test_a_viewer_looks_and_changes_nothing():
    assert {name for name in allowed(Role.VIEWER) if not name.startswith("grpc.")} == {
        "InferenceService/ListModels",
        "EngineService/ListEngines",
        "EngineService/ListHistory",
        "DeviceService/GetInfo",
        "DeviceService/GetMemoryPlan",
        "DeviceService/WatchTelemetry",
        "DeviceService/WhoAmI",
        "TrustService/ListKeys",
    }


def test_an_app_may_also_generate_and_hold():
    assert allowed(Role.APP) - allowed(Role.VIEWER) == {
        "InferenceService/Generate",
        "EngineService/HoldEngines",
    }


def test_an_operator_may_also_manage_engines_and_read_logs():
    assert allowed(Role.OPERATOR) - allowed(Role.APP) == {
        "EngineService/Prepare",
        "EngineService/WriteBlob",
        "EngineService/Commit",
        "EngineService/Activate",
        "EngineService/Deactivate",
        "EngineService/Rollback",
        "EngineService/RemoveEngine",
        "EngineService/PinEngine",
        "DeviceService/WatchLogs",
    }


def test_only_an_admin_decides_whose_signatures_count_and_reads_the_audit_log():
    assert allowed(Role.ADMIN) - allowed(Role.OPERATOR) == {
        "TrustService/TrustKey",
        "TrustService/RevokeKey",
        "DeviceService/ReadAudit",
    }


def test_whatever_takes_more_than_an_app_is_written_down_save_bytes_and_logs():
    unwritten = {n for n, r in rules.RULES.items() if r.role > Role.APP and not r.audited}
    assert unwritten == {"EngineService/WriteBlob", "DeviceService/WatchLogs"}


def test_what_is_written_down_comes_in_one_request():
    assert [n for n, r in rules.RULES.items() if r.audited and METHODS[n].client_streaming] == []


def test_a_stream_that_ends_by_itself_does_not_count_as_endless():
    endless = {name for name, rule in rules.RULES.items() if rule.endless}
    assert all(METHODS[name].server_streaming for name in endless)
    assert {"EngineService/Activate", "InferenceService/Generate"} & endless == set()


def test_a_refusal_says_who_what_and_what_it_takes():
    with pytest.raises(
        DeniedError, match=r"^uid 1000 has the role app; EngineService/Activate needs operator$"
    ) as error:
        rules.check(Caller("uid 1000", Role.APP), "EngineService/Activate")
    assert "[access]" in error.value.hint
    assert "edgellm pki issue" in error.value.hint


@pytest.mark.parametrize("name", ["", "EngineService/activate", "edgellm.v1.EngineService/Activate", "x/Y"])
def test_what_has_no_rule_is_open_to_nobody(name):
    with pytest.raises(DeniedError, match="open to nobody"):
        rules.check(Caller("root", Role.ADMIN), name)


def test_a_foreign_service_of_the_same_name_is_another_method():
    assert rules.short_name("/edgellm.v1.EngineService/Activate") == "EngineService/Activate"
    assert rules.short_name("/EngineService/Activate") == "EngineService/Activate"
    assert rules.short_name("/evil.EngineService/Activate") not in rules.RULES


@pytest.mark.parametrize(
    ("name", "fields", "subject"),
    [
        ("EngineService/Activate", {"engine": "tiny"}, "tiny"),
        ("EngineService/PinEngine", {"pinned": True}, "pinned"),
        ("EngineService/PinEngine", {}, "unpinned"),
        (
            "EngineService/Prepare",
            {"manifest": b""},
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ),
        ("TrustService/TrustKey", {"key": {"name": "release", "public_pem": "PEM"}}, "release"),
    ],
)
def test_the_log_says_what_a_call_was_about(name, fields, subject):
    request = METHODS[name].input_type._concrete_class(**fields)
    assert rules.RULES[name].subject(request) == subject


def test_every_subject_can_be_told_of_an_empty_request():
    for name, rule in rules.RULES.items():
        if rule.audited:
            assert isinstance(rule.subject(METHODS[name].input_type._concrete_class()), str)
