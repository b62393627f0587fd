"""How the training process is cut off: no network, no other program, no debugger, no core dump; and the worker from it.

A seccomp filter (seccomp(2)) that the process sets on itself before it has read a single input, needs no privilege, and
can never take off again. System call numbers are those of the kernel's x86-64 and arm64 tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import socket
import sys
from pathlib import Path
from typing import Final

from casemate_schemas.errors import SetupError

SECCOMP: Final = "seccomp: no sockets, no execve, no ptrace, no io_uring"
NONE: Final = "none: this system has no seccomp"

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_SIGKILL: Final = 9

_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_REFUSE: Final = 0x00050000 | errno.EPERM
_LOAD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_GREATER_OR_EQUAL: Final = 0x35
_RETURN: Final = 0x06
_X32_BIT: Final = 0x40000000

# socket, connect, accept, sendto, sendmsg, bind, listen, socketpair, execve, ptrace, accept4, sendmmsg,
# process_vm_readv, process_vm_writev, execveat, io_uring_setup, pidfd_getfd
_FORBIDDEN: Final = {
    "x86_64": (0xC000003E, (41, 42, 43, 44, 46, 49, 50, 53, 59, 101, 288, 307, 310, 311, 322, 425, 438)),
    "aarch64": (0xC00000B7, (198, 203, 202, 206, 211, 200, 201, 199, 221, 117, 242, 269, 270, 271, 281, 425, 438)),
}


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.POINTER(_Filter)))


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def die_before_parent() -> None:
    """Where memory runs out, the kernel is to end this process first (proc(5), oom_score_adj), not the worker.

    So a model that takes too much fails its own job, and does not end one worker after another.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def keep_memory_private() -> None:
    """No core dump of this process, and no look into it for others of its user, its own training process among them.

    What is not dumpable cannot be traced, nor opened as ``/proc/<pid>/mem`` (prctl(2), PR_SET_DUMPABLE). Raises
    :class:`SetupError` where the kernel refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _prctl(_PR_SET_DUMPABLE, 0)


def forbid_files() -> None:
    """From here on this process can put no byte into any file (setrlimit(2), RLIMIT_FSIZE); pipes are none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def isolate() -> str:
    """Cut this process off, check that it is, and say how.

    Returns :data:`SECCOMP`, or :data:`NONE` where the system has no seccomp (the caller decides whether that will do).
    Raises :class:`SetupError` if the filter was accepted but a socket can still be made.
    """
    keep_memory_private()
    rules = _FORBIDDEN.get(platform.machine())
    if sys.platform != "linux" or rules is None:
        return NONE
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _install(*rules)
    _check_cut_off()
    return SECCOMP


def _install(architecture: int, forbidden: tuple[int, ...]) -> None:
    """Another architecture's calls kill the process; forbidden ones fail with EPERM; the rest go through."""
    rules = [
        (_LOAD, 0, 0, 4),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_IF_GREATER_OR_EQUAL, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number in forbidden:
        rules += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    rules.append((_RETURN, 0, 0, _ALLOW))
    filters = (_Filter * len(rules))(*(_Filter(*rule) for rule in rules))
    program = _Program(len(rules), filters)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _check_cut_off() -> None:
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
            socket.socket(family, socket.SOCK_STREAM).close()
        except PermissionError:
            continue
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue
            raise SetupError("cannot tell whether the training process is cut off") from error
        raise SetupError("the training process can still open a socket")


def _prctl(option: int, argument: int, pointer: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = (ctypes.c_ulong(argument), ctypes.c_ulong(pointer), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if libc.prctl(ctypes.c_int(option), *words) != 0:
        code = ctypes.get_errno()
        raise SetupError(f"prctl({option}) failed: {os.strerror(code)}")
