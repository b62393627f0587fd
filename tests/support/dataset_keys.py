"""The keys of dataset versions, as whoever reads a member-run key broker's disk finds them."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

from casemate_key_broker.database import FILE_NAME
from casemate_schemas.sealing import SealingKey


def dataset_keys(state: Path) -> dict[bytes, SealingKey]:
    """By envelope digest, out of a copy: the running program lets nobody else open its state."""
    with tempfile.TemporaryDirectory() as folder:
        for path in state.glob(f"{FILE_NAME}*"):
            shutil.copy(path, folder)
        connection = sqlite3.connect(Path(folder) / FILE_NAME)
        try:
            rows = connection.execute(
                "SELECT envelope, private FROM dataset_keys WHERE envelope IS NOT NULL"
            ).fetchall()
        finally:
            connection.close()
    return {envelope: SealingKey(private) for envelope, private in rows}
