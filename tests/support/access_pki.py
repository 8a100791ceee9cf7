"""Certificates of devices and clients as `edgellm pki` makes them, and as it would never make them."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgellm_agent.access.settings import TlsSettings

ROLE_URI = "urn:edgellm:role:"
DAY = datetime.timedelta(days=1)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


@dataclass(frozen=True)
class Files:
    """A certificate and its key on disk, and the authority that whoever has them trusts."""

    ca_file: Path
    cert_file: Path
    key_file: Path
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.cert_file.read_bytes()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca_file.read_bytes(), self.key_file.read_bytes(), self.cert_file.read_bytes()
        )

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.cert_file, self.key_file)
        context.set_alpn_protocols(["h2"])
        return context


class DeviceAuthority:
    """Issues certificates below a folder."""

    def __init__(self, folder: Path, name: str = "edgellm test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key, now() - DAY, now() + 365 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = builder.sign(self._key, hashes.SHA256())
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.crl_file = folder / "crl.pem"
        self._revoked: list[x509.RevokedCertificate] = []

    def client(self, name: str, *roles: str, **when: datetime.datetime) -> Files:
        """A certificate for a client; with one role it is of use."""
        names = [x509.UniformResourceIdentifier(ROLE_URI + role) for role in roles]
        return self._issue(name, names, ExtendedKeyUsageOID.CLIENT_AUTH, **when)

    def client_named(self, name: str, role: str) -> bytes:
        """The certificate alone, of a name that no file could have."""
        names = [x509.UniformResourceIdentifier(ROLE_URI + role)]
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, names, ExtendedKeyUsageOID.CLIENT_AUTH, now() - DAY, now() + DAY)
        return certificate.public_bytes(serialization.Encoding.PEM)

    def device(self, name: str = "localhost") -> Files:
        names = [x509.DNSName(name), x509.UniformResourceIdentifier("urn:edgellm:device")]
        return self._issue(name, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def revoke(self, *issued: Files, due: datetime.datetime | None = None) -> Path:
        """Writes the list of all that were revoked so far, and these."""
        for files in issued:
            entry = x509.RevokedCertificateBuilder().serial_number(files.certificate.serial_number)
            self._revoked.append(entry.revocation_date(now() - DAY).build())
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now() - 2 * DAY).next_update(due or now() + DAY)
        for revoked in self._revoked:
            builder = builder.add_revoked_certificate(revoked)
        crl = builder.sign(self._key, hashes.SHA256())
        self.crl_file.write_bytes(crl.public_bytes(serialization.Encoding.PEM))
        return self.crl_file

    def settings(self, device: Files, crl_file: Path | None = None) -> TlsSettings:
        return TlsSettings(
            ca_file=self.ca_file, cert_file=device.cert_file, key_file=device.key_file, crl_file=crl_file
        )

    def _issue(
        self,
        name: str,
        alternatives: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        begins: datetime.datetime | None = None,
        expires: datetime.datetime | None = None,
    ) -> Files:
        key = ec.generate_private_key(ec.SECP256R1())
        begins, expires = begins or now() - DAY, expires or now() + DAY
        certificate = self._sign(name, key, alternatives, usage, begins, expires)
        stem = f"{name}-{certificate.serial_number:x}"
        files = Files(self.ca_file, self._folder / f"{stem}.pem", self._folder / f"{stem}.key", certificate)
        files.cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        alternatives: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        begins: datetime.datetime,
        expires: datetime.datetime,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self._name, key, begins, expires)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: datetime.datetime,
    expires: datetime.datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(begins).not_valid_after(expires)
