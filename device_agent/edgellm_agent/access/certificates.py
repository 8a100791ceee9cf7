"""TLS of the API: our certificate, whose clients we take, and what their certificates say they may.

A client's certificate has one URI `urn:edgellm:role:ROLE` among its alternative names, and its common name is
the client's. gRPC checks in the handshake that an authority of ours signed it and that it is valid now;
whether it has been revoked is asked at each call, so that open connections of a revoked one are of no use.
"""

from __future__ import annotations

import datetime
import functools
import logging
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.renewed import Renewed
from edgellm_agent.access.settings import TlsSettings
from edgellm_agent.errors import UnauthenticatedError

log = logging.getLogger(__name__)

ROLE_URI = "urn:edgellm:role:"
# Printable ASCII, as X.509 allows for a common name: it is written to logs.
_NAME = re.compile(r"[ -~]{1,64}")
_CRL_END = b"-----END X509 CRL-----"


class CertificateError(UnauthenticatedError):
    """A certificate that says nothing we can use, or has been revoked."""

    hint = "issue a certificate for a role with `edgellm pki issue`, and use that one"

    def __init__(self, message: str, who: str = "") -> None:
        super().__init__(message)
        self.who = who


@dataclass(frozen=True)
class _Holder:
    """What a client's certificate says."""

    caller: Caller
    issuer: bytes
    serial: int
    not_after: datetime.datetime


class Certificates:
    """What the files of the settings say now; raises ValueError if they are of no use at the start."""

    def __init__(self, settings: TlsSettings) -> None:
        files = [settings.ca_file, settings.cert_file, settings.key_file]
        self._identity = Renewed(files, functools.partial(_load_identity, settings))
        self._given: grpc.ServerCertificateConfiguration | None = None
        self._revocations: Renewed[frozenset[tuple[bytes, int]]] | None = None
        if settings.crl_file is not None:
            load = functools.partial(_load_revocations, settings.crl_file, settings.ca_file)
            self._revocations = Renewed([settings.crl_file, settings.ca_file], load)

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC: both sides show certificates; ours is looked at again in each handshake."""
        self._given = self._identity.get()
        return grpc.dynamic_ssl_server_credentials(
            self._given, self._renewed, require_client_authentication=True
        )

    def caller(self, pem: bytes) -> Caller:
        """Who has this certificate, which the handshake has verified; raises UnauthenticatedError."""
        holder = _read_holder(pem)
        name = holder.caller.name
        # The connection may be older than its end.
        if holder.not_after < datetime.datetime.now(datetime.timezone.utc):
            raise CertificateError(f"{name} has expired", name)
        if (holder.issuer, holder.serial) in self._revoked():
            raise CertificateError(f"{name} has been revoked", name)
        return holder.caller

    def _revoked(self) -> frozenset[tuple[bytes, int]]:
        return frozenset() if self._revocations is None else self._revocations.get()

    def _renewed(self) -> Any:
        """Called by gRPC from a thread of its own; None, which gRPC's types do not know, is as before."""
        identity = self._identity.get()
        if identity is self._given:
            return None
        self._given = identity
        return identity


@functools.lru_cache(maxsize=256)
def _read_holder(pem: bytes) -> _Holder:
    """Raises CertificateError."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        names, uris = [], []
    except ValueError as error:
        raise CertificateError(f"the certificate cannot be read: {error}") from None
    roles = [uri.removeprefix(ROLE_URI) for uri in uris if uri.startswith(ROLE_URI)]
    known = {str(role): role for role in Role}
    if len(roles) != 1 or roles[0] not in known:
        raise CertificateError(
            f"the certificate must have one URI {ROLE_URI}ROLE, of {', '.join(known)}; it has "
            f"{', '.join(roles)[:100] or 'none'}"
        )
    if len(names) != 1 or not _NAME.fullmatch(name := str(names[0].value)):
        raise CertificateError(
            "the certificate must have one common name, of at most 64 printable characters"
        )
    return _Holder(
        Caller(f"certificate {name}", known[roles[0]]),
        certificate.issuer.public_bytes(),
        certificate.serial_number,
        certificate.not_valid_after_utc,
    )


def _load_identity(settings: TlsSettings) -> grpc.ServerCertificateConfiguration:
    """Raises ValueError that names the file."""
    ca, cert, key = (
        _read(name, path)
        for name, path in (
            ("ca_file", settings.ca_file),
            ("cert_file", settings.cert_file),
            ("key_file", settings.key_file),
        )
    )
    _authorities(ca, settings.ca_file)
    try:
        # gRPC takes what it cannot use without a word.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # With a password given, OpenSSL does not ask the terminal for that of an encrypted key.
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"tls cert_file {settings.cert_file} and key_file {settings.key_file} cannot be used: {error}"
        ) from None
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _load_revocations(path: Path, ca_file: Path) -> frozenset[tuple[bytes, int]]:
    """Issuers and serial numbers; raises ValueError if a list is damaged, or not signed by us."""
    authorities = _authorities(_read("ca_file", ca_file), ca_file)
    blocks = _read("crl_file", path).split(_CRL_END)[:-1]
    if not blocks:
        raise ValueError(f"tls crl_file {path} has no certificate revocation list (PEM)")
    revoked: set[tuple[bytes, int]] = set()
    next_updates = []
    for block in blocks:
        try:
            crl = x509.load_pem_x509_crl(block + _CRL_END + b"\n")
        except ValueError as error:
            raise ValueError(f"tls crl_file {path} cannot be read: {error}") from None
        if not any(_signed(crl, authority) for authority in authorities):
            raise ValueError(f"tls crl_file {path} is signed by no authority in {ca_file}")
        issuer = crl.issuer.public_bytes()
        revoked |= {(issuer, entry.serial_number) for entry in crl}
        if crl.next_update_utc is not None:
            next_updates.append(crl.next_update_utc)
    now = datetime.datetime.now(datetime.timezone.utc)
    if next_updates and min(next_updates) < now:
        # A device that was away for long must still answer; an old list is better than none.
        log.warning("access.old_revocations file=%s due=%s", path, min(next_updates).isoformat())
    return frozenset(revoked)


def _signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    kinds = (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)
    if crl.issuer != authority.subject or not isinstance(key, kinds):
        return False
    return crl.is_signature_valid(key)


def _authorities(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"tls ca_file {path} has no certificates (PEM): {error}") from None


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tls {name} {path} cannot be read: {error}") from None
