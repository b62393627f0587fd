"""The key broker's settings: where things are and how much is allowed. Never a secret."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from casemate_schemas.codec import Name
from casemate_schemas.errors import SetupError
from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

MAX_SETTINGS_BYTES = 64 << 10


class Settings(BaseSettings):
    """Read once, from a TOML file; an environment variable ``CASEMATE_KEY_BROKER_<FIELD>`` takes precedence."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_KEY_BROKER_", frozen=True, extra="forbid")

    key_broker: Name
    """Its id in the manifest."""
    nats_url: str
    nats_seed_file: Path
    """Seed of its nkey, readable by this user alone."""
    consortium: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """The consortium's id in hexadecimal."""
    manifest_file: Path
    """Canonical ``ManifestChain``."""
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment over the file; nothing else."""
        return env_settings, init_settings


def load_settings(path: Path) -> Settings:
    """The settings in a TOML file and the environment. Raises :class:`SetupError`, naming the field."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SETTINGS_BYTES).decode("utf-8")
        return Settings(**tomllib.loads(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"cannot read the settings in {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SetupError(f"settings: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
