"""A folder with an authority: ca.pem, ca.key, crl.pem, index.json; NAME.pem and NAME.key of each holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from edgellm import paths
from edgellm.devices import is_name
from edgellm.errors import EdgellmError
from edgellm.pki import certificates
from edgellm.pki.certificates import Signer
from edgellm.pki.index import Index, Issued, State

CA_DAYS, CLIENT_DAYS, DEVICE_DAYS = 3650, 90, 397
# When the next revocation list is due at the latest. Every issue, renewal and revocation writes one.
CRL_DAYS = 90
# Names of the authority's own files.
_RESERVED = {"ca", "crl", "index"}


@dataclass(frozen=True)
class Holder:
    """A certificate that was just issued, and its files; no `key_file` if the holder keeps the key."""

    entry: Issued
    ca_file: Path
    cert_file: Path
    key_file: Path | None


class Authority:
    """Issues, renews and revokes; one command at a time works in a folder.

    Args:
        folder: Where the files are; raises EdgellmError if there is no authority.
        passphrase: Is asked for the passphrase if the authority's key is encrypted.
        now: The time.
    """

    def __init__(
        self,
        folder: Path,
        passphrase: Callable[[], str] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self.folder = folder
        self._passphrase = passphrase
        self._now = now
        if not (folder / "ca.pem").is_file():
            raise EdgellmError(f"there is no authority in {folder}", "make one with `edgellm pki init`")

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str = "edgellm",
        days: int = CA_DAYS,
        passphrase: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> Authority:
        """Makes an authority with a new key; raises EdgellmError if there is one, or the files of one."""
        for file in ("ca.pem", "ca.key", "index.json"):
            if (folder / file).exists():
                raise EdgellmError(
                    f"{folder / file} exists already", "give another folder, or use this authority"
                )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with _locked(folder):
            signer = certificates.new_authority(name, now(), timedelta(days=days))
            # The certificate comes last: without it there is no authority yet, and `init` can be repeated.
            _write_list(folder, signer, Index(), now())
            _write_key(folder / "ca.key", signer.key, passphrase)
            paths.write_atomically(folder / "ca.pem", signer.certificate.public_bytes(Encoding.PEM))
        return cls(folder, None if passphrase is None else lambda: passphrase, now)

    @property
    def certificate(self) -> x509.Certificate:
        """The authority's own."""
        return _read_certificate(self.folder / "ca.pem")

    def issued(self) -> list[tuple[Issued, State]]:
        """All certificates, the oldest first, and what has become of each."""
        now = self._now()
        return [(entry, entry.state(now)) for entry in Index.load(self.folder).entries]

    def list_due(self) -> datetime | None:
        """When the next revocation list is due; None if there is no list."""
        path = self.folder / "crl.pem"
        return x509.load_pem_x509_crl(path.read_bytes()).next_update_utc if path.is_file() else None

    def issue_client(self, name: str, role: str, days: int = CLIENT_DAYS) -> Holder:
        """A key and certificate for a person or program; raises EdgellmError."""
        # Looked at first: nothing is left behind of what cannot be.
        certificates.client_names(role)
        return self._issue(name, role, (), days)

    def issue_device(self, name: str, sans: Sequence[str] = (), days: int = DEVICE_DAYS) -> Holder:
        """A key and certificate for a board; `sans` are further names and addresses of it."""
        certificates.device_names(name, sans)
        return self._issue(name, "", tuple(sans), days)

    def renew(self, name: str, days: int | None = None) -> Holder:
        """A certificate with a new date for the same key, role and names: the holder's key stays where it is.

        Raises EdgellmError if the name has none, or a revoked one.
        """
        with _locked(self.folder):
            index = Index.load(self.folder)
            last = next((entry for entry in reversed(index.entries) if entry.name == name), None)
            if last is None:
                raise EdgellmError(f"no certificate {name!r:.80}", "see them with `edgellm pki list`")
            if last.revoked_at is not None:
                raise EdgellmError(
                    f"{name} was revoked: its key is not to be trusted", "issue a new certificate"
                )
            key = _read_certificate(self.folder / f"{name}.pem").public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise EdgellmError(f"{self.folder / name}.pem is not from this authority", "issue a new one")
            days = days or (DEVICE_DAYS if last.is_device else CLIENT_DAYS)
            return self._sign(self._signer(), index, replace(last, not_after=self._in(days)), key)

    def revoke(self, name_or_serial: str) -> list[Issued]:
        """Revokes a serial number, or all certificates of a name that still count; returns those.

        Raises EdgellmError if there is none.
        """
        with _locked(self.folder):
            index, now = Index.load(self.folder), self._now()
            found = index.of(name_or_serial)
            if not found:
                raise EdgellmError(
                    f"no certificate {name_or_serial!r:.80}", "see them with `edgellm pki list`"
                )
            counting = [entry for entry in found if entry.state(now) == "valid"]
            signer = self._signer()
            for entry in counting:
                index = index.revoked(entry.serial, now)
            _write_list(self.folder, signer, index, now)
            return counting

    def _issue(self, name: str, role: str, sans: tuple[str, ...], days: int) -> Holder:
        if not is_name(name) or name.lower() in _RESERVED:
            raise EdgellmError(f"not a name: {name!r:.80}", "use letters, digits, '.', '_' and '-'")
        with _locked(self.folder):
            index, signer = Index.load(self.folder), self._signer()
            self._refuse_taken(index, name)
            key = certificates.new_key()
            wanted = Issued("", name, role, sans, self._now(), self._in(days))
            _write_key(self.folder / f"{name}.key", key, None)
            return self._sign(signer, index, wanted, key.public_key())

    def _sign(self, signer: Signer, index: Index, wanted: Issued, key: ec.EllipticCurvePublicKey) -> Holder:
        """Signs; what the index knows may be missing as a file after a crash, and not the other way round."""
        now, name = self._now(), wanted.name
        if wanted.is_device:
            names = certificates.device_names(name, wanted.sans)
        else:
            names = certificates.client_names(wanted.role)
        lifetime = wanted.not_after - now
        signed = certificates.certificate(signer, name, key=key, names=names, now=now, lifetime=lifetime)
        entry = replace(
            wanted, serial=f"{signed.serial_number:x}", at=now, not_after=signed.not_valid_after_utc
        )
        _write_list(self.folder, signer, index.issued(entry), now)
        cert_file, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths.write_atomically(cert_file, signed.public_bytes(Encoding.PEM))
        return Holder(entry, self.folder / "ca.pem", cert_file, key_file if key_file.is_file() else None)

    def _in(self, days: int) -> datetime:
        return self._now() + timedelta(days=days)

    def _refuse_taken(self, index: Index, name: str) -> None:
        """A name stands for one holder; case does not tell two apart, as DNS has it."""
        now, cert_file = self._now(), self.folder / f"{name}.pem"
        same = [entry for entry in index.entries if entry.name.lower() == name.lower()]
        if any(entry.state(now) == "valid" for entry in same) and (
            cert_file.exists() or name != same[-1].name
        ):
            raise EdgellmError(
                f"{same[-1].name} has a certificate", f"`edgellm pki renew {name}`, or revoke it first"
            )
        if not same and cert_file.exists():
            raise EdgellmError(
                f"{cert_file} is not from this authority", "move it away, or take another name"
            )

    def _signer(self) -> Signer:
        path = self.folder / "ca.key"
        try:
            pem = path.read_bytes()
        except FileNotFoundError:
            raise EdgellmError(f"no file {path}: only who has it can sign", "work where it is kept") from None
        signer = Signer(self.certificate, _load_key(path, pem, self._passphrase))
        if signer.certificate.not_valid_after_utc <= self._now():
            raise EdgellmError(
                f"the authority in {self.folder} has expired", "make a new one in another folder"
            )
        return signer


