"""A broker is named once, on the command line or in fleet.toml, and wrong settings name their field."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.errors import EdgellmError
from edgellm.fleet.settings import BrokerSettings, keep, load, password


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("mqtt://broker.example", ("broker.example", 1883, False)),
        ("mqtts://broker.example", ("broker.example", 8883, True)),
        ("mqtts://[2001:db8::7]:18883", ("2001:db8::7", 18883, True)),
    ],
)
def test_an_address_has_the_port_of_its_scheme_unless_it_names_one(
    address: str, expected: tuple[str, int, bool]
):
    settings = BrokerSettings(broker=address)
    assert (settings.host, settings.port, settings.tls) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no broker is known here"),
        ({"broker": "broker.example"}, "broker: write mqtt://HOST"),
        ({"broker": "http://broker.example"}, "broker: write mqtt://HOST"),
        ({"broker": "mqtt://broker.example:0"}, "broker: write mqtt://HOST"),
        ({"broker": "mqtt://broker.example:99999"}, "broker: write mqtt://HOST"),
        ({"broker": "mqtt://me:secret@broker.example"}, "the name as --username"),
        ({"broker": "mqtt://broker.example", "ca": Path("ca.crt")}, "are for TLS: write mqtts://"),
        ({"broker": "mqtts://broker.example", "cert": Path("me.crt")}, "needs both cert and key"),
        ({"broker": "mqtt://broker.example", "password_file": Path("p")}, "password_file needs a username"),
        ({"broker": "mqtt://broker.example", "tenant": "a/b"}, "tenant: "),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(tmp_path: Path, options: dict[str, object], message: str):
    with pytest.raises(EdgellmError) as refused:
        load(options, tmp_path / "fleet.toml")
    assert message in refused.value.message
    assert refused.value.hint


def test_what_was_kept_is_used_and_an_option_goes_before_it(tmp_path: Path):
    path = tmp_path / "fleet.toml"
    kept = BrokerSettings(
        broker="mqtts://broker.example", tenant="acme", cert=tmp_path / "me.crt", key=tmp_path / "me.key"
    )
    keep(kept, path)
    assert load({"broker": None, "tenant": None}, path) == kept
    assert load({"tenant": "other"}, path) == kept.model_copy(update={"tenant": "other"})


def test_another_broker_gets_nothing_of_what_was_kept_for_the_first(tmp_path: Path):
    path = tmp_path / "fleet.toml"
    keep(BrokerSettings(broker="mqtt://broker.example", username="me"), path)
    assert load({"broker": "mqtt://other.example"}, path).username is None


def test_a_damaged_or_misspelt_file_is_named(tmp_path: Path):
    path = tmp_path / "fleet.toml"
    for text, message in (
        ("broker = ", "cannot be read"),
        ('brokers = "mqtt://x"', "no broker is known here"),
    ):
        path.write_text(text)
        with pytest.raises(EdgellmError, match=message):
            load({}, path)
    path.write_text('broker = "mqtt://x"\nuser = "me"\n')
    with pytest.raises(EdgellmError, match="user: Extra inputs") as refused:
        load({}, path)
    assert str(path) in refused.value.hint


def test_a_password_is_read_from_its_file_without_the_line_feed(tmp_path: Path):
    (tmp_path / "password").write_text("se cret\n")
    settings = BrokerSettings(broker="mqtt://x.example", username="me", password_file=tmp_path / "password")
    assert password(settings) == "se cret"
    (tmp_path / "password").unlink()
    with pytest.raises(EdgellmError, match="password_file"):
        password(settings)
