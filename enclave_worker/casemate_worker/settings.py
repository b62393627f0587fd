"""What an operator tells a worker. Nothing here is secret, and nothing here can weaken what key brokers demand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import Name
from pydantic import Field
from pydantic_settings import SettingsConfigDict


class Settings(ProgramSettings):
    """Settings of ``casemate-worker`` beside those that all programs share."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_WORKER_")

    name: Name
    """Also the NATS user that permissions were made for."""
    guest: Literal["configfs", "simulated"] = "configfs"
    simulated_chip_socket: Path | None = None
    scratch_dir: Path
    """Where ciphertext may be buffered; plaintext never touches a disk."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often a delivery is kept alive and the job's record looked at."""
    checkpoint_interval_s: Annotated[float, Field(ge=0, le=86400)] = 10.0
    """The shortest time between two checkpoints, whatever the plan asks for: they are kept, and take room."""
    pull_wait_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    rpc_timeout_s: Annotated[float, Field(gt=0, le=300)] = 30.0
    retry_delay_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How long a job waits before another try when a key broker or NATS could not be reached."""
