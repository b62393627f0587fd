"""The road of each request, from bytes to bytes. Every function here may run in any thread, beside others.

What is decided and its audit entry are one transaction, on the disk before the answer is returned; asking again gets the
same answer. So a key broker may be killed anywhere: what it answered stands, and what it did not answer can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from casemate_schemas.admission import PrecheckAnswer, PrecheckRequest, Routing
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.errors import AuthenticationError, CasemateError, IntegrityError, UnavailableError
from casemate_schemas.evidence import Evidence, WorkerClaims
from casemate_schemas.grant import AuditEntry, CommitRequest, GrantRequest, NonceRequest
from casemate_schemas.identity import Delegation
from casemate_schemas.requests import ListDatasets, PersonRequest, PersonResponse, RegisterDataset, ShowBudget
from casemate_schemas.sealing import ContentKey
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import Terms, VerifiedTerms

from . import audit_log, commits, key_release, known_terms, ledger, licences, nonces, prechecks, requests
from .database import Database
from .key_release import Decision
from .ledger import Charge
from .party import Party, full_name
from .prechecks import OwnedUse
from .seed_shares import SeedSecrets

_NO_DECISION = (IntegrityError, UnavailableError)
"""Errors that say nothing about what was asked: they are never an answer, and never stored as one."""


@dataclass(frozen=True)
class Limits:
    """What keeps one asker from crowding out the others, and how long what is given out is good."""

    nonce_ttl_ms: int = 120_000
    max_outstanding_nonces: int = 16
    grant_ttl_ms: int = 600_000
    max_submissions_per_day: int = 2_000


@dataclass(frozen=True)
class Case:
    """A Grant that may be given: for which terms and datasets, with which keys, and what it costs (nothing, again)."""

    terms: VerifiedTerms
    uses: tuple[OwnedUse, ...]
    content_keys: dict[bytes, ContentKey]
    charges: tuple[Charge, ...]


class KeyBroker:
    """One key broker. Its five operations take and return wire bytes; they raise errors of the tree."""

    def __init__(
        self,
        party: Party,
        database: Database,
        seeds: SeedSecrets,
        *,
        clock: Callable[[], int],
        limits: Limits | None = None,
        crl: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """``clock`` tells Unix ms; ``crl`` the newest revocation list that there is (DER)."""
        self._party = party
        self._database = database
        self._seeds = seeds
        self._clock = clock
        self._limits = limits or Limits()
        self._crl = crl

    # --- precheck -----------------------------------------------------------------------------------------------------

    def precheck(self, payload: bytes) -> bytes:
        """``Signed[PrecheckAnswer]`` to a :class:`PrecheckRequest`: an opinion, which holds nothing.

        1. A submission that was answered before gets the same answer.
        2. The submitter is authenticated and the routing theirs. What fails before here is answered by an error.
        3. The job is judged; what fails here is a refusal, in words for the submitter alone.
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
            terms = self._judge(request, routing, submitter, now)  # 3
        except _NO_DECISION:
            raise
        except CasemateError as error:
            refusal = error
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
            if (known := known_terms.find_answer(tx, routing.digest)) is not None:
                return known
            known_terms.store_answer(tx, routing, answer, entry.at)
            if terms is not None:
                known_terms.check_new(tx, terms.digest)
                is_ours = routing.peek(Routing).job_key_broker == self._party.id
                known_terms.accept(tx, routing, terms, request.job_head if is_ours else None)
            audit_log.append(tx, entry)
        return answer

    def _judge(self, request: PrecheckRequest, routing: Routing, submitter: Delegation, now: int) -> Signed:
        """The terms, if this key broker says yes to them. Raises what it says no for."""
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
        prechecks.check_named_licences(uses)
        prechecks.check_datasets(uses, plan)
        prechecks.check_licences(uses, verified, now, measurement=None)
        charges = prechecks.price(uses, plan)
        with self._database.transaction() as tx:
            for charge in charges:
                ledger.check_budget(tx, charge)
        return signed

    def _precheck_answer(
        self, routing: Routing, submitter: Delegation, refusal: CasemateError | None, now: int
    ) -> bytes:
        detail = None
        if refusal is not None:
            detail = requests.seal_response(self._party, submitter, requests.refusal_of(refusal), now)
        answer = PrecheckAnswer(
            consortium=self._party.consortium.id,
            key_broker=self._party.id,
            job_id=routing.job_id,
            terms=routing.terms,
            decision="yes" if refusal is None else "refused",
            reason=None if refusal is None else refusal.reason,
            detail=detail,
            at=now,
        )
        return self._party.signed(answer)

    # --- nonce --------------------------------------------------------------------------------------------------------

    def nonce(self, payload: bytes) -> bytes:
        """:class:`NonceReply` to a :class:`NonceRequest` about terms that were answered yes and are still worth a worker.

        Anyone may ask, so nothing is logged here: what the nonce is used for is.
        """
        now = self._clock()
        request = decode(NonceRequest, payload)
        limits = self._limits
        with self._database.transaction() as tx:
            known = known_terms.find(tx, request.terms, request.job_id)
            if ledger.find_reservation(tx, request.terms) is None:
                prechecks.check_deadline(known.signed.peek(Terms), now)
            reply = nonces.issue(
                tx, request, now=now, ttl_ms=limits.nonce_ttl_ms, max_outstanding=limits.max_outstanding_nonces
            )
        return encode(reply)

    # --- grant --------------------------------------------------------------------------------------------------------

    def grant(self, payload: bytes) -> bytes:
        """``Signed[Grant]`` to a ``Signed[GrantRequest]``, with the content keys this job needs from here.

        1. The request is signed by the key in the claims.
        2. Our nonce in the claims is used up; it was given for this job, these terms and this attempt.
        3. The claims name this consortium at this manifest.
        4. The evidence is genuine. 5. It meets the manifest's policy, and the report vouches for these claims.
        6. The terms were answered yes, and the licences in force still allow them, on this measurement.
        7. Epsilon is reserved once for these terms, together with the worker's key and the audit entry.
        8. Content keys and seed share are sealed to the worker's attested sealing key.

        From 3 on, a refusal stands in the audit log.
        """
        now = self._clock()
        signed = decode(Signed, payload)
        evidence = signed.peek(GrantRequest).evidence
        claims = evidence.claims
        signed.verify(GrantRequest, claims.signing_key)  # 1
        with self._database.transaction() as tx:
            nonces.consume(tx, claims, key_broker=self._party.id, now=now)  # 2
        try:
            key_release.check_claims(claims, self._party)  # 3
            measurement = key_release.appraise_evidence(evidence, self._party, now, self._crl())  # 4, 5
            case = self._judge_release(claims, measurement, now)  # 6
            decision = self._reserve(case, evidence, now)  # 7
        except CasemateError as refusal:
            self._record_refusal(refusal, claims.job_id, now, terms=claims.terms, evidence=digest_of(evidence))
            raise
        share = self._seeds.share(decision.reservation.entry.epoch, claims.terms)
        return key_release.seal_grant(  # 8
            decision, evidence, case.uses, self._party, seed_share=share, now=now, ttl_ms=self._limits.grant_ttl_ms
        )

    def _judge_release(self, claims: WorkerClaims, measurement: bytes, now: int) -> Case:
        """Whether keys may be given for the claimed terms, and what that costs if nothing is reserved for them yet.

        Content keys are opened already here, so that nothing is charged for keys that cannot be given.
        """
        with self._database.transaction() as tx:
            known = known_terms.find(tx, claims.terms, claims.job_id)
            verified = prechecks.verified_terms(known.signed, self._party)
            plan = verified.terms.plan
            uses = prechecks.load_uses(tx, plan, self._party)
            heads = key_release.load_heads(tx, known, uses)
            is_charged = ledger.find_reservation(tx, claims.terms) is not None
        prechecks.check_licences(uses, verified, now, measurement)
        content_keys = key_release.open_content_keys(heads, self._party)
        if is_charged:
            return Case(verified, uses, content_keys, charges=())
        prechecks.check_times(verified, now)
        prechecks.check_datasets(uses, plan)
        return Case(verified, uses, content_keys, charges=prechecks.price(uses, plan))

    def _reserve(self, case: Case, evidence: Evidence, now: int) -> Decision:
        """The charge, if it is the first Grant for these terms, the worker's key and the audit entry, or none of it."""
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
            if prechecks.load_uses(tx, case.terms.terms.plan, self._party) != case.uses:
                raise UnavailableError("a licence or a dataset changed while the job was judged; ask again")
            reservation = ledger.reserve(
                tx,
                job_id=claims.job_id,
                terms=claims.terms,
                submitter=submitter,
                epoch=self._seeds.epoch,
                charges=case.charges,
                now=now,
            )
            known_terms.record_worker(tx, claims, digest_of(evidence), now)
            audit_log.append(tx, entry)
            committed = ledger.committed_result(tx, claims.terms)
            return Decision(reservation, ledger.head(tx), committed, case.content_keys)

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
            body = requests.check_size(self._answer_person(request, person, now))
        except _NO_DECISION:
            raise
        except CasemateError as error:
            body = requests.refusal_of(error)
        return requests.seal_response(self._party, person, PersonResponse(id=request.id, body=body), now)

    def _answer_person(self, request: PersonRequest, person: Delegation, now: int) -> requests.Answer:
        match request.body:
            case ListDatasets():
                with self._database.transaction() as tx:
                    return requests.list_datasets(tx, self._party, person, now)
            case ShowBudget():
                with self._database.transaction() as tx:
                    return requests.show_budget(tx, self._party, person, request.body)
            case RegisterDataset():
                with self._database.transaction() as tx:
                    requests.use_once(tx, request, person, now)
                return self._register(request.body, person, now)

    def _register(self, registration: RegisterDataset, person: Delegation, now: int) -> requests.Answer:
        try:
            licence = licences.check_registration(self._party, registration, person, now)
            with self._database.transaction() as tx:
                registered = licences.register(tx, registration, licence, person, now)
                entry = AuditEntry(
                    key_broker=self._party.id,
                    event="registered",
                    at=now,
                    subject=registration.card.id,
                    person=full_name(person),
                )
                audit_log.append(tx, entry)
                return registered
        except CasemateError as refusal:
            self._record_refusal(refusal, registration.card.id, now, person=full_name(person))
            raise

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
