"""How every program ends: what it could not do is one line on standard error, with an exit status for supervisors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from casemate_schemas.errors import CasemateError, IntegrityError, UnavailableError

WRONG_SETTINGS: Final = 2
"""Starting it again changes nothing: settings, keys, manifest or files are not what they must be."""

STOPPED: Final = 1
"""It ran into something outside of its settings: no NATS there, or a broken state."""


def run_program(name: str, program: Callable[[], None]) -> None:
    """Runs ``program``; for an error of the tree prints ``name: what is wrong [reason]`` and exits 1 or 2.

    Never a traceback: neither values nor paths inside are anybody's business who reads a program's output. What is no error
    of the tree is a flaw of the program, and goes on as it is.
    """
    try:
        program()
    except CasemateError as error:
        words = "".join(c if c.isprintable() else " " for c in str(error))
        sys.stderr.write(f"{name}: {words} [{error.reason}]\n")
        sys.exit(STOPPED if isinstance(error, UnavailableError | IntegrityError) else WRONG_SETTINGS)
