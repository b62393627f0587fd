"""Evidence as a whole: one rule for each kind of component, one verdict over all of them.

Another kind of evidence (TDX, a GPU) is a component more in ``casemate_schemas.evidence`` and a rule more in
:data:`RULES`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Protocol

from casemate_schemas.attestation_policy import PROCESSOR_TYPES, AttestationPolicy, EvidenceType
from casemate_schemas.evidence import Evidence, SevSnp, SevSnpVtpm

from .appraise import verify_and_appraise
from .chain import ChainCache
from .verdict import Check, Checklist, Claims, Verdict
from .vtpm import verify_and_appraise_vtpm


@dataclass(frozen=True, slots=True)
class Context:
    """What every rule judges by: policy, the 64 bytes that fresh evidence covers, time, a revocation list, known chains."""

    policy: AttestationPolicy
    report_data: bytes
    now: datetime
    crl: bytes | None
    chains: ChainCache | None


class Rule(Protocol):
    """Verifies and appraises a component of one type."""

    def __call__(self, component: Any, context: Context, /) -> Verdict:
        """A verdict with claims if every check passed; hostile components never raise."""
        ...


def verify_evidence(
    evidence: Evidence,
    policy: AttestationPolicy,
    now: datetime,
    crl: bytes | None = None,
    chains: ChainCache | None = None,
) -> Verdict:
    """Whether ``evidence`` is genuine, vouches for its own claims and meets ``policy``.

    1. ``evidence_types``: the components' types are those of one combination that the policy accepts: none is missing,
       and none is there that nobody asked for.
    2. Every component's own checks, in the components' order. With more than one component each check has its
       component's type before its name (``sev-snp/measurement``).

    Args:
        evidence: as received; every component must cover ``evidence.claims.report_data``.
        policy: the manifest's.
        now: the time to verify at, with a time zone.
        crl: DER of the ARK's revocation list.
        chains: chains that were judged before; the verdict is the same without.

    Returns: a verdict; it carries the processor's claims if, and only if, every check of every component passed.

    Raises: :class:`ParameterError` if ``now`` has no time zone.

    Source: RFC 9334, section 3.3 (composite devices).
    """
    # 1.
    checks = Checklist("appraise")
    expected = " or ".join(" with ".join(types) for types in policy.evidence_types)
    checks.record("evidence_types", evidence.types in policy.evidence_types, expected, " with ".join(evidence.types))
    # 2.
    context = Context(policy, evidence.claims.report_data, now, crl, chains)
    verdicts = {component.type: RULES[component.type](component, context) for component in evidence.components}
    return _joined(checks.verdict(), verdicts)


def _joined(types: Verdict, verdicts: Mapping[EvidenceType, Verdict]) -> Verdict:
    composite = len(verdicts) > 1
    checks = types.checks
    claims: Claims | None = None
    for name, verdict in verdicts.items():
        checks += tuple(_named(check, name) for check in verdict.checks) if composite else verdict.checks
        if name in PROCESSOR_TYPES:
            claims = verdict.claims
    joined = Verdict(checks, claims)
    return joined if all((types, *verdicts.values())) else Verdict(checks)


def _named(check: Check, component: EvidenceType) -> Check:
    return check._replace(name=f"{component}/{check.name}")


def _sev_snp(component: SevSnp, context: Context) -> Verdict:
    return verify_and_appraise(
        component.report,
        component.certificates,
        context.policy,
        context.report_data,
        context.now,
        context.crl,
        context.chains,
    )


def _sev_snp_vtpm(component: SevSnpVtpm, context: Context) -> Verdict:
    return verify_and_appraise_vtpm(
        component, context.policy, context.report_data, context.now, context.crl, context.chains
    )


RULES: Final[Mapping[EvidenceType, Rule]] = MappingProxyType({"sev-snp": _sev_snp, "sev-snp-vtpm": _sev_snp_vtpm})
"""One rule for every type there is: a test holds the two together."""
