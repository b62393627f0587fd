"""What the doctor says of one thing it looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One check of one thing. Without ``fix`` all is well. No value of a secret is ever in it."""

    about: str
    """Which program, NATS server or file."""
    check: str
    found: str
    expected: str = ""
    fix: str = ""
    """The command or setting that mends it."""

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return not self.fix

    def __str__(self) -> str:
        if self.ok:
            return f"ok     {self.about}: {self.check}: {self.found}"
        return f"WRONG  {self.about}: {self.check}: found {self.found}; expected {self.expected}; fix: {self.fix}"

    def as_json(self) -> dict[str, object]:
        """For machines."""
        return {"ok": self.ok, **asdict(self)}
