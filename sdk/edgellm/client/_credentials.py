"""As whom a device is spoken to over TLS: the files of its entry in the book, or our own certificate."""

from __future__ import annotations

import getpass
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import grpc

from edgellm import paths, tls
from edgellm.devices import Device, TlsFiles
from edgellm.errors import EdgellmError
from edgellm.pki.index import Index


def credentials(device: Device) -> tuple[grpc.ChannelCredentials, tuple[tuple[str, str], ...]]:
    """What a channel to the device needs: credentials from the files as they are now, and options.

    Raises EdgellmError that names the file that is missing, damaged or expired.
    """
    files = _resolved(device)
    ca, cert, key = files.ca_file, files.cert_file, files.key_file
    assert ca is not None and cert is not None and key is not None  # noqa: S101, PT018 - resolved
    for path in (ca, cert, key):
        if not path.is_file():
            raise EdgellmError(
                f"no file {path}, which {device.name} is to be reached with",
                f"correct it: `edgellm device add {device.name} {device.target} --ca F --cert F --key F`",
            )
    try:
        # gRPC would only log that key and certificate are no pair.
        tls.client_context(ca, cert, key)
    except ValueError as error:
        raise EdgellmError(str(error), f"correct the files with which {device.name} is reached") from None
    _refuse_expired(cert)
    secrets = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), cert.read_bytes())
    # A board changes its address, and its certificate is for its name.
    named = files.server_name or (device.name if device.name != device.target else "")
    return secrets, (("grpc.ssl_target_name_override", named),) if named else ()


def _resolved(device: Device) -> TlsFiles:
    """The files to use; those that the device's entry does not name come from the user's PKI folder."""
    files, folder = device.tls or TlsFiles(), paths.config_dir() / "pki"
    if files.ca_file is None:
        files = replace(files, ca_file=folder / "ca.pem")
    if files.cert_file is None:
        own = _own_name(folder, device)
        files = replace(files, cert_file=folder / f"{own}.pem", key_file=folder / f"{own}.key")
    return files


def _own_name(folder: Path, device: Device) -> str:
    """Whose certificate it is to be: the one of this user's name, or the only one; raises EdgellmError."""
    boards = {entry.name for entry in Index.load(folder).entries if entry.is_device}
    names = sorted(path.stem for path in folder.glob("*.key") if path.with_suffix(".pem").is_file())
    own = [name for name in names if name != "ca" and name not in boards]
    with suppress(OSError, KeyError):  # without a name, as in a container
        if (user := getpass.getuser()) in own:
            return user
    if len(own) == 1:
        return own[0]
    if own:
        raise EdgellmError(
            f"which certificate is for {device.name}? {folder} has {', '.join(own)}",
            f"name it: `edgellm device add {device.name} {device.target} --cert F --key F`",
        )
    raise EdgellmError(
        f"{device.name} at {device.target} wants a certificate, and {folder} has none",
        "put ca.pem, NAME.pem and NAME.key there (`edgellm pki issue`), or reach it over ssh://",
    )


def _refuse_expired(cert: Path) -> None:
    """The device would only hang up, without a reason."""
    from cryptography import x509  # noqa: PLC0415 - a tenth of a second that other ways need not wait

    until = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
    if until < datetime.now(timezone.utc):
        raise EdgellmError(
            f"the certificate {cert} has expired on {until:%Y-%m-%d}",
            f"renew it where it was issued: `edgellm pki renew {cert.stem}`",
        )
