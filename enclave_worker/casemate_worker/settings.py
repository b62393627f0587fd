"""What an operator tells a worker. Nothing here is secret, and nothing here can weaken what key brokers demand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from casemate_attestation.https import URL_PATTERN
from casemate_attestation.kds import AMD_KDS_URL
from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import Name
from pydantic import Field, StringConstraints
from pydantic_settings import SettingsConfigDict


class Settings(ProgramSettings):
    """Settings of ``casemate-worker`` beside those that all programs share."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_WORKER_")

    name: Name
    """Also the NATS user that permissions were made for."""
    guest: Literal["configfs", "sev-guest", "azure-vtpm", "simulated"] = "configfs"
    """How the chip is asked; ``simulated`` where there is none."""
    vmpl: Annotated[int, Field(ge=0, le=3)] = 0
    """The privilege level that reports are asked for with ``sev-guest``."""
    simulated_chip_socket: Path | None = None
    kds_cache_dir: Path | None = None
    """Where the chip's certificates are kept, for a host that hands out none with the report."""
    kds: Literal["offline", "online"] = "offline"
    """Whether they are fetched from AMD's key distribution service, or put into that folder by the operator."""
    kds_url: Annotated[str, StringConstraints(pattern=URL_PATTERN)] = AMD_KDS_URL
    kds_interval_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """The least time between two requests. AMD's service answers about one in ten seconds; a mirror may take more."""
    scratch_dir: Path
    """Where ciphertext may be buffered; plaintext never touches a disk."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often a delivery is kept alive and the job's record looked at."""
    presence_s: Annotated[float, Field(gt=0, le=10)] = 5.0
    """How often the worker says that it is there, and looks whether it is to take no more jobs."""
    checkpoint_interval_s: Annotated[float, Field(ge=0, le=86400)] = 10.0
    """The shortest time between two checkpoints, whatever the plan asks for: they are kept, and take room."""
    pull_wait_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    rpc_timeout_s: Annotated[float, Field(gt=0, le=300)] = 30.0
    retry_delay_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How long a job waits before another try when a key broker or NATS could not be reached."""
