"""The HTTP API is off unless it is configured, and listens on loopback alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgellm.errors import EdgellmError
from edgellm_agent.config import load_settings
from edgellm_agent.http.guard import open_key
from edgellm_agent.http.settings import HttpSettings, is_loopback


def write(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_it_is_off_by_default():
    assert load_settings(None).http is None


def test_the_file_turns_it_on_and_the_environment_holds_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_AGENT_HTTP__API_KEY", "secret")
    settings = load_settings(write(tmp_path, "[http]\nlisten = '[::1]:8080'")).http
    assert settings.listen == "[::1]:8080"
    assert settings.api_key.get_secret_value() == "secret"
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("max_connections = 8", "http.listen"),
        ("listen = '0.0.0.0:8080'", "http.listen"),
        ("listen = '127.0.0.1'", "http.listen"),
        ("listen = '127.0.0.1:8080'\napi_key = ''", "http.api_key"),
        ("listen = '127.0.0.1:8080'\nmax_connections = 0", "http.max_connections"),
        ("listen = '127.0.0.1:8080'\ntimeout_s = 0", "http.timeout_s"),
        ("listen = '127.0.0.1:8080'\nport = 1", "http.port"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, field):
    with pytest.raises(EdgellmError, match=f"setting {field}"):
        load_settings(write(tmp_path, f"[http]\n{text}"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_these_are_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "10.0.0.1", "0.0.0.0", "::", "example.org", "localhost.example.org"])
def test_these_are_not(host):
    assert not is_loopback(host)


def test_an_agent_without_it_loads_none_of_its_libraries():
    check = (
        "import sys, edgellm_agent.daemon; "
        "print({'starlette', 'uvicorn', 'h11', 'prometheus_client'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


@pytest.mark.parametrize(
    "keys", ["", "open = true\napi_key = 'x'", "api_key = 'x'\napi_key_file = 'x'", "open = false"]
)
def test_it_takes_either_a_key_or_a_word_that_none_is_wanted(tmp_path, keys):
    with pytest.raises(EdgellmError, match=r"give one of api_key_file .*open = true"):
        load_settings(write(tmp_path, f"[http]\nlisten = '127.0.0.1:8080'\n{keys}"))


def settings_with(key_file):
    return HttpSettings(listen="127.0.0.1:1", api_key_file=key_file)


def test_a_key_in_a_file_is_read_without_the_line_feed_and_again_when_it_changes(tmp_path):
    file = tmp_path / "key"
    file.write_text("first\n")
    file.chmod(0o640)
    key = open_key(settings_with(file))
    assert key() == "first"
    file.write_text("second one\n")
    assert key() == "second one"


@pytest.mark.parametrize(
    ("content", "mode", "what"),
    [("", 0o600, "empty"), ("x", 0o644, "open to all"), (None, 0, "cannot be read")],
)
def test_a_key_file_of_no_use_is_refused(tmp_path, content, mode, what):
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(ValueError, match=f"api_key_file .*{what}"):
        open_key(settings_with(file))
