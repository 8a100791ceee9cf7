"""Commands about keys: make one, and say which ones a device trusts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import passphrase as phrases
from edgellm.cli.output import DeviceOption, JsonOption, print_facts, print_json, print_table
from edgellm.cli.passphrase import PassphraseOption

if TYPE_CHECKING:
    from edgellm.client._trust import KeyInfo
    from edgellm.signing import PublicKey

app = typer.Typer(help="Make signing keys, and say whose signatures a device takes.", no_args_is_help=True)

_DAY_S = 24 * 3600

PublicKeyArgument = Annotated[
    str, typer.Argument(help="A .pub.json or PEM file, or the name of a key made here.")
]
DateFormats = ["%Y-%m-%d"]


@app.command()
def generate(
    name: Annotated[str, typer.Argument(help="What devices show, as release-2026.")],
    days: Annotated[int | None, typer.Option(min=1, help="Valid for so many days from now.")] = None,
    not_before: Annotated[
        str | None, typer.Option(help="Valid from then on, as 2026-11-01 (UTC).", show_default=False)
    ] = None,
    not_after: Annotated[
        str | None, typer.Option(help="Valid until then, as 2027-11-01 (UTC).", show_default=False)
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory; default: edgellm's own.", show_default=False),
    ] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase to encrypt the key with.")
    ] = False,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Make an Ed25519 key: NAME.key, for you only, and NAME.pub.json, for devices.

    \b
    edgellm key generate release-2026 --days 730
    edgellm key trust release-2026 --device jetson-01
    """
    from edgellm.signing import keys

    begins, ends = _time(not_before, "--not-before"), _time(not_after, "--not-after")
    if days is not None:
        if ends is not None:
            raise typer.BadParameter("give --days or --not-after, not both")
        ends = (begins or int(time.time())) + days * _DAY_S
    typed = phrases.new(passphrase_env, asked=passphrase)
    secret = None if typed is None else typed.encode()
    public, private_path = keys.generate(
        directory or keys.keys_dir(), name, not_before_s=begins, not_after_s=ends, passphrase=secret
    )
    public_path = private_path.with_name(name + keys.PUBLIC_SUFFIX)
    if json_:
        print_json({**_as_json(public), "private_key": private_path, "public_key": public_path})
        return
    print_facts(
        [
            *_facts(public),
            ("private key", str(private_path)),
            ("public key", str(public_path)),
            ("next", f"edgellm key trust {public_path} --device NAME"),
        ]
    )


@app.command()
def show(key: PublicKeyArgument, json_: JsonOption = False) -> None:
    """Show a public key file."""
    public = _public(key)
    if json_:
        print_json(_as_json(public))
    else:
        print_facts(_facts(public))


@app.command("list")
def list_(device: DeviceOption, json_: JsonOption = False) -> None:
    """List the keys that a device trusts, and those that were revoked there."""
    from edgellm.client import Client
    from edgellm.client._trust import DeviceKeys

    with Client.for_device(device) as client:
        found = DeviceKeys(client).all()
    if json_:
        print_json({"keys": found})
    elif found:
        print_table(("NAME", "STATE", "VALID", "FROM", "KEY ID"), [_row(key) for key in found])
    else:
        typer.echo(f"{device} knows no key; trust one with `edgellm key trust`")


@app.command()
def trust(key: PublicKeyArgument, device: DeviceOption, json_: JsonOption = False) -> None:
    """Have a device trust a key: from the first one on it refuses engines that no trusted key stands for."""
    from edgellm.client import Client
    from edgellm.client._trust import DeviceKeys

    public = _public(key)
    with Client.for_device(device) as client:
        trusted = DeviceKeys(client).trust(public)
    if json_:
        print_json(trusted)
    else:
        typer.echo(f"{device} trusts {trusted.name} ({trusted.key_id})")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Key id, or the name of a key if only one has it.")],
    device: DeviceOption,
    json_: JsonOption = False,
) -> None:
    """End a device's trust in a key, for good; says for which engines nobody stands any more."""
    from edgellm.client import Client
    from edgellm.client._trust import DeviceKeys

    with Client.for_device(device) as client:
        revoked, engines = DeviceKeys(client).revoke(key)
    if json_:
        print_json({"key": revoked, "engines": engines})
        return
    typer.echo(f"{device} no longer trusts {revoked.name} ({revoked.key_id})")
    for digest in engines:
        typer.echo(f"nobody stands for {digest} any more: it runs on if it is active; remove or sign it")


def _public(key: str) -> PublicKey:
    from edgellm.signing import keys

    return keys.read_public_key(keys.find(key, keys.PUBLIC_SUFFIX))


def _time(text: str | None, option: str) -> int | None:
    from edgellm.signing import times

    if text is None:
        return None
    try:
        return times.from_text(f"{text}T00:00:00Z" if len(text) == 10 else text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a date like 2026-11-01", param_hint=option) from None


def _facts(key: PublicKey) -> list[tuple[str, str]]:
    from edgellm.signing import times

    begins = "" if key.not_before_s is None else times.day(key.not_before_s)
    ends = "" if key.not_after_s is None else times.day(key.not_after_s)
    return [("key", key.name), ("key id", key.key_id), ("valid", _span(begins, ends))]


def _span(begins: str, ends: str) -> str:
    return f"{begins} to {ends}".strip() if begins or ends else "always"


def _as_json(key: PublicKey) -> dict[str, object]:
    import json

    return dict(json.loads(key.to_json()))


def _row(key: KeyInfo) -> tuple[str, ...]:
    state = "trusted" if key.revoked_at is None else f"revoked {key.revoked_at:%Y-%m-%d}"
    begins = "" if key.not_before is None else f"{key.not_before:%Y-%m-%d}"
    ends = "" if key.not_after is None else f"{key.not_after:%Y-%m-%d}"
    return key.name, state, _span(begins, ends), "settings" if key.provisioned else "call", key.key_id
