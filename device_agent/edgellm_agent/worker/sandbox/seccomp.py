"""Which system calls a process may make: a filter in BPF, as the kernel's seccomp takes it."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgellm_agent.worker.sandbox import syscalls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_SET_MODE_FILTER = 1
# All threads that there are; and without the brake on speculative execution that kernels before 5.16 put on
# confined processes, which is meant for those that run code of strangers on purpose.
_FLAGS = 1 | 1 << 2

# Where the kernel shows the filter what is asked (struct seccomp_data), little-endian.
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_LOAD, _EQUALS, _ABOVE, _HAS_BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NAMESPACE_FLAGS = (
    0x80 | 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
# O_CREAT, O_TRUNC, O_TMPFILE.
_CHANGING_FLAGS = 0o100 | 0o1000 | 0o20000000
# Typing into a terminal for its owner: TIOCSTI, TIOCLINUX.
_TERMINAL_REQUESTS = (0x5412, 0x541C)

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True)
class Machine:
    """An architecture: its AUDIT_ARCH value, and its column in the tables of numbers."""

    architecture: int
    column: int


_MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}


def install() -> None:
    """Filters this process's system calls from now on, all threads; needs `no_new_privs`.

    Raises OSError if the kernel refuses, or if this architecture's numbers are not known here.
    """
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError(errno.ENOSYS, f"no list of system calls for {os.uname().machine}")
    code = program(machine)
    # struct sock_fprog: count, and where the instructions are.
    instructions = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    number = syscalls.SECCOMP[machine.column]
    result = _libc.syscall(
        ctypes.c_long(number or 0), ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(_FLAGS), head
    )
    if result != 0:
        # A positive result is a thread that could not follow.
        number = ctypes.get_errno() if result < 0 else errno.EBUSY
        raise OSError(number, os.strerror(number))


def program(machine: Machine) -> bytes:
    """The filter's instructions, 8 bytes each."""
    refused = syscalls.NETWORK | syscalls.PROCESSES | syscalls.KERNEL | syscalls.NAMESPACES | syscalls.MACHINE
    instructions: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        # A 32-bit call has other numbers: whoever makes one tries to get round this.
        (_EQUALS, 1, 0, machine.architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        # x32's numbers are above it, too.
        (_ABOVE, 0, 1, syscalls.NEWEST),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        *_refuse(_numbers(refused, machine), errno.EPERM),
        *_refuse(_numbers(syscalls.FILES, machine), errno.EROFS),
        *_refuse(_numbers(syscalls.OPAQUE, machine), errno.ENOSYS),
        *_by_argument(machine),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


def _by_argument(machine: Machine) -> list[Instruction]:
    number = {name: numbers[machine.column] for name, numbers in syscalls.BY_ARGUMENT.items()}
    not_permitted, read_only = (_RETURN, 0, 0, _FAIL | errno.EPERM), (_RETURN, 0, 0, _FAIL | errno.EROFS)
    return [
        *_case(number["clone"], 0, [(_HAS_BITS, 0, 1, _NAMESPACE_FLAGS), not_permitted]),
        *_case(number["open"], 1, [(_HAS_BITS, 0, 1, _CHANGING_FLAGS), read_only]),
        *_case(number["openat"], 2, [(_HAS_BITS, 0, 1, _CHANGING_FLAGS), read_only]),
        # Its own limits only: pid 0.
        *_case(number["prlimit64"], 0, [(_EQUALS, 1, 0, 0), not_permitted]),
        *_case(
            number["ioctl"],
            1,
            [each for request in _TERMINAL_REQUESTS for each in ((_EQUALS, 0, 1, request), not_permitted)],
        ),
    ]


def _case(number: int | None, argument: int, decide: list[Instruction]) -> list[Instruction]:
    """What is decided by the low half of an argument: flags, requests and ids have no more bits."""
    if number is None:
        return []
    body: list[Instruction] = [
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
        *decide,
        (_RETURN, 0, 0, _ALLOW),
    ]
    return [(_EQUALS, 0, len(body), number), *body]


def _refuse(numbers: Iterable[int], error: int) -> list[Instruction]:
    return [each for number in numbers for each in ((_EQUALS, 0, 1, number), (_RETURN, 0, 0, _FAIL | error))]


def _numbers(table: Mapping[str, syscalls.Numbers], machine: Machine) -> list[int]:
    return [number for numbers in table.values() if (number := numbers[machine.column]) is not None]


def machine_named(name: str) -> Machine:
    """x86_64 or aarch64; raises KeyError."""
    return _MACHINES[name]
