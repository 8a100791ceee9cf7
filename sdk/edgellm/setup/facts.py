"""What a device is, asked before anything is changed there."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from edgellm.setup.shell import RemoteShell, SetupError, last_words

ARCHITECTURES = ("aarch64", "x86_64")
OLDEST_PYTHON = (3, 10)
# Releases below lack directives that the units rely on.
OLDEST_SYSTEMD = 249
# The environment with all that the agent needs takes about 350 MB; the wheels are beside it.
NEEDED_BYTES = 800_000_000

# One line per fact, each from a command that every Linux has; an empty one where it fails.
_SCRIPT = """
parent=PREFIX
while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "user=$(id -un)"
echo "root=$([ "$(id -u)" = 0 ] && echo yes)"
echo "sudo=$(sudo -n true 2>/dev/null && echo yes)"
echo "python=$(python3 -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)"
echo "venv=$(python3 -c 'import ensurepip, venv' 2>/dev/null && echo yes)"
echo "free_kib=$(df -Pk "$parent" | tail -n 1 | awk '{print $4}')"
echo "writable=$([ -w "$parent" ] && echo yes)"
echo "systemd=$([ -d /run/systemd/system ] && systemctl --version | awk 'NR==1 {print $2}')"
echo "l4t=$([ -e /etc/nv_tegra_release ] && echo yes)"
"""


@dataclass(frozen=True)
class Facts:
    """A device as its shell tells it.

    Attributes:
        machine: Its architecture: `aarch64`, `x86_64`.
        user: As whom ssh logs in.
        root: Whether that is root.
        sudo: Whether sudo asks that user for no password.
        python: Version of `python3`; None where there is none.
        venv: Whether that can make environments.
        free_bytes: Free space where the agent goes.
        writable: Whether that user may write there.
        systemd: Its version; None where it does not run the machine.
        jetson: Whether it runs Jetson Linux.
    """

    system: str
    machine: str
    user: str
    root: bool
    sudo: bool
    python: tuple[int, int] | None
    venv: bool
    free_bytes: int
    writable: bool
    systemd: int | None
    jetson: bool


def examine(shell: RemoteShell, prefix: str) -> Facts:
    """Asks the device; raises SetupError if it cannot be reached, or answers nonsense."""
    done = shell.run(_SCRIPT.replace("PREFIX", shlex.quote(prefix)))
    told = dict(
        line.split("=", 1) for line in done.stdout.decode(errors="replace").splitlines() if "=" in line
    )
    try:
        python = tuple(int(part) for part in told["python"].split())
        return Facts(
            system=told["system"],
            machine=told["machine"],
            user=told["user"],
            root=told["root"] == "yes",
            sudo=told["sudo"] == "yes",
            python=(python[0], python[1]) if python else None,
            venv=told["venv"] == "yes",
            free_bytes=1024 * int(told["free_kib"]),
            writable=told["writable"] == "yes",
            systemd=int(told["systemd"]) if told["systemd"] else None,
            jetson=told["l4t"] == "yes",
        )
    except (KeyError, ValueError, IndexError):
        raise SetupError(
            f"{shell.target.host} has no shell that tells what it is: {last_words(done.stderr)}",
            f"see what `{shell.login} uname -a` says",
        ) from None


def check(facts: Facts, *, service: bool) -> None:
    """Raises SetupError with the first thing that is missing on the device, and how to get it."""
    if facts.system != "Linux" or facts.machine not in ARCHITECTURES:
        raise SetupError(
            f"the agent runs on Linux on {' or '.join(ARCHITECTURES)}, "
            f"not on {facts.system} on {facts.machine}"
        )
    if facts.python is None or facts.python < OLDEST_PYTHON:
        has = "none" if facts.python is None else ".".join(map(str, facts.python))
        raise SetupError(f"Python 3.10 or later is needed, the device has {has}", "apt install python3 there")
    if not facts.venv:
        raise SetupError("Python on the device cannot make environments", "apt install python3-venv there")
    if facts.free_bytes < NEEDED_BYTES:
        raise SetupError(
            f"{NEEDED_BYTES // 10**6} MB are needed, the device has {facts.free_bytes // 10**6} MB free",
            "make room, or choose another place with --prefix",
        )
    if service:
        _check_service(facts)
    elif not facts.writable:
        raise SetupError(f"{facts.user} may not write there", "choose another place with --prefix")


def _check_service(facts: Facts) -> None:
    if facts.systemd is None:
        raise SetupError("the device is not run by systemd", "use --no-service, and start the agent your way")
    if facts.systemd < OLDEST_SYSTEMD:
        raise SetupError(f"systemd {OLDEST_SYSTEMD} or later is needed, the device has {facts.systemd}")
    if not (facts.root or facts.sudo):
        raise SetupError(
            f"installing a service needs root, and sudo asks {facts.user} for a password",
            "log in as root, let sudo ask for none (NOPASSWD), or use --no-service --prefix DIRECTORY",
        )
