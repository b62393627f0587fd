"""The simulated chip as a real process."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from casemate_attestation.simulated_chip import SimulatedChip


@dataclass(frozen=True)
class ChipSockets:
    """Where workers and key brokers are launched."""

    worker: Path
    key_broker: Path


@asynccontextmanager
async def chip_process(chip: SimulatedChip, folder: Path) -> AsyncIterator[ChipSockets]:
    """``chip`` behind sockets in ``folder`` (whose path must be short), until the block ends."""
    keys = folder / "chip-keys"
    keys.mkdir(mode=0o700, parents=True)
    chip.save(keys)
    sockets = ChipSockets(folder / "run" / "worker", folder / "run" / "kb")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "casemate_attestation.simulated_chip", "--key-dir", str(keys)),
        *("--socket", str(sockets.worker), "--key-broker-socket", str(sockets.key_broker)),
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    assert process.stderr is not None
    try:
        line = await process.stderr.readline()
        assert b"ready" in line, line
        yield sockets
    finally:
        process.terminate()
        await process.communicate()
