"""Makes the TLS context of a client, in one way for all that dial a broker."""

from __future__ import annotations

import ssl
from pathlib import Path


def client_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """A context from the files as they are now; TLS 1.2 or newer, and the server's name is checked.

    Args:
        ca_file: Whom to trust; None means the system's authorities.
        cert_file: Who we are; None means that we show no certificate.
        key_file: The key to `cert_file`; None means that it is in the same file.

    Raises ValueError that names the files if they cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if cert_file is not None:
            # With a password given, OpenSSL does not ask the terminal for that of an encrypted key.
            context.load_cert_chain(cert_file, key_file, password="")
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(path) for path in (ca_file, cert_file, key_file) if path is not None)
        raise ValueError(f"tls files {files} cannot be used: {error}") from error
    return context
