"""What is to be done on a device: steps that each know how to tell whether they are done."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from edgellm.setup import files
from edgellm.setup.facts import Facts
from edgellm.setup.shell import SetupError

_PIP_S = 1800.0
_UPLOAD_S = 600.0
_START_S = 120.0
# As the agent's settings want it.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CHUNK_BYTES = 1 << 20
_PIP = "PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1"


@dataclass(frozen=True)
class Options:
    """What a user chooses.

    Attributes:
        device: Its name in the fleet.
        profile: Its device profile.
        prefix: Absolute path below which the agent is installed.
        wheels: Directory of wheels to install from; None means that the device asks its package index.
        service: Install a user and systemd units and start them; without, all stays below the prefix.
        system_packages: Let the agent see the Python packages of the system, TensorRT's for example.
        gpu: Let the service have the GPU's devices.
    """

    device: str
    profile: str
    prefix: str = files.PREFIX
    wheels: Path | None = None
    service: bool = True
    system_packages: bool = False
    gpu: bool = False

    @property
    def socket(self) -> str:
        """Where the agent will listen."""
        return "/run/edgellm/agent.sock" if self.service else f"{self.prefix}/run/agent.sock"

    @property
    def settings(self) -> str:
        """Where its settings are."""
        return "/etc/edgellm/agent.toml" if self.service else f"{self.prefix}/etc/agent.toml"

    @property
    def command(self) -> str:
        """What starts it."""
        return f"{self.prefix}/venv/bin/edgellm-agent run --config {self.settings}"


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        title: What it does, as a fact about the device once it is done.
        done: Shell: exit status 0 if there is nothing to do.
        script: Shell: does it, and gets `stdin`.
        root: Whether both need root.
    """

    title: str
    done: str
    script: str
    stdin: bytes | Path = field(default=b"", repr=False)
    root: bool = True
    timeout_s: float = 60.0


def plan(options: Options, facts: Facts) -> list[Step]:
    """The steps, in order; raises SetupError for options that make no sense."""
    if not _NAME.fullmatch(options.device):
        raise SetupError(
            f"not a device name: {options.device!r}", "give one with --name: letters, digits, '.', '_', '-'"
        )
    if not options.prefix.startswith("/") or options.prefix != shlex.quote(options.prefix):
        raise SetupError(
            f"not a place for the agent: {options.prefix!r}", "give an absolute path of plain letters"
        )
    wheels = _wheels(options.wheels)
    stamp = hashlib.sha256(repr([_requirement(wheels), sorted(_hashes(wheels).items())]).encode()).hexdigest()
    steps = [*_base(options, wheels), _environment(options), _packages(options, wheels, stamp)]
    if options.service:
        before = [
            _file(files.deployed(n, options.prefix), place) for n, place in _service_files(options).items()
        ]
        return [*before, _user(), *steps, *_settings(options), *_service(options, facts, before, stamp)]
    return [*steps, *_settings(options)]


def _base(options: Options, wheels: list[Path]) -> list[Step]:
    below = f"{options.prefix}/wheels"
    first = Step(
        f"folder {options.prefix}",
        f"test -d {below}",
        f"umask 022 && mkdir -p {below}",
        root=options.service,
    )
    return [
        first,
        *(_file(wheel, f"{below}/{wheel.name}", root=options.service) for wheel in wheels),
    ]


def _environment(options: Options) -> Step:
    venv = f"{options.prefix}/venv"
    system = " --system-site-packages" if options.system_packages else ""
    return Step(
        f"Python environment {venv}",
        f"{venv}/bin/python -m pip --version >/dev/null 2>&1",
        f"umask 022 && python3 -m venv --clear{system} {venv}",
        root=options.service,
        timeout_s=_UPLOAD_S,
    )


def _packages(options: Options, wheels: list[Path], stamp: str) -> Step:
    prefix, pip = options.prefix, f"{_PIP} {options.prefix}/venv/bin/python -m pip install --quiet"
    if wheels:
        own = f"{prefix}/wheels/{next(each.name for each in wheels if each.name.startswith('edgellm-'))}"
        offline = f"--no-index --find-links {prefix}/wheels"
        # The second time for a wheel of the same version with other contents.
        install = f"{pip} {offline} '{own}[agent]' && {pip} --no-index --no-deps --force-reinstall {own}"
    else:
        install = f"{pip} '{_requirement(wheels)}'"
    return Step(
        f"packages: {_requirement(wheels)}",
        f'test "$(cat {prefix}/installed 2>/dev/null)" = {stamp} && {prefix}/venv/bin/edgellm-agent version',
        f"umask 022 && {install} && echo {stamp} >{prefix}/installed",
        root=options.service,
        timeout_s=_PIP_S,
    )


