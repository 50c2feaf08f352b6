"""Walls around this process, for good: what a process that decodes a stranger's file may still do.

As many as the system has: limits (POSIX), a Python audit hook (everywhere), Landlock, seccomp and a network namespace
(Linux). Each stands alone, so that a kernel without one of them still has the others. It imports nothing of ours and
no package: it runs before anything of the stranger's is opened.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_FILES = 512  # open at a time: an MRXS slide has some hundred

# Landlock: rights on files that exist in each version of its interface; the two that are ever granted.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, on every architecture

# Denied system calls by architecture: sockets, new programs, other processes, mounts, owners and modes of files, and
# ways around Landlock. Before them the architecture's own number, and that of clone.
# fmt: off
EVERYWHERE = (*range(425, 435), 438, 442, 452)  # the newer ones have one number on every architecture
DENIED = {
    "x86_64": (0xC000003E, 56, (
        41, 42, 43, 49, 50, 53, 57, 58, 59, 62, 90, 91, 92, 93, 94, 101, 129, 155, 161, 165, 166, 188, 189,
        190, 200, 248, 249, 250, 260, 268, 272, 288, 298, 304, 308, 310, 311, 312, 319, 321, 322, 323,
        *EVERYWHERE,
    )),
    "aarch64": (0xC00000B7, 220, (
        5, 6, 7, 39, 40, 41, 51, 52, 53, 54, 55, 97, 117, 129, 130, 138, 198, 199, 200, 201, 202, 203, 217,
        218, 219, 221, 241, 242, 265, 268, 270, 271, 272, 279, 280, 281, 282,
        *EVERYWHERE,
    )),
}
# fmt: on
CLONE3, CLONE_THREAD, NOT_PERMITTED, NO_SUCH_CALL = 435, 0x10000, 1, 38
NEW_NETWORK = 0x40000000
CAPABILITIES, READ_ANY_FILE = 0x20080522, 1 << 2  # version of the structure; what root needs for others' slides

refused: list[str] = []  # paths that Python code in this process asked for and did not get


def wall_in(folders: Sequence[Path], memory: int) -> list[str]:
    """From now on this process reads files below `folders` and of its libraries, and nothing else; for good.

    It writes no file, opens no socket, starts no program and takes at most `memory` bytes of address space. Threads
    that exist already are not confined, so call it before there are any.
    Returns which walls stand: "limits", "audit", "landlock", "seccomp", "network".
    """
    readable = [Path(os.path.realpath(folder)) for folder in [*folders, *_libraries()]]
    standing = []
    if resource is not None:
        _limit(memory)
        standing.append("limits")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which both need without privileges
        walls = {"network": _leave_network, "landlock": lambda libc: _landlock(libc, readable), "seccomp": _seccomp}
        standing += [name for name, build in walls.items() if build(libc)]
        _drop_capabilities(libc)
    _audit(readable)
    return [*standing, "audit"]


def allow_seconds(seconds: float) -> None:
    """The kernel ends this process once it has used so many more seconds of processor time."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _libraries() -> list[Path]:
    """What Python and its packages may load while they work."""
    paths = {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {str(Path(prefix) / "lib") for prefix in (sys.prefix, sys.base_prefix)}
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"}
    paths.add(str(Path(__file__).resolve().parents[1]))
    return [Path(path) for path in sorted(paths) if os.path.exists(path)]


def _limit(memory: int) -> None:
    assert resource is not None
    limits = {"RLIMIT_AS": memory, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": MOST_FILES}
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system may lack or forbid one
            hard = resource.getrlimit(getattr(resource, name))[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(getattr(resource, name), (most, most))


def _audit(readable: list[Path]) -> None:
    """Refuse what Python code asks for: the only wall of files and network where the kernel has none."""
    inside = tuple(str(path).rstrip(os.sep) + os.sep for path in readable)
    whole = {str(path) for path in readable}
    forbidden = ("socket.__new__", "socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec")
    forbidden += ("os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "os.startfile", "os.kill")

    def look(event: str, values: tuple) -> None:
        if event == "open" and isinstance(values[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(values[0]))
            if not (path in whole or path.startswith(inside)) or (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                refused.append(path)
                raise PermissionError("A process that reads a stranger's slide opens no other file.")
        elif event in forbidden:
            raise PermissionError("A process that reads a stranger's slide has neither network nor programs.")

    sys.addaudithook(look)


def _leave_network(libc: ctypes.CDLL) -> bool:
    """A network namespace without a single interface. Only root may have it without giving up its files."""
    return libc.unshare(NEW_NETWORK) == 0


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header, held = struct.pack("<Ii", CAPABILITIES, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, held) == 0:
        permitted = struct.unpack("<6I", held.raw)[1] & READ_ANY_FILE
        libc.capset(header, struct.pack("<6I", permitted, permitted, 0, 0, 0, 0))


def _landlock(libc: ctypes.CDLL, readable: list[Path]) -> bool:
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (1 << RIGHTS[min(version, max(RIGHTS))]) - 1
    fields = [handled, 3, 3][: 1 + (version >= 4) + (version >= 6)]  # files; TCP bind, connect; signals and sockets
    rules = struct.pack(f"<{len(fields)}Q", *fields)
    ruleset = libc.syscall(CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            handle = os.open(path, os.O_PATH)
            try:
                rights = READ_FILE | (READ_FOLDER if path.is_dir() else 0)
                if libc.syscall(ADD_RULE, ruleset, 1, struct.pack("<Qi", rights, handle), 0):
                    return False
            finally:
                os.close(handle)
        return libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _seccomp(libc: ctypes.CDLL) -> bool:
    if platform.machine() not in DENIED or sys.maxsize < 2**32:
        return False
    architecture, clone, denied = DENIED[platform.machine()]

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000, 0x7FFF0000
    steps = [step(load, 4), step(equal, architecture, 1), step(end, kill)]  # another architecture has other numbers
    steps += [step(load, 0), step(at_least, 0x40000000, 0, 1), step(end, kill)]
    steps += [step(equal, CLONE3, 0, 1), step(end, refuse | NO_SUCH_CALL)]  # glibc then uses clone, whose flags show
    for number in denied:
        steps += [step(equal, number, 0, 1), step(end, refuse | NOT_PERMITTED)]
    steps += [
        step(equal, clone, 0, 3),
        step(load, 16),
        step(any_bit, CLONE_THREAD, 1),
        step(end, refuse | NOT_PERMITTED),
    ]
    steps.append(step(end, allow))
    program = b"".join(steps)
    held = ctypes.create_string_buffer(program)
    given = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(held)))
    return libc.prctl(22, 2, given, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
