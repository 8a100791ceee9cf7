"""A certificate authority of a test's own: brokers, devices and controllers with certificates on disk."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trustme

from edgellm_agent.mqtt.settings import MqttTlsSettings


@dataclass(frozen=True)
class Identity:
    """Files of one certificate and its key, and of the authority that it trusts."""

    ca_file: Path
    cert_file: Path
    key_file: Path

    def settings(self) -> MqttTlsSettings:
        """As the agent is told of them."""
        return MqttTlsSettings(ca_file=self.ca_file, cert_file=self.cert_file, key_file=self.key_file)

    def context(self) -> ssl.SSLContext:
        """For a client that is not the agent."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


class Authority:
    """Issues certificates below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, name: str, *hosts: str, expires: datetime | None = None) -> Identity:
        """A certificate with the common name `name`, good for `hosts`; a second one replaces the first."""
        certificate = self._ca.issue_cert(*(hosts or (name,)), common_name=name, not_after=expires)
        identity = Identity(self.ca_file, self._folder / f"{name}.pem", self._folder / f"{name}.key")
        chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
        identity.cert_file.write_bytes(chain)
        certificate.private_key_pem.write_to_path(str(identity.key_file))
        return identity
