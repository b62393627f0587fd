"""The key broker's settings: where things are and how much is allowed. Never a secret."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import Name
from pydantic import Field
from pydantic_settings import SettingsConfigDict


class Settings(ProgramSettings):
    """The key broker's settings beside those that all programs share."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_KEY_BROKER_")

    key_broker: Name
    """Its id in the manifest."""
    keys_file: Path
    """Signing and sealing key (a private key file), readable by this user alone."""
    state_dir: Path
    """Ledger, audit log and seed secrets. Back it up: what is lost here is lost."""
    crl_file: Path | None = None
    """The newest revocation list of the manifest's root (DER), read again for every Grant."""
    nonce_ttl_s: Annotated[int, Field(ge=10, le=3600)] = 120
    max_outstanding_nonces: Annotated[int, Field(ge=1, le=1024)] = 16
    """For one job."""
    grant_ttl_s: Annotated[int, Field(ge=10, le=86400)] = 600
    max_submissions_per_day: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """By one person."""
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
