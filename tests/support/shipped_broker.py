"""The broker as deploy/mosquitto has it: TLS, client certificates, and the ACL that ties them to topics."""

from __future__ import annotations

from pathlib import Path

from tests.support.pki import Authority

SHIPPED = Path(__file__).parents[2] / "deploy" / "mosquitto"
# The one name that the shipped ACL lets read the fleet and steer it.
CONTROLLER = "fleet-controller"


def shipped_options(authority: Authority, data: Path) -> str:
    """The shipped configuration with a test's paths; only the listener's line is left to the test."""
    identity = authority.issue("broker", "127.0.0.1")
    config = (SHIPPED / "edgellm.conf").read_text("utf-8").replace("listener 8883\n", "")
    for shipped, ours in (
        ("/etc/mosquitto/edgellm.acl", SHIPPED / "edgellm.acl"),
        ("/etc/mosquitto/certs/ca.pem", identity.ca_file),
        ("/etc/mosquitto/certs/broker.pem", identity.cert_file),
        ("/etc/mosquitto/certs/broker.key", identity.key_file),
        ("/var/lib/mosquitto", data),
    ):
        assert shipped in config
        config = config.replace(shipped, str(ours))
    # Options of all listeners come before the first one.
    return config.replace("per_listener_settings false\n", "")
