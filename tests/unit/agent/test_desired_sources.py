"""The allow-list: only one spelling of a place is understood, and it is compared part by part."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.desired.settings import CommandSettings, DesiredSettings
from edgellm_agent.desired.sources import AllowList, parse_entry, parse_source


def allowed(entry, source):
    try:
        return AllowList([entry]).allows(parse_source(source))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("https://host/path/", "https://host/path"),
        ("https://host/path", "https://host/path/"),
        ("https://host/path", "https://host/path/below/that"),
        ("https://host/", "https://host/anything"),
        ("https://host", "https://host/anything"),
        ("https://host:443/p", "https://host/p"),
        ("https://host:8443/p", "https://host:8443/p"),
        ("https://[2001:db8::1]/p", "https://[2001:db8:0::1]/p"),
        ("oci://registry/team", "oci://registry/team/engine"),
        ("oci://registry:5000/team/engine", "oci://registry:5000/team/engine"),
        ("oci://registry", "oci://registry/any"),
        ("http://192.0.2.7:8000/e", "http://192.0.2.7:8000/e"),
        ("oci+http://registry:5000/e", "oci+http://registry:5000/e"),
    ],
)
def test_an_entry_allows_itself_and_what_is_below(entry, source):
    assert allowed(entry, source)


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("https://host/path", "https://host/pathology"),
        ("https://host/path", "https://host/pat"),
        ("https://host/path", "https://host/"),
        ("https://host/path", "https://host/Path"),
        ("https://host/path", "https://host.evil/path"),
        ("https://host/path", "https://evil.host/path"),
        ("https://host/path", "https://host:8443/path"),
        ("https://host/path", "http://host/path"),
        ("https://host/path", "http://host:443/path"),
        ("https://host/path", "oci://host/path"),
        ("oci://host/path", "oci+http://host/path"),
        ("oci://host/team", "oci://host/teams"),
        ("http://host/path", "https://host/path"),
    ],
)
def test_what_is_not_below_an_entry_is_not_allowed(entry, source):
    assert parse_source(source)
    assert not allowed(entry, source)


@pytest.mark.parametrize(
    "source",
    [
        "https://host@evil/path",
        "https://user:secret@host/path",
        "https://host\\@evil/path",
        "https://host/path/../../other",
        "https://host/path/./x",
        "https://host/path//x",
        "https://host//path",
        "https://host/path/%2e%2e/other",
        "https://host/path%2fother",
        "https://host/path?x=https://host/path",
        "https://host/path#x",
        "https://HOST/path",
        "HTTPS://host/path",
        "https://host./path",
        "https://ho\u0455t/path",
        "https://\uff48ost/path",
        "https://host\u3002evil/path",
        "https://host /path",
        "https://host/path\n",
        "https://host/path\x00",
        "https://host:/path",
        "https://host:0/path",
        "https://host:0443/path",
        "https://host:65536/path",
        "https://host:٤٤٣/path",
        "https://[::1%25eth0]/path",
        "https://[::g]/path",
        "https:///path",
        "https:host/path",
        "//host/path",
        "host/path",
        "file:///path",
        "ftp://host/path",
        "",
        "https://" + "a" * 300 + "/path",
        "oci://host",
        "oci://host/",
        "oci://host/Upper",
        "oci://host/team/engine:tag",
        "oci://host/team/engine@sha256:00",
        "oci://host/a..b",
        "https://host/" + "a/" * 600,
    ],
)
def test_any_other_spelling_is_refused(source):
    with pytest.raises(ValueError, match=r".+"):
        parse_source(source)


@given(st.text(max_size=60), st.sampled_from(["https://host/path", "oci://host/path"]))
def test_whatever_is_put_behind_an_entry_stays_below_it(tail, entry):
    try:
        source = parse_source(entry + tail)
    except ValueError:
        return
    below = (source.host, source.segments[:1]) == ("host", ("path",))
    assert AllowList([entry]).allows(source) == (below and source.port == 443)


def test_tokens_come_over_tls_or_from_a_listed_place():
    listed = AllowList(["oci+http://registry:5000/e", "http://tokens:5001/auth"])
    assert listed.allows_token_service("https://anywhere/token")
    assert listed.allows_token_service("http://tokens:5001/auth")
    assert not listed.allows_token_service("http://tokens:5001/other")
    assert not listed.allows_token_service("http://registry:5000/e")
    assert not listed.allows_token_service("https://user@anywhere/token")


def test_settings_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match="cannot be part of the path"):
        DesiredSettings(sources=["https://host/../path"])
    with pytest.raises(ValueError, match="allow"):
        CommandSettings(allow=["shell"])
    assert DesiredSettings().sources == ()
    assert CommandSettings().allow == frozenset()


def test_a_place_is_written_as_http_wants_it():
    assert parse_entry("oci://registry:5000/team").origin == "https://registry:5000"
    assert parse_entry("oci+http://registry/team").origin == "http://registry"
    assert parse_entry("https://[::1]:443/").origin == "https://[::1]"


def test_an_agent_that_fetches_nothing_does_not_pay_for_an_http_client():
    program = (
        "import sys, edgellm_agent.daemon, edgellm_agent.desired.controller, edgellm_agent.desired.commands;"
        "print(sorted({'httpx', 'httpcore', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
