"""The filter of system calls, as the kernel's machine for it would run it, on both architectures."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.worker.sandbox import seccomp, syscalls

ALLOW = "allowed"
KILL = "killed"
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = syscalls.NETWORK | syscalls.PROCESSES | syscalls.KERNEL | syscalls.NAMESPACES | syscalls.MACHINE
# Some of what Python, ONNX Runtime and a GPU's driver do all the time.
NEEDED = [
    "read",
    "write",
    "close",
    "mmap",
    "munmap",
    "mremap",
    "madvise",
    "mprotect",
    "brk",
    "futex",
    "ioctl",
    "openat",
    "newfstatat",
    "statx",
    "execve",
    "clone",
    "wait4",
    "exit_group",
    "getrandom",
    "memfd_create",
    "sched_getaffinity",
    "rt_sigaction",
    "rt_sigprocmask",
    "pipe2",
    "prlimit64",
    "eventfd2",
    "epoll_pwait",
    "ppoll",
    "sendto",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "fcntl",
    "set_robust_list",
    "rseq",
    "mbind",
    "mlock",
]


def run(program: bytes, architecture: int, number: int, *arguments: int) -> str | int:
    """What the program says of a call: allowed, killed, or the error's number."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, held = 0, 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        match operation:
            case 0x20:
                held = struct.unpack_from("<I", data, value)[0]
            case 0x15:
                at += yes if held == value else no
            case 0x25:
                at += yes if held > value else no
            case 0x45:
                at += yes if held & value else no
            case 0x06 if value == 0x7FFF0000:
                return ALLOW
            case 0x06 if value == 0x80000000:
                return KILL
            case 0x06 if value >> 16 == 5:
                return value & 0xFFFF
            case _:
                raise AssertionError(f"no such instruction: {operation:#x} {value:#x}")


@pytest.fixture(params=sorted(ARCHITECTURES))
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def answer(machine: str, number: int | None, *arguments: int) -> str | int:
    assert number is not None
    program = seccomp.program(seccomp.machine_named(machine))
    return run(program, ARCHITECTURES[machine], number, *arguments)


def number_of(machine: str, name: str) -> int | None:
    """As libseccomp has it, which is not what this project wrote; None where there is no such call."""
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("needs libseccomp, to compare with")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    number = resolve(ARCHITECTURES[machine], name.encode())
    return number if number >= 0 else None


def column(machine: str) -> int:
    return sorted(ARCHITECTURES, reverse=True).index(machine)


def test_the_numbers_are_those_of_libseccomp(machine: str) -> None:
    table = REFUSED | syscalls.FILES | syscalls.OPAQUE | syscalls.BY_ARGUMENT | {"seccomp": syscalls.SECCOMP}
    ours = {name: numbers[column(machine)] for name, numbers in table.items()}
    assert ours == {name: number_of(machine, name) for name in table}


@pytest.mark.parametrize(
    ("table", "error"),
    [(REFUSED, errno.EPERM), (syscalls.FILES, errno.EROFS), (syscalls.OPAQUE, errno.ENOSYS)],
)
def test_each_listed_call_is_refused(machine: str, table: dict[str, syscalls.Numbers], error: int) -> None:
    numbers = [each[column(machine)] for each in table.values() if each[column(machine)] is not None]
    assert {answer(machine, number) for number in numbers} == {error}


def test_what_an_engine_does_all_the_time_is_allowed(machine: str) -> None:
    numbers = {name: number_of(machine, name) for name in NEEDED}
    assert {name: answer(machine, number) for name, number in numbers.items() if number is not None} == (
        dict.fromkeys((name for name, number in numbers.items() if number is not None), ALLOW)
    )


@given(number=st.integers(syscalls.NEWEST + 1, 0xFFFFFFFF))
def test_calls_of_newer_kernels_and_of_x32_do_not_exist(number: int) -> None:
    assert answer("x86_64", number) == errno.ENOSYS


@given(other=st.integers(0, 0xFFFFFFFF), number=st.integers(0, 500))
def test_a_call_of_another_architecture_ends_the_process(other: int, number: int) -> None:
    program = seccomp.program(seccomp.machine_named("aarch64"))
    expected = KILL if other != ARCHITECTURES["aarch64"] else run(program, other, number)
    assert run(program, other, number) == expected
    assert run(program, 0x40000028, number) == KILL  # 32-bit Arm


@given(flags=st.integers(0, 0xFFFFFFFF))
def test_clone_makes_threads_and_processes_but_no_namespaces(flags: int) -> None:
    namespaces = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
    expected = errno.EPERM if flags & namespaces else ALLOW
    for name, number in (("x86_64", 56), ("aarch64", 220)):
        assert answer(name, number, flags) == expected


@given(flags=st.integers(0, 0xFFFFFFFF))
def test_opening_makes_and_empties_no_file(flags: int) -> None:
    expected = errno.EROFS if flags & (0o100 | 0o1000 | 0o20000000) else ALLOW
    assert answer("aarch64", 56, 0, 0, flags) == answer("x86_64", 257, 0, 0, flags) == expected
    assert answer("x86_64", 2, 0, flags) == expected


@given(process=st.integers(0, 0xFFFFFFFF))
def test_only_its_own_limits_may_be_changed(process: int) -> None:
    expected = ALLOW if process == 0 else errno.EPERM
    assert answer("x86_64", 302, process) == answer("aarch64", 261, process) == expected


@pytest.mark.parametrize(
    ("request_", "expected"), [(0x5412, 1), (0x541C, 1), (0x5413, ALLOW), (0xC0104E14, ALLOW)]
)
def test_a_device_may_be_asked_anything_but_to_type(machine: str, request_: int, expected: str | int) -> None:
    assert answer(machine, {"x86_64": 16, "aarch64": 29}[machine], 3, request_) == expected
