"""The road of each request, from bytes to bytes. Every function here may run in any thread, beside others.

What is decided and its audit entry are one transaction, on the disk before the answer is returned; asking again gets the
same answer. So a key broker may be killed anywhere: what it answered stands, and what it did not answer can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from casemate_attestation.chain import ChainCache
from casemate_schemas.admission import PrecheckAnswer, PrecheckRequest, Routing
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.custody import (
    AmendLicence,
    BackUpState,
    EraseDataset,
    LicenceAmended,
    PrepareDataset,
    RotateSeeds,
    SeedsRotated,
    ShowDataset,
    StateBackedUp,
)
from casemate_schemas.errors import (
    ApprovalMissingError,
    AuthenticationError,
    CasemateError,
    IntegrityError,
    RolledBackError,
    SetupError,
    UnavailableError,
)
from casemate_schemas.evidence import Evidence, WorkerClaims
from casemate_schemas.grant import AuditEntry, CommitRequest, GrantRequest, NonceRequest
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import VerifiedApproval, check_outcome
from casemate_schemas.requests import (
    ApprovalShown,
    EndorseState,
    GiveApproval,
    ListApprovals,
    ListDatasets,
    PersonRequest,
    PersonResponse,
    RegisterDataset,
    RenewBudget,
    ShowApproval,
    ShowBudget,
    ShowState,
    ShowWorkers,
    TellTime,
    TimeTold,
)
from casemate_schemas.sealing import ContentKey
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms, VerifiedTerms

from . import (
    anchor,
    approvals,
    audit_log,
    commits,
    custody,
    dataset_keys,
    key_release,
    known_terms,
    ledger,
    licences,
    nonces,
    prechecks,
    requests,
    standings,
    worker_verdicts,
)
from .database import State, get_meta, set_meta
from .key_release import Decision
from .ledger import Charge
from .party import Party, full_name
from .prechecks import OwnedUse
from .seed_shares import SeedSecrets

_NO_DECISION = (IntegrityError, UnavailableError)
"""Errors that say nothing about what was asked: they are never an answer, and never stored as one."""

STANDINGS_A_GRANT = 2
STANDINGS_A_BUDGET = 48
"""How many charges' standings are computed, at most, while a worker waits for a Grant, or an owner for a budget."""


@dataclass(frozen=True)
class Limits:
    """What keeps one asker from crowding out the others, and how long what is given out is good."""

    nonce_ttl_ms: int = 120_000
    grant_ttl_ms: int = 600_000
    max_submissions_per_day: int = 2_000


@dataclass(frozen=True)
class Case:
    """A Grant that may be given: for which terms and datasets, with which keys, and what it costs (nothing, again)."""

    terms: VerifiedTerms
    uses: tuple[OwnedUse, ...]
    content_keys: dict[bytes, ContentKey]
    charges: tuple[Charge, ...]
    given: tuple[VerifiedApproval, ...]


