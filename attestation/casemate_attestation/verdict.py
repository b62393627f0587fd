"""What came of it: a verdict is a value, an ordered list of named checks."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal, NamedTuple

from casemate_schemas.errors import AppraisalError, VerificationError

from .products import Product
from .report import AttestationReport

Stage = Literal["verify", "appraise"]

SnpCheck = Literal[
    "format",
    "version",
    "signature_algorithm",
    "reserved",
    "signer",
    "certificate_format",
    "certificate_profile",
    "signer_certificate",
    "root",
    "chain",
    "validity",
    "revocation",
    "product",
    "signature",
    "chip_id",
    "tcb_layout",
    "tcb_certificate",
    "tcb_order",
    "simulation",
    "accepted_root",
    "report_version",
    "report_data",
    "measurement",
    "host_data",
    "guest_policy",
    "vmpl",
    "guest_svn",
    "family_id",
    "image_id",
    "id_key",
    "author_key",
    "min_tcb",
    "min_firmware",
    "provisional",
    "platform",
    "launch_mitigations",
    "current_mitigations",
    "chip",
    "crl",
    "crl_age",
]
VtpmCheck = Literal[
    "hcl_runtime_data",
    "attestation_key",
    "quote_format",
    "quote_signature",
    "quote_pcrs",
    "quote_nonce",
    "pcr_values",
]
CheckName = Literal[SnpCheck, VtpmCheck, "evidence_types"]
"""Every check that there is. Each has a test in which it alone is broken (a test holds the two together)."""


class Check(NamedTuple):
    """One check: its stable name, whether it passed, what was expected and what came."""

    stage: Stage
    name: str
    ok: bool
    expected: str
    got: str

    def __str__(self) -> str:
        if self.ok:
            return f"✓ {self.name}: {self.got}"
        return f"✗ {self.name}: expected {self.expected}, got {self.got}"


_IS_OK: Final = attrgetter("ok")


class Checklist:
    """Collects the checks of one stage, in order."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._checks: list[Check] = []

    def record(self, name: CheckName, ok: bool, expected: str, got: str | None = None) -> None:
        """Add a check; without ``got``, what came is what was expected."""
        self._checks.append(Check(self._stage, name, ok, expected, expected if got is None else got))

    def verdict(self, claims: Claims | None = None) -> Verdict:
        """The verdict so far; it carries ``claims`` only if every check passed."""
        verdict = Verdict(tuple(self._checks))
        return Verdict(verdict.checks, claims) if claims is not None and verdict.ok else verdict


@dataclass(frozen=True, slots=True)
class Claims:
    """What genuine evidence says: exists only where every verification check passed.

    ``hardware_id`` is the VCEK's hwID, ``csp_id`` the VLEK's cloud provider: one of the two is set. ``crl_age_s`` is the time
    since the revocation list that was consulted was issued; None if there was none.
    """

    report: AttestationReport
    product: Product
    ark_sha256: bytes
    simulated: bool
    hardware_id: bytes | None
    csp_id: str | None
    crl_age_s: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Checks in the order they were made. True as a condition only if there are checks and all of them passed."""

    checks: tuple[Check, ...]
    claims: Claims | None = None

    @property
    def ok(self) -> bool:
        """Whether there are checks and every one passed."""
        return bool(self.checks) and all(map(_IS_OK, self.checks))

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed, in order."""
        return tuple(check.name for check in self.checks if not check.ok)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))

    def raise_for_failure(self) -> None:
        """Return if the verdict is good.

        Raises :class:`VerificationError` if the evidence is not genuine (or nothing was checked), and
        :class:`AppraisalError` if it is genuine but does not meet the policy; the message lists each failed check.
        """
        if self.ok:
            return
        failures = [check for check in self.checks if not check.ok]
        message = "; ".join(map(str, failures)) or "expected at least one check, got none"
        if failures and all(check.stage == "appraise" for check in failures):
            raise AppraisalError(message)
        raise VerificationError(message)
