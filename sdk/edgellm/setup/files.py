"""The files below deploy/: in this package where it is installed, at the repository's root in a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm.setup.shell import SetupError

PREFIX = "/opt/edgellm"
_PACKAGED = Path(__file__).parent / "files"
_CHECKOUT = Path(__file__).parents[3] / "deploy"

# Where each file goes on the device. The last one is for boards whose engines run on the GPU.
SERVICE_FILES = {
    "edgellm-sysusers.conf": "/usr/lib/sysusers.d/edgellm.conf",
    "edgellm-tmpfiles.conf": "/usr/lib/tmpfiles.d/edgellm.conf",
    "systemd/edgellm-agent.service": "/etc/systemd/system/edgellm-agent.service",
    "systemd/edgellm-power-mode.socket": "/etc/systemd/system/edgellm-power-mode.socket",
    "systemd/edgellm-power-mode.service": "/etc/systemd/system/edgellm-power-mode.service",
}
GPU_FILE = "systemd/edgellm-agent.service.d/jetson.conf"
GPU_PLACE = "/etc/systemd/system/edgellm-agent.service.d/jetson.conf"


def deployed(name: str, prefix: str = PREFIX) -> bytes:
    """A file below deploy/, with the place of the agent put in; raises SetupError if it is not there."""
    path = next((root / name for root in (_PACKAGED, _CHECKOUT) if (root / name).is_file()), None)
    if path is None:
        raise SetupError(f"this installation lacks deploy/{name}", "install edgellm again from its wheel")
    return path.read_text(encoding="utf-8").replace(PREFIX, prefix).encode()


def settings(device: str, profile: str, changes: dict[str, str]) -> bytes:
    """deploy/agent.toml for one device; `changes` are settings of the root that differ from the default."""
    text = deployed("agent.toml").decode()
    for name, value in {"device": device, "profile": profile, **changes}.items():
        text, found = re.subn(rf'(?m)^#?{name} = ".*"$', f'{name} = "{value}"', text, count=1)
        if not found:
            raise SetupError(f"deploy/agent.toml has no {name}", "install edgellm again from its wheel")
    return text.encode()
