"""A program that enters the worker's sandbox, or a layer of it, and tries what is forbidden or needed there.

It prints, as JSON, what came of each attempt: "done", or the error's name.

    python -m tests.support.confined LAYER ENGINE OUTSIDE PORT SOCKET [NAME ...]

With names, these alone are tried of what is forbidden.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _system_call(number: int, *arguments: Any) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), str(number))


def _connect(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as outward:
        outward.connect(address)


def _overwrite(path: str) -> None:
    number = os.open(path, os.O_WRONLY)
    try:
        os.write(number, b"mine")
    finally:
        os.close(number)


def _in_thread(attempt: Callable[[], object]) -> None:
    failures: list[OSError] = []

    def run() -> None:
        try:
            attempt()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _in_program(text: str) -> None:
    """The same in a program of its own, whose exit status is the error's number."""
    code = f"import os, sys\ntry:\n    {text}\nexcept OSError as error:\n    sys.exit(error.errno)"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise OSError(done.returncode, "in a program")


def forbidden(engine: str, outside: str, port: int, agent_socket: str) -> dict[str, Callable[[], object]]:
    """What nobody may do here, in forms that do no harm if they work after all.

    `outside` is a directory with a file `secret`.
    """
    secret = f"{outside}/secret"
    return {
        "connect to loopback": lambda: _connect(socket.AF_INET, ("127.0.0.1", port)),
        "connect to the agent's socket": lambda: _connect(socket.AF_UNIX, agent_socket),
        "make a datagram pair": socket.socketpair,
        "open a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "read a file outside": lambda: Path(secret).read_bytes(),
        "list a directory outside": lambda: list(Path(outside).iterdir()),
        "read the password file": lambda: Path("/etc/passwd").read_bytes(),
        "overwrite a file outside": lambda: _overwrite(secret),
        "make a file outside": lambda: Path(outside, "new").write_bytes(b"x"),
        "make a file in its engine": lambda: Path(engine, "new").write_bytes(b"x"),
        "overwrite its engine": lambda: _overwrite(f"{engine}/graph"),
        "truncate its engine": lambda: os.truncate(f"{engine}/graph", 0),
        "remove its engine": lambda: Path(engine, "graph").unlink(),
        "change a file's mode": lambda: Path(secret).chmod(0o777),
        "make a directory": lambda: Path(outside, "folder").mkdir(),
        "link a file": lambda: os.link(secret, f"{outside}/link"),
        "rename a file": lambda: Path(secret).rename(f"{outside}/other"),
        "grow a file in memory": lambda: os.write(os.memfd_create("grown"), b"x"),
        "read its parent's memory": lambda: os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY),
        "trace its parent": lambda: _call("ptrace", 7, os.getppid(), 0, 0),
        "limit its parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE),
        "make a user namespace": lambda: _call("unshare", 0x10000000),
        "make a network namespace": lambda: _call("unshare", 0x40000000),
        "clone into a namespace": lambda: _system_call(
            {"x86_64": 56, "aarch64": 220}[os.uname().machine], 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0
        ),
        "change its root": lambda: os.chroot("/"),
        "mount": lambda: _call("mount", b"none", b"/no/such", b"tmpfs", 0, None),
        "set the host's name": lambda: socket.sethostname(socket.gethostname()),
        "look at performance counters": lambda: _system_call(
            {"x86_64": 298, "aarch64": 241}[os.uname().machine], 0, 0, -1, -1, 0
        ),
        "open a ring": lambda: _system_call(425, 8, 0),
        "read with a call of tomorrow": lambda: _system_call(450, 0),
        "get root back": lambda: _in_program("os.setuid(0) if os.getuid() else os.chown('/proc', 1, 1)"),
        "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        "read outside in a thread": lambda: _in_thread(Path(secret).read_bytes),
        "connect in a thread": lambda: _in_thread(lambda: _connect(socket.AF_INET, ("127.0.0.1", port))),
        "read outside in a program": lambda: _in_program(f"open({secret!r})"),
    }


def needed(engine: str) -> dict[str, Callable[[], object]]:
    """What an engine needs."""
    return {
        "read its engine": lambda: Path(engine, "graph").read_bytes(),
        "import a library": lambda: __import__("onnxruntime"),
        "start a thread": lambda: _in_thread(lambda: None),
        "start a program": lambda: _in_program("pass"),
        "map memory": lambda: mmap.mmap(-1, 1 << 20).close(),
        "read the memory's state": lambda: Path("/proc/meminfo").read_bytes(),
        "read its own size": lambda: Path("/proc/self/statm").read_bytes(),
        "limit itself": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        "open nothing": lambda: os.close(os.open(os.devnull, os.O_RDWR)),
        "ask for randomness": lambda: Path("/dev/urandom").open("rb").read(1),
        "fork": lambda: os._exit(0) if (child := os.fork()) == 0 else os.waitpid(child, 0),
    }


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError:
        # setrlimit puts EPERM so where the hard limit is asked to grow.
        return "EPERM"
    return "done"


def enter(layer: str, engine: Path) -> tuple[str, ...]:
    from edgellm_agent.worker import sandbox
    from edgellm_agent.worker.sandbox import confinement, landlock, privileges, seccomp

    if layer == "all":
        return sandbox.enter(engine).problems
    privileges.gain_none()
    if layer == "seccomp":
        seccomp.install()
    elif layer == "landlock":
        landlock.restrict(confinement._grants(engine))
    else:
        privileges.bound_files()
        privileges.drop_capabilities()
    return ()


def main() -> None:
    layer, engine, outside, port, agent_socket, *names = sys.argv[1:]
    problems = enter(layer, Path(engine))
    ban = forbidden(engine, outside, int(port), agent_socket)
    tried = {name: outcome(ban[name]) for name in names or ban}
    works = {name: outcome(each) for name, each in needed(engine).items()}
    print(json.dumps({"problems": problems, "forbidden": tried, "needed": works}))


if __name__ == "__main__":
    main()
