"""The settings files that were given, each read as its own program reads it."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from casemate_messaging.files import read_file
from casemate_messaging.settings import MAX_SETTINGS_BYTES, ProgramSettings
from casemate_schemas.errors import CasemateError

from casemate.entry import is_missing_extra, missing_extra_line

from .findings import Finding

Kind = Literal["gateway", "worker", "key-broker"]

MAX_FILES: Final = 1024
_MODULES: Final[dict[Kind, str]] = {
    "gateway": "casemate_gateway.settings",
    "worker": "casemate_worker.settings",
    "key-broker": "casemate_key_broker.settings",
}
_USERS: Final[dict[Kind, str]] = {"gateway": "nats_user", "worker": "name", "key-broker": "key_broker"}


@dataclass(frozen=True)
class Program:
    """One program as its settings describe it."""

    kind: Kind
    file: Path
    settings: ProgramSettings

    @property
    def user(self) -> str:
        """The NATS user that its permissions were made for."""
        return str(getattr(self.settings, _USERS[self.kind]))

    @property
    def about(self) -> str:
        """How findings call it."""
        return f"{self.kind} {self.user}" if self.kind != "gateway" else f"gateway {self.file}"

    def value(self, name: str) -> Any:
        """A setting that only this kind of program has; None if it has none."""
        return getattr(self.settings, name, None)


@dataclass
class Given:
    """The files to look at."""

    settings: list[tuple[Kind, Path]] = field(default_factory=list)
    nats_configs: list[Path] = field(default_factory=list)

    def add_folder(self, folder: Path) -> None:
        """Everything under a folder that ``consortium init`` or ``casemate up`` wrote."""
        for path in sorted(folder.rglob("settings.toml"))[:MAX_FILES]:
            self.settings.append((_kind_of(path), path))
        for path in sorted({*folder.rglob("nats-server.conf"), *folder.rglob("nats-server.json")})[:MAX_FILES]:
            self.nats_configs.append(path)


def load(kind: Kind, path: Path) -> Program | Finding:
    """The program, or why its settings cannot be read."""
    try:
        settings = importlib.import_module(_MODULES[kind]).Settings.load(path)
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        extra = missing_extra_line(kind)
        return Finding(f"{kind} {path}", "settings", "a program that is not installed here", "its packages", extra)
    except CasemateError as error:
        return Finding(f"{kind} {path}", "settings", str(error), "settings as docs/ has them", f"correct {path}")
    return Program(kind, path, settings)


def _kind_of(path: Path) -> Kind:
    """By what only one kind has."""
    try:
        names = tomllib.loads(read_file(path, MAX_SETTINGS_BYTES).decode("utf-8", "replace")).keys()
    except (CasemateError, tomllib.TOMLDecodeError):
        return "gateway"
    if "key_broker" in names:
        return "key-broker"
    return "worker" if "scratch_dir" in names else "gateway"
