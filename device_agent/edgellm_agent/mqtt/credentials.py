"""Who we are to the broker, and whom we trust: files that may be renewed while the agent runs."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from edgellm import tls
from edgellm_agent.mqtt.settings import MqttTlsSettings


def read_password(path: Path | None) -> str | None:
    """The password in a file; raises ValueError that names the file if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"mqtt password_file {path} cannot be read: {error}") from error


def load_tls(settings: MqttTlsSettings) -> ssl.SSLContext:
    """A context from the files as they are now; raises ValueError that names those that cannot be used."""
    try:
        return tls.client_context(settings.ca_file, settings.cert_file, settings.key_file)
    except ValueError as error:
        raise ValueError(f"mqtt {error}") from error


class RenewedContext(ssl.SSLContext):
    """Reads the files again for each connection: paho takes one context, once and for all."""

    _settings: MqttTlsSettings

    @classmethod
    def of(cls, settings: MqttTlsSettings) -> RenewedContext:
        """Raises ValueError if the files cannot be used now."""
        load_tls(settings)
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context._settings = settings
        return context

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Handshake and all, so that a socket that fails is closed; raises OSError, as paho expects."""
        try:
            fresh = load_tls(self._settings)
        except ValueError as error:
            sock.close()
            raise OSError(str(error)) from error
        wrapped = fresh.wrap_socket(sock, *arguments, **options)
        try:
            wrapped.do_handshake()
        except BaseException:
            wrapped.close()
            raise
        return wrapped


def why_unreachable(error: BaseException | None) -> str:
    """One line on a dial that failed, for the log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}"
    return str(error) or type(error).__name__
