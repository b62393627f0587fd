"""Where the console scripts of the programs start: each program is imported only when it is run, and may not be installed."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

_OURS = ("casemate_", "casemate.")


def gateway() -> NoReturn:
    """``casemate-gateway``."""
    _run("casemate_gateway", "gateway")


def key_broker() -> NoReturn:
    """``casemate-key-broker``."""
    _run("casemate_key_broker", "key-broker")


def worker() -> NoReturn:
    """``casemate-worker``."""
    _run("casemate_worker", "worker")


def missing_extra_line(extra: str) -> str:
    """The one line that mends a missing extra."""
    return f"this needs more packages:  pip install 'casemate[{extra}]'"


def is_missing_extra(error: ImportError) -> bool:
    """Whether a package that is not ours is missing, rather than something of ours broken."""
    return isinstance(error, ModuleNotFoundError) and not f"{error.name or 'casemate.'}.".startswith(_OURS)


def _run(package: str, extra: str) -> NoReturn:
    try:
        program = importlib.import_module(f"{package}.__main__")
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        sys.stderr.write(missing_extra_line(extra) + "\n")
        sys.exit(2)
    sys.exit(program.main())
