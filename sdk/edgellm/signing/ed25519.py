"""Ed25519 by `cryptography`, which only who has a key imports: it takes 12 MiB and 35 ms of a process.

Only this module knows it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgellm.signing.errors import SigningError

SIGNATURE_BYTES = 64


class SigningKey:
    """A private key; `key_id` is the SHA-256 of its public key's DER bytes, hex."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_pem = _pem(private.public_key())
        self.key_id = _key_id(private.public_key())

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key, from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None) -> SigningKey:
        """Raises SigningError: not an Ed25519 private key, or a missing or wrong passphrase."""
        try:
            private = serialization.load_pem_private_key(pem, passphrase)
        except TypeError:
            wanted = "is encrypted" if passphrase is None else "is not encrypted"
            raise SigningError(
                f"the private key {wanted}", "give a passphrase only to a key that has one"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise SigningError(
                "not a private key, or the passphrase is wrong",
                "give a file that `edgellm key generate` wrote",
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise SigningError("the private key is not Ed25519", "make one with `edgellm key generate`")
        return cls(private)

    def to_pem(self, passphrase: bytes | None) -> bytes:
        """PKCS#8, encrypted if there is a passphrase."""
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            encryption = serialization.BestAvailableEncryption(passphrase)
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    def sign(self, data: bytes) -> bytes:
        """64 bytes; equal data, equal bytes."""
        return self._private.sign(data)


def read_public(pem: bytes) -> tuple[str, str]:
    """Key id and the PEM in one spelling; raises SigningError."""
    key = _load(pem)
    return _key_id(key), _pem(key)


def verifies(pem: str, signature: bytes, data: bytes) -> bool:
    """Whether the key's owner signed the data."""
    try:
        _load(pem.encode()).verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=128)
def _load(pem: bytes) -> Ed25519PublicKey:
    if b"PRIVATE KEY" in pem:
        raise SigningError(
            "this is a private key, which never leaves its owner", "give the .pub.json beside it"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise SigningError(
            "not a public key in PEM", "give a .pub.json that `edgellm key generate` wrote"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError("the public key is not Ed25519", "make one with `edgellm key generate`")
    return key


def _pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def _key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
