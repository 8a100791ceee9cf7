"""System calls that the worker is refused, with their numbers: (x86_64, aarch64), None where there is none.

A list of what is denied, not of what is allowed: the driver below CUDA and TensorRT is closed and differs
between releases of Jetson Linux, so a list of what it needs would be a guess, and break engines in the field.
Below systemd, the unit's allow-list (@system-service) holds as well.
"""

from __future__ import annotations

Numbers = tuple[int | None, int | None]

# Newer calls than this one (futex_waitv, Linux 5.16) are answered as an older kernel does: there is none.
NEWEST = 449

# The worker has its channel, and opens no other way out. That includes Unix sockets: it runs as the agent's
# user, who may use the agent's API and ask for another power mode.
NETWORK: dict[str, Numbers] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
}
# Into other processes of the same user: the agent, above all.
PROCESSES: dict[str, Numbers] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
}
# Large parts of the kernel that no engine needs, and that flaws were found in time and again.
KERNEL: dict[str, Numbers] = {
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
}
NAMESPACES: dict[str, Numbers] = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
}
MACHINE: dict[str, Numbers] = {
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}
# Changes of files by name, which Landlock would refuse, too, where the kernel has it.
FILES: dict[str, Numbers] = {
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
}
# Their flags are in memory, where a filter cannot look; without them the C library falls back to older ones.
OPAQUE: dict[str, Numbers] = {"clone3": (435, 435), "openat2": (437, 437)}
# Refused or not by their arguments (seccomp.py), or needed there.
BY_ARGUMENT: dict[str, Numbers] = {
    "clone": (56, 220),
    "open": (2, None),
    "openat": (257, 56),
    "prlimit64": (302, 261),
    "ioctl": (16, 29),
}
SECCOMP: Numbers = (317, 277)
