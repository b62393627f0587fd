"""A key broker under any schedule: what it answered is charged once, within the licence, and never silently forgotten."""

from __future__ import annotations

import copy
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import Database
from casemate_privacy import ZERO_CURVE, Curve, RenyiFilter, TrainingEvent, add_curves, rdp_curve
from casemate_schemas.codec import decode
from casemate_schemas.errors import BudgetError, CasemateError, CommitConflictError, RolledBackError
from casemate_schemas.grant import Grant
from casemate_schemas.licence import MemberIs
from casemate_schemas.requests import EndorseState, ShowState, StateShown
from casemate_schemas.signatures import Signed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from support.crashing_state import Crash, CrashingState
from support.key_brokers import Bench, Job, Worker

EPSILON, DELTA = 1.5, 1e-4
STEPS = (5, 12, 20)
"""At noise multiplier 2 and rate 1/8 the licence covers one job of the last kind, or five of the first."""
RESULTS = (b"\x11" * 32, b"\x22" * 32)


@dataclass
class Known:
    """What those who were answered know, and what may have happened besides."""

    charged: dict[bytes, bytes] = field(default_factory=dict)
    """Reservation hash by terms, of every Grant that was answered."""
    committed: dict[bytes, bytes] = field(default_factory=dict)
    steps: dict[bytes, int] = field(default_factory=dict)


