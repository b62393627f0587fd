"""How long a key broker takes to decide, when a dataset has had 1,000 jobs of all kinds; and what its books cost.

A decision is all that a Grant adds to checking a worker's evidence: the job's price, the filter's verdict, the charge and the
audit entry on the disk, and where the dataset stands afterwards (the filter's proof and the PLD's estimate). A job is priced
at its precheck; the price is cached by the process, as it is here, and told apart. Nothing is simulated but the jobs.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from _bench import Metric, arguments, machine, report
from casemate_key_broker import audit_log, ledger, standings
from casemate_key_broker.database import Database, Transaction
from casemate_key_broker.ledger import Charge
from casemate_privacy import GaussianSumEvent, PrivacyEvent, RenyiFilter, TrainingEvent, epsilon, rdp_curve
from casemate_privacy.events import sampled
from casemate_schemas.grant import AuditEntry
from casemate_schemas.job import Rational
from casemate_schemas.requests import ChargeKind

LINEAGE = b"\x01" * 32
EPSILON, DELTA = 8.0, 1e-5
JOBS, AUDIT_ENTRIES = 1_000, 100_000
KINDS: tuple[ChargeKind, ...] = ("train", "evaluate", "statistics", "metrics")


def draw_event(draw: random.Random) -> tuple[ChargeKind, PrivacyEvent]:
    """A small job: 1,000 of them fit the budget. No two are alike."""
    kind = draw.choice(KINDS)
    if kind == "train":
        rate = Fraction(draw.randint(1 << 22, 1 << 26), 1 << 32)
        return kind, TrainingEvent(rate, draw.uniform(4.0, 12.0), draw.choice((50, 100, 200)))
    return kind, GaussianSumEvent(1.0, draw.uniform(60.0, 400.0), draw.randint(1, 4))


def charge_for(kind: ChargeKind, released: PrivacyEvent) -> Charge:
    event = sampled(released)
    return Charge(
        dataset="cardio@north",
        lineage=LINEAGE,
        licence=bytes(32),
        kind=kind,
        sample_rate=Rational.of(event.sample_rate),
        noise_multiplier=event.noise_multiplier,
        steps=event.steps,
        epsilon=epsilon(event, DELTA),
        curve=rdp_curve(event),
        limit_epsilon=EPSILON,
        delta=DELTA,
    )


def reserve(tx: Transaction, number: int, charge: Charge) -> None:
    ledger.reserve(
        tx,
        job_id=f"{number:032x}",
        terms=number.to_bytes(32, "big"),
        submitter="clara@clara",
        purpose="research",
        deadline=1,
        epoch=1,
        charges=(charge,),
        now=0,
    )
    audit_log.append(tx, AuditEntry(key_broker="north", event="granted", at=0, subject=f"{number:032x}"))


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def decide(database: Database, number: int, charge: Charge) -> None:
    with database.transaction() as tx:
        reserve(tx, number, charge)
    standings.catch_up(database, LINEAGE, 2)


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def measure_decisions(folder: Path, jobs: int) -> tuple[list[float], list[float], list[float], Database]:
    """Seconds of each job's price and of each decision, and each decision's processor time, on one growing ledger."""
    draw, prices, decisions, busy = random.Random(1), list[float](), list[float](), list[float]()
    database = Database(folder)
    for number in range(jobs):
        kind, event = draw_event(draw)
        prices.append(timed(lambda event=event: (epsilon(event, DELTA), rdp_curve(event))))
        charge = charge_for(kind, event)
        began = time.process_time()
        decisions.append(timed(lambda number=number, charge=charge: decide(database, number, charge)))
        busy.append(time.process_time() - began)
    return prices, decisions, busy, database


def measure_filter(database: Database) -> float:
    """Seconds of the filter's verdict alone, on what is spent now."""
    with database.transaction() as tx:
        spent = ledger.spent_curve(tx, LINEAGE)
    curve = rdp_curve(TrainingEvent(Fraction(1, 64), 6.0, 100))
    return statistics.median(timed(lambda: RenyiFilter(EPSILON, DELTA).admits(spent, curve)) for _ in range(50))


def measure_audit(folder: Path, entries: int) -> tuple[float, float, float]:
    """Seconds of one append, one proof, and of verifying the whole log of so many entries."""
    database = Database(folder)
    entry = AuditEntry(key_broker="north", event="granted", at=0, subject="job", terms=bytes(32), evidence=bytes(32))
    began = time.perf_counter()
    with database.transaction() as tx:
        for _ in range(entries):
            audit_log.append(tx, entry)
        append = (time.perf_counter() - began) / entries
        draw = random.Random(2)
        proof = statistics.median(timed(lambda: audit_log.prove(tx, draw.randrange(entries))) for _ in range(200))
        verify = timed(lambda: audit_log.verify(tx))
    database.close()
    return append, proof, verify


def main() -> None:
    options = arguments(__doc__ or "")
    jobs, entries = (300, 20_000) if options.quick else (JOBS, AUDIT_ENTRIES)
    with tempfile.TemporaryDirectory() as folder:
        prices, decisions, busy, database = measure_decisions(Path(folder) / "decisions", jobs)
        verdict = measure_filter(database)
        with database.transaction() as tx:
            opening = timed(lambda: ledger.verify(tx)) / jobs
            (losses,) = tx.execute("SELECT length(composed) FROM losses").fetchone()
        database.close()
        append, proof, verify = measure_audit(Path(folder) / "audit", entries)
    newest = decisions[-100:]
    metrics = [
        Metric(f"decision {jobs - 99} to {jobs}, p99", p99(newest) * 1e3, "ms", 100.0),
        Metric(f"decision {jobs - 99} to {jobs}, median", statistics.median(newest) * 1e3, "ms"),
        Metric(f"decision {jobs - 99} to {jobs}, processor time, p99", p99(busy[-100:]) * 1e3, "ms"),
        Metric("all decisions, p99", p99(decisions) * 1e3, "ms", 100.0),
        Metric("the filter's verdict alone, median", verdict * 1e3, "ms"),
        Metric("a job's price, once, p99", p99(prices) * 1e3, "ms"),
        Metric("a job's price, once, median", statistics.median(prices) * 1e3, "ms"),
        Metric("kept privacy losses of a dataset", losses / 1024, "KiB", 512.0),
        Metric("verifying a ledger, an entry", opening * 1e6, "µs"),
        Metric("audit log: appending an entry", append * 1e6, "µs"),
        Metric(f"audit log: a proof among {entries}", proof * 1e3, "ms", 5.0),
        Metric(f"audit log: verifying {entries}", verify, "s"),
    ]
    runs = {"decisions_s": decisions, "decisions_processor_s": busy, "prices_s": prices}
    report(metrics, runs, machine("dp-accounting", "numpy", "scipy"), options.json)


if __name__ == "__main__":
    main()