def _load_key(path: Path, pem: bytes, passphrase: Callable[[], str] | None) -> ec.EllipticCurvePrivateKey:
    try:
        try:
            key = load_pem_private_key(pem, None)
        except TypeError:  # it is encrypted
            if passphrase is None:
                raise EdgellmError(
                    f"{path} is encrypted", "name its passphrase with --passphrase-env"
                ) from None
            key = load_pem_private_key(pem, passphrase().encode())
    except ValueError:
        raise EdgellmError(
            f"{path} cannot be opened", "is it the right passphrase, and the file whole?"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EdgellmError(f"{path} is not a key of `edgellm pki init`", "put the right one back")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EdgellmError(f"{path} cannot be read: {error}", "put the certificate back") from None


def _write_list(folder: Path, signer: Signer, index: Index, now: datetime) -> None:
    """Writes the index, and the revocation list that it means."""
    index = index.listed(now)
    index.save(folder)
    revoked = [(int(entry.serial, 16), entry.revoked_at) for entry in index.entries if entry.revoked_at]
    listed = certificates.revocation_list(
        signer, revoked, number=index.crl_number, now=now, lifetime=timedelta(days=CRL_DAYS)
    )
    paths.write_atomically(folder / "crl.pem", listed.public_bytes(Encoding.PEM))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str | None) -> None:
    """Only the owner may read it: `write_atomically` makes its files so."""
    how: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        how = BestAvailableEncryption(passphrase.encode())
    paths.write_atomically(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other commands out of the folder; raises EdgellmError if one is in it."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgellmError(f"another command works in {folder}", "try again once it has ended") from None
        yield
    finally:
        os.close(descriptor)
