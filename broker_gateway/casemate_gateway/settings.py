"""What an operator chooses: one TOML file, environment variables ``CASEMATE_GATEWAY_<FIELD>`` on top. No secrets, only paths."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from casemate_messaging.blobs import MAX_BLOB_BYTES
from casemate_schemas.errors import SetupError
from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, le=92 * 24 * 3600)]


class Settings(BaseSettings):
    """All of the gateway's settings. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="CASEMATE_GATEWAY_", hide_input_in_errors=True, allow_inf_nan=False
    )

    nats_url: str
    """The embedded server's or an existing cluster's, ``nats://host:port`` or ``tls://host:port``."""
    nats_seed_file: Path
    nats_user: str = "gateway"
    nats_connect_s: Seconds = 10.0
    """How long to wait for NATS at start."""
    consortium: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    manifest_file: Path

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8440
    """0 takes a free one; event ``ready`` tells which."""
    public_url: Annotated[str, StringConstraints(pattern=r"^https?://[^/?#@\s]+$")] | None = None
    """The origin that clients sign for, if it is not the address listened on (a TLS proxy in front, say)."""

    max_envelope_bytes: Annotated[int, Field(ge=1 << 10, le=MAX_BLOB_BYTES)] = MAX_BLOB_BYTES
    max_uploads: Annotated[int, Field(ge=1, le=1024)] = 8
    """Uploads at once; each holds about 10 MiB of memory."""
    max_downloads: Annotated[int, Field(ge=1, le=1024)] = 16
    max_event_streams: Annotated[int, Field(ge=1, le=65536)] = 512
    max_jobs_listed: Annotated[int, Field(ge=1, le=10_000)] = 1000
    body_idle_s: Seconds = 30.0
    """How long a body may stand still."""
    min_upload_bytes_per_s: Annotated[int, Field(ge=1)] = 16 << 10
    """A slower upload is given up, so that few slow ones cannot hold all places."""

    max_submission_age_s: Seconds = 3600.0
    """How old a routing header may be when it is first posted."""
    max_job_s: Seconds = 30 * 24 * 3600.0
    """How far a deadline may lie after the creation."""
    key_broker_timeout_s: Seconds = 30.0
    precheck_retry_s: Seconds = 5.0
    """How long to wait before a key broker that did not answer is asked again."""
    reconcile_every_s: Seconds = 15.0
    sweep_every_s: Seconds = 3600.0
    heartbeat_s: Seconds = 15.0
    """How often a quiet event stream shows that it lives."""
    poll_after_s: Annotated[int, Field(ge=1, le=3600)] = 2
    """What ``Retry-After`` tells those who poll."""

    ack_wait_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """How long a worker may be silent before its job goes to another one; workers speak up each ``heartbeat_s`` of theirs."""
    stream_replicas: Annotated[int, Field(ge=1, le=5)] = 1
    max_blob_store_bytes: Annotated[int, Field(ge=-1)] = -1

    @classmethod
    def load(cls, path: Path) -> Self:
        """The settings in the TOML file ``path``, environment on top. Raises :class:`SetupError`."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls(**values)
        except OSError as error:
            raise SetupError(f"cannot read the settings file {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SetupError(f"{path} is not a TOML file") from error
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            raise SetupError(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; nothing else is read."""
        return env_settings, init_settings
