"""``make audit``: the engine audited ten times with each noise mechanism, and once with each planted bug. Some minutes.

Fails unless every bound for the engine as it is shipped is at most its epsilon, and every bug's is above.
"""

from __future__ import annotations

import os
import sys

import torch
from casemate_privacy.auditing import audit_report
from casemate_schemas.audit import AuditCounts
from casemate_schemas.job import Plan
from casemate_worker.environment import reproducible_kernels
from support.planted_bugs import ONE_RUN_BUGS, audit_plan, play

RUNS = 10
CANARIES = 2000


def main() -> int:
    """Print a line for each run."""
    os.environ.update(reproducible_kernels())  # read when libraries first compute
    torch.set_num_threads(1)
    as_it_should = []
    for mechanism in ("hardened", "exact"):
        for noise in (2.4913, 0.9):
            plan = audit_plan(canaries=CANARIES, noise=noise, mechanism=mechanism)
            for number in range(RUNS):
                as_it_should.append(not _show(f"{mechanism}, run {number}", plan, play(plan, number)))
    plan = audit_plan(canaries=CANARIES)
    for name, bug in ONE_RUN_BUGS.items():
        as_it_should.append(_show(name, plan, play(plan, 0, bug)))
    return 0 if all(as_it_should) else 1


def _show(name: str, plan: Plan, counts: AuditCounts) -> bool:
    """Whether the guarantee is refuted."""
    report = audit_report(plan, counts)
    print(  # noqa: T201
        f"{name:40}  guaranteed ε {report.epsilon:6.3f}   lower bounds: any mechanism {report.one_run_epsilon:6.3f}, "
        f"this one {report.profile_epsilon:6.3f}{'   REFUTED' if report.refutes else ''}",
        flush=True,
    )
    return report.refutes


if __name__ == "__main__":
    sys.exit(main())
