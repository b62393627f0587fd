"""The key broker's settings: where things are and how much is allowed. Never a secret."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from casemate_attestation.https import URL_PATTERN
from casemate_attestation.kds import AMD_KDS_URL
from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import Name
from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import SettingsConfigDict


class Settings(ProgramSettings):
    """The key broker's settings beside those that all programs share."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_KEY_BROKER_")

    key_broker: Name
    """Its id in the manifest."""
    keys_file: Path | None = None
    """Signing and sealing key (a private key file), readable by this user alone. A hosted key broker has none."""
    guest: Literal["sev-guest", "simulated"] | None = None
    """The chip whose enclave this runs in: it makes its own keys, and seals its state. Without it, it is member-run."""
    simulated_chip_socket: Path | None = None
    state_dir: Path
    """Ledger, audit log, seed secrets and accepted manifests. Back it up: what is lost here is lost."""
    backup_dir: Path | None = None
    """Where copies of the state go when an officer asks for one. Not the disk that the state is on."""
    kds_cache_dir: Path | None = None
    """Revocation lists and the ARKs that sign them. With it no evidence is accepted without a current list."""
    kds: Literal["offline", "online"] = "offline"
    """Whether lists are fetched from AMD's key distribution service, or put into that folder by the operator."""
    kds_url: Annotated[str, StringConstraints(pattern=URL_PATTERN)] = AMD_KDS_URL
    kds_interval_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """The least time between two requests. AMD's service answers about one in ten seconds; a mirror may take more."""
    crl_refresh_s: Annotated[int, Field(ge=60, le=7 * 86400)] = 6 * 3600
    crl_max_age_s: Annotated[int, Field(ge=3600, le=366 * 86400)] = 7 * 86400
    """How long a list is used after it was fetched (or put there), however long it is valid."""
    nonce_ttl_s: Annotated[int, Field(ge=10, le=3600)] = 120
    grant_ttl_s: Annotated[int, Field(ge=10, le=86400)] = 600
    max_submissions_per_day: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """By one person."""
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 16

    @model_validator(mode="after")
    def _keys_are_of_one_origin(self) -> Self:
        if (self.keys_file is None) == (self.guest is None):
            raise ValueError("a member-run key broker has a keys_file, a hosted one has a guest, and none has both")
        if (self.guest == "simulated") != (self.simulated_chip_socket is not None):
            raise ValueError("simulated_chip_socket goes with the guest 'simulated'")
        return self