def _settings(options: Options) -> list[Step]:
    below = {} if options.service else {"state_dir": f"{options.prefix}/state", "socket": options.socket}
    content = files.settings(options.device, options.profile, below)
    path = options.settings
    folder = path.rsplit("/", 1)[0]
    # Keys and passwords are beside it: the group reads, nobody else.
    owner = f"chown root:edgellm {folder} {path}.new && " if options.service else ""
    other = "" if options.service else f" && mkdir -p -m 0750 {options.prefix}/run {options.prefix}/state"
    return [
        Step(
            f"settings {path}; existing ones are kept",
            f"test -e {path}",
            f"umask 027 && mkdir -p {folder}{other} && cat >{path}.new && chmod 0640 {path}.new && "
            f"{owner}mv {path}.new {path}",
            stdin=content,
            root=options.service,
        )
    ]


def _user() -> Step:
    return Step(
        "user and group edgellm",
        "getent passwd edgellm >/dev/null && getent group edgellm >/dev/null",
        "systemd-sysusers edgellm.conf",
    )


def _service_files(options: Options) -> dict[str, str]:
    return files.SERVICE_FILES | ({files.GPU_FILE: files.GPU_PLACE} if options.gpu else {})


def _service(options: Options, facts: Facts, installed: list[Step], packages: str) -> list[Step]:
    stamp = hashlib.sha256(
        b"".join([packages.encode(), *(_sha256(step.stdin).encode() for step in installed)])
    ).hexdigest()
    started = f"{options.prefix}/started"
    info = f"{options.prefix}/venv/bin/edgellm device info unix://{options.socket} --json"
    steps = [
        Step(
            "service edgellm-agent, enabled and started",
            f'test "$(cat {started} 2>/dev/null)" = {stamp} && systemctl is-active --quiet edgellm-agent && '
            "systemctl is-enabled --quiet edgellm-agent",
            "systemd-tmpfiles --create edgellm.conf && systemctl daemon-reload && "
            "systemctl enable --quiet edgellm-agent edgellm-power-mode.socket && "
            f"systemctl restart edgellm-agent && echo {stamp} >{started}",
            timeout_s=_START_S,
        ),
        Step(
            "the agent answers",
            "false",
            f"for try in 1 2 3 4 5 6 7 8 9 10; do {info} >/dev/null 2>&1 && exit 0; sleep 1; done; {info}",
            timeout_s=_START_S,
        ),
    ]
    if not facts.root:
        user = shlex.quote(facts.user)
        member = Step(
            f"{facts.user} in edgellm and edgellm-operators, to use the API and bring engines",
            f"id -nG {user} | tr ' ' '\\n' | grep -qx edgellm-operators",
            f"usermod -a -G edgellm,edgellm-operators {user}",
        )
        steps.append(member)
    return steps


def _file(content: bytes | Path, path: str, *, root: bool = True) -> Step:
    """A file of ours, put there whole or not at all."""
    digest = _sha256(content)
    folder = path.rsplit("/", 1)[0]
    return Step(
        f"file {path}",
        f'test "$(sha256sum <{path} 2>/dev/null)" = "{digest}  -"',
        f"umask 022 && mkdir -p {folder} && cat >{path}.new && "
        f'test "$(sha256sum <{path}.new)" = "{digest}  -" && chmod 0644 {path}.new && mv {path}.new {path}',
        stdin=content,
        root=root,
        timeout_s=_UPLOAD_S,
    )


def _requirement(wheels: list[Path]) -> str:
    if wheels:
        return "edgellm[agent]"
    # The SDK that sets it up and the agent are one release.
    return f"edgellm[agent]=={metadata.version('edgellm')}"


def _wheels(directory: Path | None) -> list[Path]:
    if directory is None:
        return []
    wheels = sorted(directory.glob("*.whl"))
    if sum(wheel.name.startswith("edgellm-") for wheel in wheels) != 1:
        raise SetupError(
            f"{directory} must have exactly one wheel of edgellm",
            f"make one with `pip wheel --no-deps --wheel-dir {directory} .`, and `pip download` the others",
        )
    return wheels


def _hashes(wheels: list[Path]) -> dict[str, str]:
    return {wheel.name: _sha256(wheel) for wheel in wheels}


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with content.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