class Schedules(RuleBasedStateMachine):
    """North's key broker, which also looks after the jobs of its own scientist."""

    jobs = Bundle("jobs")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.bench = Bench(self.folder)
        self.bench.open_state = lambda folder: CrashingState(Database(folder))
        self.scientist = self.bench.person("north", "sam", ("scientist",))
        rules = {"train": MemberIs(principal="submitter", member="north")}
        permissions = self.bench.permissions(**rules)
        self.dataset = self.bench.register(
            "north", permissions=permissions, epsilon=EPSILON, epsilon_per_job=EPSILON, delta=DELTA
        )
        self.known = Known()
        self.attempts: dict[bytes, int] = {}
        self.undecided: set[bytes] = set()
        """Terms whose Grant may have been decided without an answer."""
        self.snapshots: list[tuple[Path, Known]] = []
        self.anchored = self.bench.broker("north").head()

    def teardown(self) -> None:
        self.bench.close()
        shutil.rmtree(self.folder)

    # --- what others do ---

    @rule(target=jobs, steps=st.sampled_from(STEPS))
    def submit(self, steps: int) -> Job:
        plan = self.bench.plan(self.dataset.use(), training={"steps": steps})
        job = self.bench.job(plan=plan, terms={"job_key_broker": "north"}, by=self.scientist)
        self.known.steps[job.digest] = steps
        answer = self.bench.precheck("north", job)
        assert (answer.decision == "yes") == self._fits(steps), answer.reason
        assert self.bench.precheck("north", job) == answer
        self._anchor()
        return job

    @rule(job=jobs)
    def deliver(self, job: Job) -> None:
        self._deliver(job)
        self._anchor()

    @rule(jobs=st.lists(jobs, min_size=2, max_size=3))
    def deliver_at_once(self, jobs: list[Job]) -> None:
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(self._deliver, jobs, [True] * len(jobs)))
        self._anchor()

    @rule(job=jobs, result=st.sampled_from(RESULTS))
    def commit(self, job: Job, result: bytes) -> None:
        worker = self._deliver(job)
        if worker is None:
            return
        try:
            self.bench.broker("north").commit(worker.commit(result))
            assert self.known.committed.setdefault(job.digest, result) == result
        except CommitConflictError:
            assert self.known.committed[job.digest] != result
        self._anchor()

    # --- what befalls it ---

    @rule()
    def restart(self) -> None:
        self.bench.restart("north")
        self._meet_anchor()

    @rule(job=jobs, point=st.integers(0, 24), commits=st.booleans())
    def die(self, job: Job, point: int, commits: bool) -> None:
        """Killed at a write point; what it did not answer is there as a whole, or not at all, and can be asked again."""
        worker = self._deliver(job) if commits else None
        state = cast(CrashingState, self.bench.database("north"))
        state.points_left = point
        try:
            if worker is None:
                self._deliver(job)
            else:
                self.bench.broker("north").commit(worker.commit(self.known.committed.get(job.digest, RESULTS[0])))
        except Crash:
            self.undecided.add(job.digest)
            self.bench.restart("north")
            self._meet_anchor()
        else:
            state.points_left = None
        if worker is not None:
            with self.bench.database("north").transaction() as tx:
                result = ledger.committed_result(tx, job.digest)
            assert self.known.committed.get(job.digest, result) == result
            if result is not None:
                self.known.committed[job.digest] = result
        self._anchor()

    @rule()
    def snapshot(self) -> None:
        self.bench.close("north")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.folder / "north", folder / "north")
        self.snapshots.append((folder / "north", copy.deepcopy(self.known)))

    @rule(choice=st.randoms(use_true_random=False), endorses=st.booleans())
    def restore_a_snapshot(self, choice: object, endorses: bool) -> None:
        """It starts from an old copy: either nobody had been answered since, or it says so and does nothing."""
        if not self.snapshots:
            return
        old, known = choice.choice(self.snapshots)  # type: ignore[attr-defined]
        newest = Path(tempfile.mkdtemp(dir=self.folder)) / "north"
        self.bench.close("north")
        shutil.move(self.folder / "north", newest)
        shutil.copytree(old, self.folder / "north")
        self._meet_anchor()
        state = self._state()
        if state.ahead is None:
            assert known.charged == self.known.charged and known.committed == self.known.committed
            return
        with pytest.raises(RolledBackError):
            self.submit(STEPS[0])
        if endorses:
            officer = self.bench.stewards["north"]
            shown = self.bench.ask("north", officer, EndorseState(ahead=state.ahead.digest))
            assert isinstance(shown, StateShown) and shown.ahead is None and shown.head.branch == state.head.branch + 1
            self.known = Known(dict(known.charged), dict(known.committed), self.known.steps)
            self._anchor()
        else:
            self.bench.close("north")
            shutil.rmtree(self.folder / "north")
            shutil.move(newest, self.folder / "north")
            self._meet_anchor()

    # --- what must hold ---

    @invariant()
    def what_was_answered_is_charged_once_within_the_licence(self) -> None:
        lineage = self._lineage()
        with self.bench.database("north").transaction() as tx:
            ledger.verify(tx)
            audit_log.verify(tx)
            booked = [charge for _, charge in ledger.charges_after(tx, lineage, 0, 10_000)]
            for terms, reservation in self.known.charged.items():
                found = ledger.find_reservation(tx, terms)
                assert found is not None and found.hash == reservation
            for terms, result in self.known.committed.items():
                assert ledger.committed_result(tx, terms) == result
        total = ZERO_CURVE
        for charge in booked:
            total = add_curves(total, rdp_curve(charge.event))
        if len(booked) > 1:
            assert RenyiFilter(EPSILON, DELTA).spent_epsilon(total) <= EPSILON * (1 + 1e-6)

    # --- helpers ---

    def _deliver(self, job: Job, is_racing: bool = False) -> Worker | None:
        """Another attempt at the job; the worker, if it was given its keys."""
        self.attempts[job.digest] = self.attempts.get(job.digest, 0) + 1
        worker = Worker(job, self.attempts[job.digest])
        fits = self._fits(self.known.steps[job.digest])
        try:
            evidence = self.bench.evidence(worker)
            grant = self._grant(worker.request(evidence))
        except BudgetError:
            assert not fits or is_racing
            return None
        except CasemateError as error:
            if error.reason != "not_found":  # it was refused before, or forgotten with the state
                raise
            return None
        if not is_racing and job.digest not in self.known.charged:
            assert fits or job.digest in self.undecided
        assert self.known.charged.setdefault(job.digest, grant.header.reservation) == grant.header.reservation
        return worker

    def _grant(self, request: bytes) -> Grant:
        signed = decode(Signed, self.bench.broker("north").grant(request))
        return signed.verify(Grant, self.bench.key_brokers["north"].signing.public)

    def _fits(self, steps: int) -> bool:
        """Whether the filter admits one more such job on what is booked now."""
        event = TrainingEvent(self.dataset.use().sample_rate.fraction, 2.0, steps)
        return RenyiFilter(EPSILON, DELTA).admits_event(self._spent(), event)

    def _spent(self) -> Curve:
        lineage = self._lineage()
        with self.bench.database("north").transaction() as tx:
            return ledger.spent_curve(tx, lineage)

    def _lineage(self) -> bytes:
        with self.bench.database("north").transaction() as tx:
            (lineage,) = tx.execute("SELECT lineage FROM datasets").fetchone()
        return bytes(lineage)

    def _state(self) -> StateShown:
        shown = self.bench.ask("north", self.bench.stewards["north"], ShowState())
        assert isinstance(shown, StateShown)
        return shown

    def _anchor(self) -> None:
        """As the program does before an answer leaves."""
        self.anchored = self.bench.broker("north").head()

    def _meet_anchor(self) -> None:
        """As the program does when it starts."""
        self.bench.broker("north").observe(self.anchored)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
