"""Commands of a fleet's own certificate authority."""

from __future__ import annotations

from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import passphrase as phrases
from edgellm.cli.output import JsonOption, print_facts, print_json, print_table
from edgellm.cli.passphrase import PassphraseOption

if TYPE_CHECKING:
    from edgellm.pki.authority import Authority, Holder
    from edgellm.pki.index import Issued

app = typer.Typer(
    help="Issue the certificates with which boards and people know each other.", no_args_is_help=True
)

FolderOption = Annotated[
    Path | None, typer.Option("--dir", help="The authority's folder; by default `pki` beside devices.toml.")
]
NameArgument = Annotated[str, typer.Argument(help="The holder: a device, a person or a program.")]
_Days = typer.Option("--days", min=1, max=36500, help="Validity, days.")


class RoleName(str, Enum):
    """What a client may do; each may all that the ones before it may."""

    VIEWER = "viewer"
    APP = "app"
    OPERATOR = "operator"
    ADMIN = "admin"


@app.command()
def init(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="By default `pki` beside devices.toml.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Common name of the authority.")] = "edgellm",
    days: Annotated[int, _Days] = 3650,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase to encrypt the authority's key with.")
    ] = False,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Make an authority: a key, its certificate, an empty revocation list.

    \b
    edgellm pki init
    edgellm pki init /media/stick/pki --passphrase
    """
    from edgellm.pki.authority import Authority

    secret = phrases.new(passphrase_env, asked=passphrase)
    authority = Authority.create(_folder(folder), name=name, days=days, passphrase=secret)
    until = authority.certificate.not_valid_after_utc
    if json_:
        print_json({"folder": authority.folder, "name": name, "not_after": until, "encrypted": bool(secret)})
    else:
        typer.echo(f"made the authority {name} in {authority.folder}, good until {until:%Y-%m-%d}")


@app.command()
def issue(
    name: NameArgument,
    role: Annotated[RoleName | None, typer.Option(help="For a client: what it may do.")] = None,
    device: Annotated[bool, typer.Option("--device", help="For a board.")] = False,
    san: Annotated[
        list[str] | None, typer.Option("--san", help="A board's further host name or address; repeatable.")
    ] = None,
    days: Annotated[int | None, _Days] = None,
    folder: FolderOption = None,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Issue a key and a certificate, to a client with --role (90 days) or to a board with --device (397).

    \b
    edgellm pki issue alice --role operator
    edgellm pki issue jetson-01 --device --san 192.0.2.7
    """
    from edgellm.pki import authority as pki

    if (role is None) != device:
        raise typer.BadParameter("give either --role or --device")
    if san and not device:
        raise typer.BadParameter("--san is for boards: give it with --device")
    authority = _authority(folder, passphrase_env)
    if role is None:
        holder = authority.issue_device(name, san or (), days or pki.DEVICE_DAYS)
    else:
        holder = authority.issue_client(name, role.value, days or pki.CLIENT_DAYS)
    _print_holder(holder, "issued", as_json=json_)


@app.command()
def renew(
    name: NameArgument,
    days: Annotated[int | None, _Days] = None,
    folder: FolderOption = None,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Issue a certificate with a new date for the key that the holder has; only NAME.pem changes.

    The old certificate is good until its own date.
    """
    _print_holder(_authority(folder, passphrase_env).renew(name, days), "renewed", as_json=json_)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="A holder, or one serial number.")],
    folder: FolderOption = None,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Revoke a certificate, or all of a name: writes crl.pem, which the boards must then be given."""
    authority = _authority(folder, passphrase_env)
    revoked = authority.revoke(name)
    if json_:
        print_json({"revoked": revoked, "crl": authority.folder / "crl.pem"})
        return
    for entry in revoked:
        typer.echo(f"revoked {entry.name} {entry.serial}")
    if not revoked:
        typer.echo(f"{name} has no certificate that still counts")
    typer.echo(f"now copy {authority.folder / 'crl.pem'} to every board")


@app.command("list")
def list_(folder: FolderOption = None, json_: JsonOption = False) -> None:
    """List what was issued, the oldest first."""
    authority = _authority(folder, None)
    issued, due = authority.issued(), authority.list_due()
    if json_:
        print_json({"certificates": [_fields(*item) for item in issued], "crl_due": due})
        return
    if issued:
        rows = [
            (entry.name, _kind(entry), state, f"{entry.not_after:%Y-%m-%d}", entry.serial)
            for entry, state in issued
        ]
        print_table(("NAME", "ROLE", "STATE", "UNTIL", "SERIAL"), rows)
    else:
        typer.echo("nothing issued yet; begin with `edgellm pki issue NAME --role admin`")
    if due is not None and due < datetime.now(timezone.utc):
        typer.echo(
            f"note: crl.pem was due for renewal on {due:%Y-%m-%d}; `edgellm pki renew` writes it", err=True
        )


def _print_holder(holder: Holder, what: str, *, as_json: bool) -> None:
    entry = holder.entry
    if as_json:
        files = {"ca": holder.ca_file, "cert": holder.cert_file, "key": holder.key_file}
        print_json({**_fields(entry, "valid"), "files": files})
        return
    typer.echo(f"{what} {entry.name} ({_kind(entry)}), good until {entry.not_after:%Y-%m-%d}")
    key = "kept by the holder" if holder.key_file is None else str(holder.key_file)
    facts = [("serial", entry.serial), ("certificate", str(holder.cert_file)), ("key", key)]
    if entry.sans:
        facts.append(("names", ", ".join((entry.name, *entry.sans))))
    print_facts(facts)


def _fields(entry: Issued, state: str) -> dict[str, Any]:
    return {**vars(entry), "kind": "device" if entry.is_device else "client", "state": state}


def _kind(entry: Issued) -> str:
    return entry.role or "device"


def _folder(folder: Path | None) -> Path:
    from edgellm import paths

    return folder or paths.config_dir() / "pki"


def _authority(folder: Path | None, variable: str | None) -> Authority:
    from edgellm.pki.authority import Authority

    return Authority(_folder(folder), phrases.known(variable, "the authority's key"))
