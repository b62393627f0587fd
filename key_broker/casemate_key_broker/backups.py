"""Copies of a member-run key broker's state, made while it serves; each is a state folder that a key broker can start from."""

from __future__ import annotations

import contextlib
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from casemate_messaging.files import sync
from casemate_schemas.errors import ConflictError, SetupError

from . import audit_log
from .database import FILE_NAME, Database, private_folder

_PARTIAL: Final = ".partial"


def back_up(database: Database, state_dir: Path, to: Path, now: int) -> tuple[str, int]:
    """A new folder in ``to`` with all of the state: its name, and how many audit entries it has at the least.

    1. The database as it is between two transactions. 2. All other files of the state: seed secrets, manifests. A secret is
    on the disk before anything is reserved under it, so none that the database needs is missing.
    3. The folder has its name only once all of it is on the disk.

    Raises :class:`SetupError`, and :class:`ConflictError` if one of this second is there already.
    """
    private_folder(to)
    name = f"{datetime.fromtimestamp(now / 1000, UTC):%Y%m%dt%H%M%Sz}"
    draft, whole = to / f"{name}{_PARTIAL}", to / name
    with database.transaction() as tx:
        size = audit_log.size(tx)
    try:
        draft.mkdir(mode=0o700)
    except FileExistsError as error:
        raise ConflictError("a backup of this second is being made") from error
    except OSError as error:
        raise SetupError(f"cannot write {draft}: {error.strerror}") from error
    try:
        database.back_up(draft / FILE_NAME)  # 1
        _copy_rest(state_dir, draft)  # 2
        for path in (*sorted(draft.iterdir()), draft):  # 3
            sync(path)
        draft.rename(whole)
        sync(to)
    except OSError as error:
        raise SetupError(f"the backup {whole} could not be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(draft)
    return name, size


def _copy_rest(state_dir: Path, draft: Path) -> None:
    for path in sorted(state_dir.iterdir()):
        if path.is_file() and not path.name.startswith(FILE_NAME):
            shutil.copy2(path, draft / path.name)