class KeyBroker:
    """One key broker. Its five operations take and return wire bytes; they raise errors of the tree."""

    def __init__(
        self,
        party: Party,
        database: State,
        seeds: SeedSecrets,
        *,
        clock: Callable[[], int],
        limits: Limits | None = None,
        crl: Callable[[Evidence], bytes | None] = lambda _: None,
        hear_time: Callable[[int], None] = lambda _: None,
        back_up: Callable[[int], tuple[str, int]] | None = None,
    ) -> None:
        """``clock`` tells Unix ms; ``crl`` the revocation list (DER) that evidence is checked against.

        ``hear_time`` is told what time an owner's officer says it is, where the clock is not the owners' own. ``back_up``
        copies the state, and tells the copy's name and how many audit entries it has.
        """
        self._party = party
        self._database = database
        self._seeds = seeds
        self._clock = clock
        self._limits = limits or Limits()
        self._crl = crl
        self._hear_time = hear_time
        self._back_up_to = back_up
        self._chains = ChainCache()
        with database.transaction() as tx:
            self._nonce_key = nonces.load_key(tx)

    # --- precheck -----------------------------------------------------------------------------------------------------

    def precheck(self, payload: bytes) -> bytes:
        """``Signed[PrecheckAnswer]`` to a :class:`PrecheckRequest`: an opinion, which holds nothing.

        1. A submission that was answered before gets the same answer.
        2. The submitter is authenticated and the routing theirs. What fails before here is answered by an error.
        3. The job is judged; what fails here is a refusal, in words for the submitter alone. Where all is well but for
           approvals, that is said, and the terms wait for people: it is judged anew when it is asked again.
        4. Answer, terms and audit entry are kept.
        """
        now = self._clock()
        request = decode(PrecheckRequest, payload)
        if (known := self._known_answer(request.submission.routing, now)) is not None:  # 1
            return known
        submitter, routing = prechecks.authenticate(request.submission, self._party, now)  # 2
        terms: Signed | None = None
        refusal: CasemateError | None = None
        try:
            terms, missing = self._judge(request, routing, submitter, now)  # 3
        except _NO_DECISION:
            raise
        except CasemateError as error:
            refusal = error
        else:
            if missing is not None:
                return self._wait(terms, routing, submitter, missing, now)
        answer = self._precheck_answer(routing, submitter, refusal, now)
        entry = AuditEntry(
            key_broker=self._party.id,
            event="prechecked" if refusal is None else "refused",
            at=now,
            subject=routing.job_id,
            terms=routing.terms,
            reason=None if refusal is None else refusal.reason,
            person=full_name(submitter),
        )
        return self._keep_answer(request, terms, answer, entry)  # 4

    def _known_answer(self, routing: Signed, now: int) -> bytes | None:
        with self._database.transaction() as tx:
            if (known := known_terms.find_answer(tx, routing.digest)) is None:
                known_terms.check_rate(tx, routing.signer, now=now, max_per_day=self._limits.max_submissions_per_day)
            return known

    def _keep_answer(self, request: PrecheckRequest, terms: Signed | None, answer: bytes, entry: AuditEntry) -> bytes:
        """Keeps what was decided, unless the same request was decided at the same time: then that answer counts."""
        routing = request.submission.routing
        with self._database.transaction() as tx:
            anchor.check_current(tx)
            if (known := known_terms.find_answer(tx, routing.digest)) is not None:
                return known
            known_terms.store_answer(tx, routing, answer, entry.at)
            approvals.forget_waiting(tx, routing.peek(Routing).terms, request.submission.delegation.peek(Delegation))
            if terms is not None:
                known_terms.check_new(tx, terms.digest)
                is_ours = routing.peek(Routing).job_key_broker == self._party.id
                known_terms.accept(tx, routing, terms, request.job_head if is_ours else None)
            audit_log.append(tx, entry)
        return answer

    def _wait(
        self, terms: Signed, routing: Routing, submitter: Delegation, missing: ApprovalMissingError, now: int
    ) -> bytes:
        """That approvals are missing: the same answer for as long as the same ones are."""
        with self._database.transaction() as tx:
            anchor.check_current(tx)
            if (known := approvals.find_answer(tx, terms.digest, str(missing))) is not None:
                return known
            answer = self._precheck_answer(routing, submitter, missing, now)
            approvals.keep_waiting(tx, terms, submitter, words=str(missing), answer=answer, now=now)
            return answer

    def _judge(
        self, request: PrecheckRequest, routing: Routing, submitter: Delegation, now: int
    ) -> tuple[Signed, ApprovalMissingError | None]:
        """The terms, if this key broker says yes to them, or will once there are approvals. Raises what it says no for."""
        signed = prechecks.open_terms(request.submission, routing, submitter, self._party)
        verified = prechecks.verified_terms(signed, self._party)
        prechecks.check_routing(verified, routing, submitter)
        prechecks.check_recipients(verified, self._party, now)
        prechecks.check_times(verified, now)
        if routing.job_key_broker == self._party.id:
            prechecks.check_job_head(request.job_head, routing, submitter, self._party)
        plan = verified.terms.plan
        with self._database.transaction() as tx:
            known_terms.check_new(tx, signed.digest)
            uses = prechecks.load_uses(tx, plan, self._party)
            given = approvals.in_force(tx, verified, self._party, now)
        prechecks.check_kept(uses)
        prechecks.check_named_licences(uses)
        prechecks.check_datasets(uses, plan)
        outcome = prechecks.check_licences(uses, verified, now, None, given)
        charges = prechecks.price(uses, plan)
        with self._database.transaction() as tx:
            for charge in charges:
                ledger.check_budget(tx, charge)
        try:
            check_outcome(outcome)
        except ApprovalMissingError as missing:
            return signed, missing
        return signed, None

    def _precheck_answer(
        self, routing: Routing, submitter: Delegation, refusal: CasemateError | None, now: int
    ) -> bytes:
        detail, is_refused = None, refusal is not None and not isinstance(refusal, ApprovalMissingError)
        if refusal is not None:
            detail = requests.seal_response(self._party, submitter, requests.refusal_of(refusal), now)
        answer = PrecheckAnswer(
            consortium=self._party.consortium.id,
            key_broker=self._party.id,
            job_id=routing.job_id,
            terms=routing.terms,
            decision="yes" if refusal is None else "refused" if is_refused else "awaiting",
            reason=refusal.reason if refusal is not None and is_refused else None,
            detail=detail,
            at=now,
        )
        return self._party.signed(answer)

    # --- nonce --------------------------------------------------------------------------------------------------------

    def nonce(self, payload: bytes) -> bytes:
        """:class:`NonceReply` to a :class:`NonceRequest` about terms that were answered yes and are still worth a worker.

        Anyone may ask, as often as they like, so nothing is kept or logged here: what the nonce is used for is.
        """
        now = self._clock()
        request = decode(NonceRequest, payload)
        with self._database.transaction() as tx:
            known = known_terms.find(tx, request.terms, request.job_id)
            if ledger.find_reservation(tx, request.terms) is None:
                prechecks.check_deadline(known.signed.peek(Terms), now)
        return encode(nonces.issue(self._nonce_key, request, now=now, ttl_ms=self._limits.nonce_ttl_ms))

    # --- grant --------------------------------------------------------------------------------------------------------

    def grant(self, payload: bytes) -> bytes:
        """``Signed[Grant]`` to a ``Signed[GrantRequest]``, with the content keys this job needs from here.

        1. The request is signed by the key in the claims.
        2. Our nonce in the claims is used up; it was given for this job, these terms and this attempt.
        3. The claims name this consortium at this manifest.
        4. The evidence is genuine. 5. It meets the manifest's policy, and the report vouches for these claims.
        6. The terms were answered yes, and the licences in force still allow them, on this measurement.
        7. Epsilon is reserved once for these terms, together with the worker's key and the audit entry,
        8. and content keys and seed share are sealed to the worker's attested sealing key: all of it, or nothing is charged.

        From 3 on, a refusal stands in the audit log.
        """
        now = self._clock()
        signed = decode(Signed, payload)
        evidence = signed.peek(GrantRequest).evidence
        claims = evidence.claims
        signed.verify(GrantRequest, claims.signing_key)  # 1
        with self._database.transaction() as tx:
            nonces.consume(tx, self._nonce_key, claims, key_broker=self._party.id, now=now)  # 2
        try:
            key_release.check_claims(claims, self._party)  # 3
            measurement = self._appraise(evidence, now)  # 4, 5
            case = self._judge_release(claims, measurement, now)  # 6
            grant = self._reserve(case, evidence, now)  # 7, 8
        except CasemateError as refusal:
            self._record_refusal(refusal, claims.job_id, now, terms=claims.terms, evidence=digest_of(evidence))
            raise
        for charge in case.charges:
            standings.catch_up(self._database, charge.lineage, STANDINGS_A_GRANT)
        return grant

    def _appraise(self, evidence: Evidence, now: int) -> bytes:
        """The measurement of a worker that is accepted; what became of its evidence is kept either way."""
        verdict = key_release.appraise_evidence(evidence, self._party, now, self._crl(evidence), self._chains)
        number = self._party.consortium.manifest.number
        with self._database.transaction() as tx:
            worker_verdicts.keep(tx, worker_verdicts.describe(evidence, verdict, manifest_number=number, now=now))
        return key_release.accepted_measurement(verdict)

    def _judge_release(self, claims: WorkerClaims, measurement: bytes, now: int) -> Case:
        """Whether keys may be given for the claimed terms, and what that costs if nothing is reserved for them yet.

        Content keys are opened already here, so that nothing is charged for keys that cannot be given. Terms that hold a
        commit were judged when they committed: no licence since then, and no erasure, takes their result back. Releasing it
        needs the seed share and the job's own key, so that no dataset's key is given any more.
        """
        with self._database.transaction() as tx:
            known = known_terms.find(tx, claims.terms, claims.job_id)
            is_committed = ledger.committed_result(tx, claims.terms) is not None
            verified = prechecks.verified_terms(known.signed, self._party, is_committed=is_committed)
            plan = verified.terms.plan
            uses = prechecks.load_uses(tx, plan, self._party)
            given = approvals.in_force(tx, verified, self._party, now)
            if is_committed:
                own_key = key_release.open_content_keys(key_release.load_job_head(known, self._party))
                return Case(verified, uses, own_key, charges=(), given=given)
            prechecks.check_kept(uses)
            envelopes = key_release.load_heads(tx, known, uses, self._party)
            is_charged = ledger.find_reservation(tx, claims.terms) is not None
        check_outcome(prechecks.check_licences(uses, verified, now, measurement, given))
        content_keys = key_release.open_content_keys(envelopes)
        if is_charged:
            return Case(verified, uses, content_keys, charges=(), given=given)
        prechecks.check_times(verified, now)
        prechecks.check_datasets(uses, plan)
        return Case(verified, uses, content_keys, charges=prechecks.price(uses, plan), given=given)

    def _reserve(self, case: Case, evidence: Evidence, now: int) -> bytes:
        """The Grant, with the charge, if it is the first for these terms, the worker's key and the audit entry; or none of it."""
        claims, submitter = evidence.claims, full_name(case.terms.submitter)
        entry = AuditEntry(
            key_broker=self._party.id,
            event="granted",
            at=now,
            subject=claims.job_id,
            terms=claims.terms,
            evidence=digest_of(evidence),
            person=submitter,
        )
        with self._database.transaction() as tx:
            anchor.check_current(tx)
            if prechecks.load_uses(tx, case.terms.terms.plan, self._party) != case.uses:
                raise UnavailableError("a licence or a dataset changed while the job was judged; ask again")
            for owned in case.uses:
                if owned.use.envelope in case.content_keys:
                    dataset_keys.load(tx, owned.use.envelope, owned.use.dataset)
            if approvals.in_force(tx, case.terms, self._party, now) != case.given:
                raise UnavailableError("somebody spoke about the job while it was judged; ask again")
            reservation = ledger.reserve(
                tx,
                job_id=claims.job_id,
                terms=claims.terms,
                submitter=submitter,
                purpose=case.terms.terms.plan.purpose,
                deadline=case.terms.terms.deadline,
                epoch=self._seeds.epoch,
                charges=case.charges,
                now=now,
            )
            known_terms.record_worker(tx, claims, digest_of(evidence), now)
            audit_log.append(tx, entry)
            committed = ledger.committed_result(tx, claims.terms)
            decision = Decision(reservation, ledger.head(tx), committed, case.content_keys)
            share = self._seeds.share(reservation.entry.epoch, claims.terms)
            ttl_ms = self._limits.grant_ttl_ms
            return key_release.seal_grant(
                decision, evidence, case.uses, self._party, seed_share=share, now=now, ttl_ms=ttl_ms
            )

    # --- commit -------------------------------------------------------------------------------------------------------

    def commit(self, payload: bytes) -> bytes:
        """``Signed[CommitReceipt]`` to a ``Signed[CommitRequest]``: this result for these terms, for ever.

        1. The request is signed by a key that was given a Grant for these terms and this attempt.
        2. The first key broker of the terms has committed this very result, or is this one.
        3. No other result holds the commit. The receipt proves that the commit stands in the audit log.
        """
        now = self._clock()
        signed = decode(Signed, payload)
        request = signed.verify(CommitRequest, signed.signer)
        with self._database.transaction() as tx:  # 1
            known = known_terms.find(tx, request.terms, request.job_id)
            if not known_terms.holds_grant(tx, request.terms, request.attempt, signed.signer):
                raise AuthenticationError("this key holds no Grant for these terms and this attempt")
        try:
            commits.check_first_receipt(request, known.signed.peek(Terms), self._party)  # 2
            with self._database.transaction() as tx:
                anchor.check_current(tx)
                return commits.commit(tx, request, self._party, now)  # 3
        except CasemateError as refusal:
            self._record_refusal(refusal, request.job_id, now, terms=request.terms, result=request.result)
            raise

    # --- message ------------------------------------------------------------------------------------------------------

    def message(self, payload: bytes) -> bytes:
        """A ``response`` envelope to a person's ``request`` envelope. Refusals are told to that person alone."""
        now = self._clock()
        request, person = requests.open_request(payload, self._party, now)
        try:
            self._check_request(request)
            body = requests.check_size(self._answer_person(request, person, now))
        except RolledBackError as error:
            body = requests.refusal_of(error)
        except _NO_DECISION:
            raise
        except CasemateError as error:
            body = requests.refusal_of(error)
        response = PersonResponse(id=request.id, head=self._signed_head(now), body=body)
        return requests.seal_response(self._party, person, response, now)

    def _check_request(self, request: PersonRequest) -> None:
        """Notes the head that the person has seen. Raises :class:`RolledBackError` for what would change a stale state."""
        with self._database.transaction() as tx:
            if request.seen is not None:
                anchor.observe(tx, self._party, request.seen)
            if not isinstance(request.body, requests.READING):
                anchor.check_current(tx)

    def _answer_person(self, request: PersonRequest, person: Delegation, now: int) -> requests.Answer:
        match request.body:
            case ListDatasets():
                with self._database.transaction() as tx:
                    return requests.list_datasets(tx, self._party, person, now)
            case ShowBudget():
                with self._database.transaction() as tx:
                    lineage = requests.lineage_of(tx, self._party, person, request.body.dataset)
                standings.catch_up(self._database, lineage, STANDINGS_A_BUDGET)
                with self._database.transaction() as tx:
                    return requests.show_budget(tx, self._party, person, request.body, now)
            case RenewBudget():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                    return licences.renew_budget(tx, self._party, person, request.body, now)
            case ListApprovals():
                with self._database.transaction() as tx:
                    return approvals.find_all(tx, self._party, person, now)
            case ShowApproval():
                return self._show_approval(request.body.terms, person, now)
            case GiveApproval():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                    job = approvals.find(tx, request.body.terms, self._party, person)
                    approvals.give(tx, request.body, job, self._party, person, request.delegation, now)
                return self._show_approval(request.body.terms, person, now)
            case ShowState():
                anchor.check_officer(self._party, person)
                with self._database.transaction() as tx:
                    return anchor.show(tx, self._party, now)
            case EndorseState():
                anchor.check_officer(self._party, person)
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                    return anchor.endorse(tx, self._party, person, request.body.ahead, now)
            case TellTime():
                return self._take_time(request, person)
            case ShowWorkers():
                with self._database.transaction() as tx:
                    return requests.show_workers(tx, self._party, person)
            case RegisterDataset():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                return self._register(request.body, person, now)
            case ShowDataset():
                with self._database.transaction() as tx:
                    return custody.show(tx, self._party, person, request.body)
            case PrepareDataset():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                    return custody.prepare(tx, self._party, person, request.body, now)
            case AmendLicence():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                return self._amend(request.body, person, now)
            case EraseDataset():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                    erased = custody.erase(tx, self._party, person, request.body, now)
                self._database.scrub()
                return erased
            case RotateSeeds():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                return self._rotate_seeds(person, now)
            case BackUpState():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                return self._back_up(person, now)

    def _show_approval(self, terms: bytes, person: Delegation, now: int) -> ApprovalShown:
        with self._database.transaction() as tx:
            job = approvals.find(tx, terms, self._party, person)
        charges = prechecks.price(job.uses, job.terms.terms.plan)
        with self._database.transaction() as tx:
            return approvals.show(tx, job, charges, self._party, now)

    def _take_time(self, request: PersonRequest, person: Delegation) -> TimeTold:
        anchor.check_officer(self._party, person)
        self._hear_time(request.created)
        with self._database.transaction() as tx:
            set_meta(tx, "time-told", max(request.created, get_meta(tx, "time-told") or 0))
        return TimeTold(at=self._clock())

    def _register(self, registration: RegisterDataset, person: Delegation, now: int) -> requests.Answer:
        try:
            with self._database.transaction() as tx:
                licence = licences.check_registration(tx, self._party, registration, person, now)
            with self._database.transaction() as tx:
                registered = licences.register(tx, registration, licence, person, now)
                entry = AuditEntry(
                    key_broker=self._party.id,
                    event="registered",
                    at=now,
                    subject=registration.card.id,
                    person=full_name(person),
                    envelope=registered.envelope,
                    licence=registered.licence,
                )
                audit_log.append(tx, entry)
                return registered
        except CasemateError as refusal:
            self._record_refusal(refusal, registration.card.id, now, person=full_name(person))
            raise

    def _amend(self, request: AmendLicence, person: Delegation, now: int) -> LicenceAmended:
        licence = licences.check_licence(request.licence, person, now)
        try:
            licences.check_steward(self._party, person, licence.dataset.partition("@")[2])
            with self._database.transaction() as tx:
                return custody.amend(tx, self._party, person, request, licence, now)
        except CasemateError as refusal:
            self._record_refusal(refusal, licence.dataset, now, person=full_name(person))
            raise

    def _rotate_seeds(self, person: Delegation, now: int) -> SeedsRotated:
        """The new secret is on the disk before anything is reserved under it; it is used even if its entry is lost."""
        anchor.check_officer(self._party, person)
        epoch = self._seeds.rotate()
        self._record(person, now, event="seeds_rotated", subject=f"epoch {epoch}")
        return SeedsRotated(epoch=epoch)

    def _back_up(self, person: Delegation, now: int) -> StateBackedUp:
        anchor.check_officer(self._party, person)
        if self._back_up_to is None:
            raise SetupError("this key broker has no backup_dir: set one, or copy what docs/key-broker.md names")
        name, size = self._back_up_to(now)
        self._record(person, now, event="backed_up", subject=name)
        return StateBackedUp(name=name, audit_size=size)

    def _record(self, person: Delegation, now: int, **fields: str) -> None:
        about = {"key_broker": self._party.id, "at": now, "person": full_name(person)} | fields
        with self._database.transaction() as tx:
            audit_log.append(tx, AuditEntry.model_validate(about))

    # --- anchor -------------------------------------------------------------------------------------------------------

    def head(self) -> bytes:
        """``Signed[LedgerHead]``: where the state stands now, to be anchored before an answer leaves.

        Raises :class:`RolledBackError` if a newer one is known.
        """
        with self._database.transaction() as tx:
            anchor.check_current(tx)
            return self._party.signed(anchor.head(tx, self._party, self._clock()))

    def observe(self, payload: bytes) -> None:
        """A ``Signed[LedgerHead]`` that was anchored. If it is not of this state's past, no keys are given from now on.

        Raises :class:`MalformedError` or :class:`AuthenticationError` for what this key broker did not sign.
        """
        signed = decode(Signed, payload)
        with self._database.transaction() as tx:
            anchor.observe(tx, self._party, signed)

    def _signed_head(self, now: int) -> Signed:
        with self._database.transaction() as tx:
            return sign(anchor.head(tx, self._party, now), self._party.keys.signing)

    def _record_refusal(
        self,
        refusal: CasemateError,
        subject: str,
        now: int,
        *,
        terms: bytes | None = None,
        evidence: bytes | None = None,
        result: bytes | None = None,
        person: str | None = None,
    ) -> None:
        """Into the audit log, unless the error decided nothing."""
        if isinstance(refusal, _NO_DECISION):
            return
        entry = AuditEntry(
            key_broker=self._party.id,
            event="refused",
            at=now,
            subject=subject,
            terms=terms,
            evidence=evidence,
            result=result,
            reason=refusal.reason,
            person=person,
        )
        with self._database.transaction() as tx:
            audit_log.append(tx, entry)
