import re
from pathlib import Path

import pydantic
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
        ("listen = '7077'", "listen"),
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


@pytest.mark.parametrize("listen", ["127.0.0.1:7077", "0.0.0.0:7400", "[::1]:7077"])
def test_a_port_is_opened_only_with_certificates(tmp_path, listen):
    with pytest.raises(EdgellmError, match=r"needs a \[tls\] table"):
        load_settings(write(tmp_path, f"listen = '{listen}'"))
    tls = "\n[tls]\nca_file = 'ca.pem'\ncert_file = 'me.pem'\nkey_file = 'me.key'"
    assert load_settings(write(tmp_path, f"listen = '{listen}'{tls}")).listen == listen


SHIPPED = Path(__file__).parents[3] / "deploy/agent.toml"
# Where the file shows an example though there is a default.
EXAMPLES = {"device", "profile"}
NOTHING = ((), {}, frozenset())
# Stands in for the one that the file shows: exactly one of them may be set.
ALTERNATIVES = {"http.api_key", "http.open"}


def with_every_setting(tmp_path):
    """The shipped file, with every setting that it only shows."""
    return load_settings(
        write(tmp_path, re.sub(r"^#(?=[a-z\[])", "", SHIPPED.read_text(), flags=re.MULTILINE))
    )


def every_field(settings, table=""):
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        yield f"{table}{name}", name in settings.model_fields_set, field, value
        if isinstance(value, pydantic.BaseModel):
            yield from every_field(value, f"{table}{name}.")


def test_the_shipped_file_is_accepted_as_it_is():
    settings = load_settings(SHIPPED)
    assert (settings.device, settings.mqtt, settings.http) == ("jetson-01", None, None)


def test_the_shipped_file_names_every_setting(tmp_path):
    settings = with_every_setting(tmp_path)
    unset = {name for name, is_set, _, _ in every_field(settings) if not is_set}
    assert unset == ALTERNATIVES


def test_what_the_shipped_file_shows_is_the_default_where_there_is_one(tmp_path):
    wrong = {}
    for name, _, field, value in every_field(with_every_setting(tmp_path)):
        default = field.get_default(call_default_factory=True)
        no_default = field.is_required() or default is None or default in NOTHING
        if no_default or name in EXAMPLES or isinstance(value, pydantic.BaseModel):
            continue
        if value != default:
            wrong[name] = (value, default)
    assert wrong == {}
