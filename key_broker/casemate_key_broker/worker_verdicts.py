"""The newest verdict on each worker that showed evidence, for the people whose policy it is.

A worker is known by the REPORT_ID of its guest, which the chip draws at launch. What a report says that is not genuine is
anyone's word: such verdicts are kept apart, and can push out no genuine one.
"""

from __future__ import annotations

from typing import Final

from casemate_attestation.products import decode_tcb, product_of_cpuid
from casemate_attestation.report import AttestationReport
from casemate_attestation.verdict import Check, Verdict
from casemate_schemas.attestation_policy import PROCESSOR_TYPES
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.errors import MalformedError
from casemate_schemas.evidence import Evidence
from casemate_schemas.licence import Licence, WithMeasurement, leaves
from casemate_schemas.requests import MAX_FAILED_CHECKS, MAX_UNNAMED, FailedCheck, WorkerVerdict

from . import licences
from .database import Transaction

MAX_KEPT: Final = {True: 128, False: 32}
"""Verdicts kept on genuine evidence, and on other."""
_MAX_CHARS: Final = 200


def describe(evidence: Evidence, verdict: Verdict, *, manifest_number: int, now: int) -> WorkerVerdict:
    """What became of a worker's evidence under the manifest of that number, and what its report says of it."""
    report = _report(evidence)
    product = None if report is None else product_of_cpuid(report.cpuid_family, report.cpuid_model)
    verified = [check.ok for check in verdict.checks if check.stage == "verify"]
    failed = [check for check in verdict.checks if not check.ok]
    return WorkerVerdict(
        worker=digest_of(evidence) if report is None else report.report_id,
        genuine=bool(verified) and all(verified),
        accepted=verdict.ok,
        failed=tuple(map(_failed, failed[:MAX_FAILED_CHECKS])),
        product=product,
        chip=b"" if report is None else report.chip_id,
        measurement=None if report is None else report.measurement,
        tcb=None if report is None or product is None else decode_tcb(report.current_tcb, product),
        manifest_number=manifest_number,
        evidence=digest_of(evidence),
        job_id=evidence.claims.job_id,
        at=now,
    )


def keep(tx: Transaction, found: WorkerVerdict) -> None:
    """Keep the verdict instead of the worker's older one."""
    tx.execute(
        "INSERT OR REPLACE INTO worker_verdicts (worker, genuine, at, verdict) VALUES (?, ?, ?, ?)",
        (found.worker, int(found.genuine), found.at, encode(found)),
    )
    tx.execute(
        "DELETE FROM worker_verdicts WHERE genuine = ?1 AND rowid NOT IN"
        " (SELECT rowid FROM worker_verdicts WHERE genuine = ?1 ORDER BY at DESC, rowid DESC LIMIT ?2)",
        (int(found.genuine), MAX_KEPT[found.genuine]),
    )


def newest(tx: Transaction, members: tuple[str, ...]) -> tuple[WorkerVerdict, ...]:
    """All kept verdicts, newest first; each with the ``members``' datasets whose licences name measurements, not its own."""
    rows = tx.execute("SELECT verdict FROM worker_verdicts ORDER BY at DESC, rowid DESC").fetchall()
    owned = [dataset for dataset in licences.all_in_force(tx) if dataset.card.owner in members]
    named = [(dataset.id, _measurements(dataset.licence)) for dataset in owned]
    found = []
    for one in (decode(WorkerVerdict, verdict) for (verdict,) in rows):
        unnamed = tuple(dataset for dataset, wanted in named if wanted and one.measurement not in wanted)
        found.append(one.model_copy(update={"unnamed_by": unnamed[:MAX_UNNAMED]}))
    return tuple(found)


def _measurements(licence: Licence) -> set[bytes]:
    """Every measurement that a rule of the licence speaks of."""
    found = (leaf for permission in licence.permissions for leaf in leaves(permission.rule))
    return {leaf.measurement for leaf in found if isinstance(leaf, WithMeasurement)}


def _report(evidence: Evidence) -> AttestationReport | None:
    """The processor's report, as far as it can be read."""
    component = next(item for item in evidence.components if item.type in PROCESSOR_TYPES)
    try:
        return AttestationReport.parse(component.report)
    except MalformedError:
        return None


def _failed(check: Check) -> FailedCheck:
    return FailedCheck(name=check.name[:64], expected=check.expected[:_MAX_CHARS], got=check.got[:_MAX_CHARS])
