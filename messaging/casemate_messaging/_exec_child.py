"""Become another program that the kernel kills when the parent dies. Run as a script, imported by nobody.

``python -I -S _exec_child.py PARENT_PID PROGRAM [ARGUMENT ...]``. Linux only (prctl(2), PR_SET_PDEATHSIG). A launcher
is used because ``preexec_fn`` runs Python between fork and exec, which is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died before its child was bound to it")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - becoming another program is the purpose
