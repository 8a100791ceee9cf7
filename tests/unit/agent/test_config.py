import pytest

from edgellm.errors import EdgellmError
from edgellm_agent.config import load_settings


def write(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_the_file_is_read_and_the_environment_overrides_it(tmp_path, monkeypatch):
    path = write(tmp_path, 'device = "jetson-01"\nthreads = 3\n[mqtt]\nhost = "broker"\nport = 1884\n')
    monkeypatch.setenv("EDGELLM_AGENT_THREADS", "5")
    monkeypatch.setenv("EDGELLM_AGENT_MQTT__PORT", "1999")
    settings = load_settings(path)
    assert (settings.device, settings.threads) == ("jetson-01", 5)
    assert (settings.mqtt.host, settings.mqtt.port) == ("broker", 1999)


def test_there_are_defaults_without_a_file():
    assert load_settings(None).listen is None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("threads = -1", "threads"),
        ("colour = 'red'", "colour"),
        ("listen = '0.0.0.0:7077'", "listen"),
        ("listen = '127.0.0.1:99999'", "listen"),
        ("device = 'a/b'", "device"),
        ("[mqtt]\nhost = 'b'\nport = 0", "mqtt.port"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, field):
    with pytest.raises(EdgellmError, match=f"setting {field}") as refused:
        load_settings(write(tmp_path, text))
    assert "agent.toml" in refused.value.hint


def test_a_file_that_is_no_toml_and_one_that_is_not_there(tmp_path):
    with pytest.raises(EdgellmError, match="not TOML"):
        load_settings(write(tmp_path, "threads = = 2"))
    with pytest.raises(EdgellmError, match="no settings file"):
        load_settings(tmp_path / "none.toml")


@pytest.mark.parametrize("listen", ["127.0.0.1:7077", "localhost:7077", "[::1]:7077"])
def test_loopback_may_be_listened_on(tmp_path, listen):
    assert load_settings(write(tmp_path, f"listen = '{listen}'")).listen == listen
