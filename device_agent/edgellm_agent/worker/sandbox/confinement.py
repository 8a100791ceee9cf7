"""Entering the sandbox, and what came of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm_agent.worker.sandbox import landlock, privileges, seccomp
from edgellm_agent.worker.sandbox.landlock import READ, RUN, USE_DEVICE, Grant

# The loader, its libraries and what they look up. Nothing else in /etc: the agent's settings are there.
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/opt/nvidia",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/proc",
    "/sys",
)
_PLAIN_DEVICES = ("null", "zero", "random", "urandom")
# Patterns in /dev of what CUDA and TensorRT open on a Jetson, or on a PC; deploy/systemd explains each.
GPU_DEVICES = (
    "nvidia*",
    "nvmap",
    "nvhost*",
    "nvgpu",
    "nvsciipc",
    "host1x-fence",
    "dri",
)


@dataclass(frozen=True)
class Confinement:
    """What holds now.

    Attributes:
        landlock_abi: The kernel's version of Landlock; 0: files are not confined by name.
        system_calls: Whether a filter holds.
        problems: What the kernel refused, and why.
    """

    landlock_abi: int
    system_calls: bool
    problems: tuple[str, ...]

    def __str__(self) -> str:
        files = f"no files but its own (Landlock {self.landlock_abi})" if self.landlock_abi else ""
        calls = "no network, no new files" if self.system_calls else ""
        return "; ".join(filter(None, (calls, files, *self.problems)))

    @property
    def whole(self) -> bool:
        """Whether all layers hold."""
        return not self.problems


def enter(engine: Path) -> Confinement:
    """Confines this process for good to its libraries and the files of one engine.

    To be called while there is one thread, for Landlock confines only those that come from it. What a kernel
    cannot do is left out and said; nothing is raised.
    """
    problems: list[str] = []
    # Nothing could be written, and each import would try.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    _leave_working_directory()
    abi, filtered = 0, False
    with _said("privileges", problems):
        _give_up_privileges()
    with _said("Landlock", problems):
        abi = landlock.restrict(_grants(engine))
    with _said("seccomp", problems):
        seccomp.install()
        filtered = True
    return Confinement(abi, filtered, tuple(problems))


def _give_up_privileges() -> None:
    privileges.gain_none()
    privileges.bound_files()
    privileges.drop_capabilities()


@contextlib.contextmanager
def _said(layer: str, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problems.append(f"no {layer}: {error.strerror or error}")


def _leave_working_directory() -> None:
    """`python -m` looks for modules in the working directory first: below systemd that is `/`."""
    with contextlib.suppress(FileNotFoundError):
        if not getattr(sys.flags, "safe_path", False) and sys.path[0] == str(Path.cwd()):
            del sys.path[0]


def _grants(engine: Path) -> Iterator[Grant]:
    yield Grant(engine, READ)
    for path in {*_SYSTEM, *_python()} - {"/", ""}:
        yield Grant(Path(path), RUN)
    for name in _PLAIN_DEVICES:
        yield Grant(Path("/dev") / name, USE_DEVICE)
    for pattern in GPU_DEVICES:
        for device in Path("/dev").glob(pattern):
            yield Grant(device, USE_DEVICE)


def _python() -> list[str]:
    """Where the interpreter, its libraries and those that the environment names are."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent), *sys.path, *libraries]
