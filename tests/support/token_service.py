"""Signs the bearer tokens that a docker-registry takes: JSON web tokens with the certificate in the head."""

from __future__ import annotations

import base64
import datetime
import json
import uuid
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

ISSUER = "fleet-tokens"
SERVICE = "fleet-registry"


class TokenSigner:
    """A key, and the certificate that the registry trusts it by."""

    def __init__(self, root: Path) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
        now = datetime.datetime.now(datetime.timezone.utc)
        day = datetime.timedelta(days=1)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .sign(self._key, hashes.SHA256())
        )
        self.bundle = root / "tokens.pem"
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def token(self, repository: str, *actions: str) -> str:
        """A token for an hour."""
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(datetime.datetime.now(datetime.timezone.utc).timestamp())
        claims = {
            "iss": ISSUER,
            "sub": "device",
            "aud": SERVICE,
            "exp": now + 3600,
            "nbf": now - 60,
            "iat": now,
            "jti": str(uuid.uuid4()),
            "access": [{"type": "repository", "name": repository, "actions": list(actions)}],
        }
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_base64(signature)}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
