"""What every program on NATS is told by its operator: one TOML file, the environment on top. Paths and figures, no secrets."""

from __future__ import annotations

import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Final, Self

from casemate_schemas.codec import decode
from casemate_schemas.consortium import MAX_CHAIN_BYTES, ManifestChain
from casemate_schemas.errors import SetupError
from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from .files import check_private, read_file

MAX_SETTINGS_BYTES: Final = 64 << 10


class ProgramSettings(BaseSettings):
    """The settings that all programs share. A subclass adds its own, and its ``env_prefix``."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    nats_url: str
    """The embedded server's or an existing cluster's, ``nats://host:port`` or ``tls://host:port``, commas between several."""
    nats_ca_file: Path | None = None
    """Certificates (PEM) that may vouch for the server's; the system's if not given. For ``tls://``."""
    nats_certificate_file: Path | None = None
    nats_key_file: Path | None = None
    """Certificate and private key (PEM) to show the server, if it wants one of its clients."""
    nats_seed_file: Path
    """Seed of the program's nkey, readable by its user alone."""
    consortium: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """The consortium's id in hexadecimal."""
    manifest_file: Path
    """Canonical ``ManifestChain``, as far as it is known. Newer manifests are learnt over NATS, or by replacing this file."""
    manifest_poll_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How often to look for a newer manifest."""
    state_dir: Path | None = None
    """Where the accepted manifests are kept, so that no restart goes back behind them."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """The settings in the TOML file ``path``; an environment variable (prefix and field name) takes precedence.

        Raises :class:`SetupError` that names the field, and never shows a value.
        """
        try:
            return cls(**tomllib.loads(read_file(path, MAX_SETTINGS_BYTES).decode("utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
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

    @property
    def consortium_id(self) -> bytes:
        """The consortium's id, 32 bytes."""
        return bytes.fromhex(self.consortium)

    def nats_tls(self) -> ssl.SSLContext | None:
        """Whom to trust and what to show in the handshake with NATS; None if nothing is set.

        Raises :class:`SetupError` for files that are no certificates or keys, or a key that others can read.
        """
        if self.nats_ca_file is self.nats_certificate_file is self.nats_key_file is None:
            return None
        if (self.nats_certificate_file is None) != (self.nats_key_file is None):
            raise SetupError("'nats_certificate_file' and 'nats_key_file' go together")
        try:
            context = ssl.create_default_context(cafile=self.nats_ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if self.nats_certificate_file is not None and self.nats_key_file is not None:
                check_private(self.nats_key_file)
                context.load_cert_chain(self.nats_certificate_file, self.nats_key_file, password="")
        except (OSError, ValueError) as error:
            raise SetupError(f"the TLS files for NATS cannot be used: {type(error).__name__}") from error
        return context

    def manifest_chain(self) -> ManifestChain:
        """The chain in ``manifest_file``, not verified. Raises :class:`SetupError` or :class:`MalformedError`."""
        return decode(ManifestChain, read_file(self.manifest_file, MAX_CHAIN_BYTES), max_bytes=MAX_CHAIN_BYTES)
