"""What is in the fleet's certificates: pure functions over X.509 (RFC 5280), ECDSA over P-256."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgellm.errors import EdgellmError

ROLES = ("viewer", "app", "operator", "admin")
# Subject alternative names (URI) that say what the holder is: a client with a role, or a board.
ROLE_URI = "urn:edgellm:role:"
DEVICE_URI = "urn:edgellm:device"

# Boards without a battery for their clock start in the past.
_BACKDATED = timedelta(days=1)
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass(frozen=True)
class Signer:
    """The authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_authority(name: str, now: datetime, lifetime: timedelta) -> Signer:
    """A self-signed authority that signs certificates of holders, and none of further authorities."""
    key = new_key()
    subject = _common_name(name)
    builder = (
        _builder(subject, subject, key.public_key(), now, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(_TLS_BOTH, critical=False)
    )
    return Signer(builder.sign(key, hashes.SHA256()), key)


def client_names(role: str) -> list[x509.GeneralName]:
    """What a client's certificate says beside its name; raises EdgellmError for an unknown role."""
    if role not in ROLES:
        raise EdgellmError(f"unknown role {role!r:.40}; there are {', '.join(ROLES)}", "give one with --role")
    return [x509.UniformResourceIdentifier(ROLE_URI + role)]


def device_names(name: str, sans: Iterable[str]) -> list[x509.GeneralName]:
    """What a board's certificate says: its name, and further names and addresses by which it is dialled.

    Raises EdgellmError that names the one that is malformed.
    """
    hosts = dict.fromkeys([name, *sans])
    return [x509.UniformResourceIdentifier(DEVICE_URI), *map(_host, hosts)]


def certificate(
    signer: Signer,
    name: str,
    *,
    key: ec.EllipticCurvePublicKey,
    names: Sequence[x509.GeneralName],
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    """A certificate for the holder of a key; it does not outlive the authority.

    A board is a server here and a client of the broker; it is known by DEVICE_URI among `names`.
    """
    board = x509.UniformResourceIdentifier(DEVICE_URI) in names
    until = min(now + lifetime, signer.certificate.not_valid_after_utc)
    builder = (
        _builder(_common_name(name), signer.certificate.subject, key, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(_TLS_BOTH if board else _TLS_CLIENT, critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False
        )
    )
    return builder.sign(signer.key, hashes.SHA256())


def revocation_list(
    signer: Signer,
    revoked: Iterable[tuple[int, datetime]],
    *,
    number: int,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateRevocationList:
    """The list of revoked serial numbers, each with its time; the next one is due at `now + lifetime`."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now)
        .next_update(now + lifetime)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False
        )
    )
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer.key, hashes.SHA256())


_TLS_CLIENT = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
_TLS_BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*usages: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in usages for usage in _USAGES})


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.split(".")
    if len(text) > 253 or not all(_is_label(label) for label in labels):
        raise EdgellmError(f"neither a host's name nor an address: {text!r:.80}", "correct --san")
    return x509.DNSName(text)


def _is_label(label: str) -> bool:
    return 0 < len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()
