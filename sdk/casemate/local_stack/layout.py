"""Where things lie in a local stack's folder, and the few lines of public facts it keeps about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from casemate_schemas.errors import SetupError


@dataclass(frozen=True)
class Facts:
    """What a client of the stack needs to know; nothing secret."""

    consortium: str
    url: str
    members: tuple[str, ...]
    people: tuple[str, ...]
    """``person@member``; the key file is at :meth:`Layout.person_keys`."""
    workers: tuple[str, ...]
    hosted: tuple[str, ...] = ()
    """Members whose key brokers run in (simulated) enclaves."""


@dataclass(frozen=True)
class Layout:
    """Paths in one stack's folder. What belongs to one party lies in one subfolder that only its user can read."""

    folder: Path

    @property
    def manifest(self) -> Path:
        """The manifest chain, public."""
        return self.folder / "manifest.bin"

    @property
    def facts_file(self) -> Path:
        """The stack's :class:`Facts`."""
        return self.folder / "stack.json"

    @property
    def pid_file(self) -> Path:
        """Process id and start time of the supervisor, while it runs."""
        return self.folder / "supervisor.json"

    @property
    def nats(self) -> Path:
        """NATS' configuration and store."""
        return self.folder / "nats"

    @property
    def chip(self) -> Path:
        """The simulated chip's key and socket."""
        return self.folder / "simulated-chip"

    @property
    def chip_socket(self) -> Path:
        """Relative to the stack's folder: a Unix socket's path may have 108 bytes at most."""
        return Path("simulated-chip/chip.sock")

    @property
    def key_broker_socket(self) -> Path:
        """Where the simulated chip launches hosted key brokers; relative likewise."""
        return Path("simulated-chip/kb.sock")

    @property
    def logs(self) -> Path:
        """What the programs log."""
        return self.folder / "logs"

    def member(self, member: str) -> Path:
        """A member's own folder: its keys, its people's keys, its key broker's keys and state."""
        return self.folder / "members" / member

    def member_keys(self, member: str) -> Path:
        """A member's private key file."""
        return self.member(member) / "member.key"

    def person_keys(self, person: str) -> Path:
        """The private key file of ``person@member``."""
        name, _, member = person.partition("@")
        return self.member(member) / f"{name}.key"

    def program(self, program: str) -> Path:
        """The folder of the gateway or a worker."""
        return self.folder / program

    def key_broker(self, member: str, *, hosted: bool) -> Path:
        """The folder of a member's key broker: its own, or one of the host's, where nothing is but ciphertext."""
        return self.folder / f"hosted-{member}" if hosted else self.member(member)

    def read_facts(self) -> Facts:
        """The stack's facts. Raises :class:`SetupError` if there is no stack here."""
        try:
            value = json.loads(self.facts_file.read_text())
            lists = {name: tuple(value.get(name, ())) for name in ("members", "people", "workers", "hosted")}
            return Facts(consortium=value["consortium"], url=value["url"], **lists)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SetupError(f"no local stack in {self.folder}: start one with 'casemate up'") from error

    def write_facts(self, facts: Facts) -> None:
        """Writes the facts, whole or not at all."""
        draft = self.facts_file.with_suffix(".new")
        draft.write_text(json.dumps(asdict(facts), indent=2))
        draft.replace(self.facts_file)
