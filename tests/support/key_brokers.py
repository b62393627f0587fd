"""Key brokers in this process, and everyone who talks to them: a steward, a scientist, attested workers.

A :class:`Bench` holds a consortium of clara's lab and two hospitals with a simulated chip; every message on the road can
be made rightly by one call, and wrongly by changing one argument.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedChip, SimulatedKeys
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.clock import MonotoneClock
from casemate_key_broker.database import Database, State
from casemate_key_broker.hosted import STATE_KEY_CONTEXT, own_keys
from casemate_key_broker.party import Party, pin_consortium
from casemate_key_broker.sealed_database import SealedDatabase
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_key_broker.service import KeyBroker as Service
from casemate_key_broker.service import Limits
from casemate_schemas.admission import PrecheckAnswer, PrecheckRequest, Routing, Submission
from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.consortium import (
    Consortium,
    ConsortiumManifest,
    KeyBroker,
    ManifestChain,
    Member,
    sign_manifest,
    verify_chain,
)
from casemate_schemas.custody import DatasetPrepared, PrepareDataset
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, WorkerClaims
from casemate_schemas.grant import (
    CommitReceipt,
    CommitRequest,
    Grant,
    GrantRequest,
    GrantSecrets,
    NonceReply,
    NonceRequest,
    grant_info,
)
from casemate_schemas.identity import Delegation, Role
from casemate_schemas.job import SGD, DatasetUse, Plan, Privacy, Rational, Training
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import (
    AllOf,
    ForPurpose,
    Licence,
    MemberIs,
    Permission,
    RoleIs,
    Rule,
)
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.requests import DatasetRegistered, PersonRequest, PersonResponse, Refusal, RegisterDataset
from casemate_schemas.sealing import open_envelope, seal_envelope
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms

MEASUREMENT = b"\x4d" * 48
KEY_BROKER_MEASUREMENT = b"\x4b" * 48
DAY_MS = 24 * 3600 * 1000
MEMBERS = ("clara", "north", "south")
PURPOSE = "research"


@functools.cache
def authority() -> SimulatedAuthority:
    """One hierarchy for the whole run: its RSA keys take seconds."""
    return SimulatedAuthority(SimulatedKeys.generate())


@functools.cache
def chip() -> SimulatedChip:
    """One simulated chip under it."""
    return authority().issue_chip()


@dataclass
class Clock:
    """Unix ms that only tests move. It starts now, since certificates are made now."""

    now: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1000)


@dataclass(frozen=True)
class Person:
    """Keys and the member's word for them."""

    keys: KeyRing
    delegation: Signed


@dataclass(frozen=True)
class Dataset:
    """A registered dataset as scientists use it."""

    card: DatasetCard
    licence: Licence
    head: bytes
    envelope: bytes
    key_broker: str

    def use(self, **changed: Any) -> DatasetUse:
        fields: dict[str, Any] = {
            "dataset": self.card.id,
            "envelope": self.envelope,
            "card": digest_of(self.card),
            "licence": digest_of(self.licence),
            "key_broker": self.key_broker,
            "row_bound": self.card.row_bound,
            "sample_rate": Rational.of(Fraction(1, 8)),
        }
        return DatasetUse(**(fields | changed))


@dataclass(frozen=True)
class Job:
    """A submission with all that stands behind it."""

    terms: Terms
    signed_terms: Signed
    routing: Routing
    precheck: PrecheckRequest

    @property
    def digest(self) -> bytes:
        return self.signed_terms.digest


@dataclass
class Worker:
    """One attempt: fresh keys."""

    job: Job
    attempt: int = 1
    keys: KeyRing = field(default_factory=KeyRing.generate)

    def claims(self, within: Consortium, nonces: dict[str, bytes], **changed: Any) -> WorkerClaims:
        fields: dict[str, Any] = {
            "consortium": within.id,
            "manifest": within.digest,
            "job_id": self.job.terms.job_id,
            "terms": self.job.digest,
            "attempt": self.attempt,
            "sealing_key": self.keys.sealing.public,
            "signing_key": self.keys.signing.public,
            "nonces": tuple(KeyBrokerNonce(key_broker=name, nonce=nonces[name]) for name in sorted(nonces)),
        }
        return WorkerClaims(**(fields | changed))

    def evidence(self, claims: WorkerClaims, measurement: bytes = MEASUREMENT) -> Evidence:
        return Evidence(claims=claims, components=(chip().launch(measurement).attest(claims.report_data),))

    def request(self, evidence: Evidence) -> bytes:
        return encode(sign(GrantRequest(evidence=evidence), self.keys.signing))

    def commit(self, result: bytes, first_receipt: bytes | None = None, **changed: Any) -> bytes:
        fields: dict[str, Any] = {
            "job_id": self.job.terms.job_id,
            "terms": self.job.digest,
            "attempt": self.attempt,
            "result": result,
            "first_receipt": None if first_receipt is None else decode(Signed, first_receipt),
        }
        return encode(sign(CommitRequest(**(fields | changed)), self.keys.signing))


class Bench:
    """The consortium, its key brokers (opened on first use), and its people."""

    def __init__(
        self,
        folder: Path,
        limits: Limits | None = None,
        *,
        hosted: Collection[str] = (),
        key_broker_image: bytes = KEY_BROKER_MEASUREMENT,
    ) -> None:
        """``hosted`` key brokers run in enclaves of the simulated chip, since the second manifest."""
        self.folder = folder
        self.key_broker_image = key_broker_image
        self.clock = Clock()
        self.limits = limits
        self.members = {name: KeyRing.generate() for name in MEMBERS}
        self.key_brokers = {name: KeyRing.generate() for name in MEMBERS}
        self.chain = ManifestChain(manifests=(self._manifest(),))
        self.consortium = verify_chain(self.chain)
        self.hosted = frozenset(hosted)
        if hosted:
            self._move_into_enclaves()
        self.clara = self.person("clara", "clara", ("scientist",))
        self.stewards = {name: self.person(name, "nora", ("steward",)) for name in ("north", "south")}
        self.open_state: Callable[[Path], State] = Database
        """How key brokers keep their state."""
        self.revoked: dict[tuple[str, str], int] = {}
        self._open: dict[str, tuple[State, Service]] = {}

    # --- parties ------------------------------------------------------------------------------------------------------

    def broker(self, name: str) -> Service:
        """The running key broker of a member."""
        if name not in self._open:
            database, clock = self._state(name)
            with database.transaction() as tx:
                ledger.verify(tx)
                audit_log.verify(tx)
            consortium = pin_consortium(database, name, self.consortium.id, self.chain, self.clock())
            consortium = replace(consortium, revoked=self.revoked)
            seeds = (
                SeedSecrets.in_state(database) if name in self.hosted else SeedSecrets(self.folder / name, needed=set())
            )
            party = Party(name, self.key_brokers[name], consortium)
            self._open[name] = (
                database,
                Service(
                    party,
                    database,
                    seeds,
                    clock=clock,
                    limits=self.limits,
                    hear_time=getattr(clock, "raise_to", lambda _: None),
                ),
            )
        return self._open[name][1]

    def database(self, name: str) -> State:
        self.broker(name)
        return self._open[name][0]

    def restart(self, name: str) -> Service:
        """Closes the key broker and opens its state again."""
        self.close(name)
        return self.broker(name)

    def close(self, *names: str) -> None:
        for name in names or tuple(self._open):
            self._open.pop(name)[0].close()

    def amend(self, *adopted_by: str, **changed: Any) -> None:
        """One more manifest with the ``changed`` fields; those named (all that are open, if none is) go on under it."""
        before = self.consortium
        fields = {**dict(before.manifest), "number": before.manifest.number + 1, "previous": before.digest, **changed}
        keys = {name: keys.signing for name, keys in self.members.items()}
        signed = sign_manifest(ConsortiumManifest(**fields), keys)
        self.chain = ManifestChain(manifests=(*self.chain.manifests, signed))
        self.consortium = verify_chain(self.chain)
        for name in adopted_by or tuple(self._open):
            self.restart(name)

    def revoke(self, member: str, person: str) -> None:
        """All key brokers that are open have heard that the person's delegations so far count no longer."""
        self.revoked = {**self.revoked, (member, person): self.clock()}
        for name in tuple(self._open):
            self.restart(name)

    def policy(self, **changed: Any) -> dict[str, Any]:
        """The manifest's attestation policy with some fields changed, as :meth:`amend` wants it."""
        return {"attestation": AttestationPolicy(**dict(self.consortium.manifest.attestation) | changed)}

    def person(
        self, member: str, name: str, roles: tuple[Role, ...], *, days: int = 30, begins: int | None = None
    ) -> Person:
        keys = KeyRing.generate()
        begins = self.clock() - DAY_MS if begins is None else begins
        delegation = Delegation(
            consortium=self.consortium.id,
            member=member,
            person=name,
            signing_key=keys.signing.public,
            sealing_key=keys.sealing.public,
            roles=roles,
            not_before=begins,
            expires=begins + days * DAY_MS,
        )
        return Person(keys, sign(delegation, self.members[member].signing))

    def _state(self, name: str) -> tuple[State, Callable[[], int]]:
        if name not in self.hosted:
            return self.open_state(self.folder / name), self.clock
        clock = MonotoneClock(self.clock)
        key = chip().launch(self.key_broker_image).derive_key(STATE_KEY_CONTEXT)
        return SealedDatabase(self.folder / name, key, clock), clock

    def _move_into_enclaves(self) -> None:
        """The hosted key brokers make their keys, and the members put those into the next manifest."""
        made = {}
        for name in self.hosted:
            database, _ = self._state(name)
            pin_consortium(database, name, self.consortium.id, self.chain, self.clock())
            made[name] = own_keys(database)
            database.close()
        self.list_hosted(made)

    def list_hosted(self, keys: Mapping[str, Any]) -> None:
        """The second manifest, in which these key brokers run in enclaves. Of their ``keys`` the public ones are enough."""
        self.hosted = frozenset(keys)
        self.key_brokers |= keys
        following = self._manifest(number=2, previous=self.consortium.digest)
        self.chain = ManifestChain(manifests=(*self.chain.manifests, following))
        self.consortium = verify_chain(self.chain)

    def _manifest(self, *, number: int = 1, previous: bytes | None = None) -> Any:
        policy = AttestationPolicy(
            simulation=True,
            products=(AcceptedProduct(product=chip().facts.product, ark_sha256=(chip().root.ark_sha256,)),),
            measurements=(MEASUREMENT, b"\x4e" * 48),
            key_broker_measurements=(self.key_broker_image,),
        )
        manifest = ConsortiumManifest(
            number=number,
            previous=previous,
            name="clara's lab and two hospitals",
            members=tuple(
                Member(id=name, name=name, signing_key=keys.signing.public, sealing_key=keys.sealing.public)
                for name, keys in self.members.items()
            ),
            key_brokers=tuple(
                KeyBroker(
                    id=name,
                    serves=(name,),
                    hosted="enclave" if number > 1 and name in self.hosted else "member",
                    signing_key=keys.signing.public,
                    sealing_key=keys.sealing.public,
                )
                for name, keys in self.key_brokers.items()
            ),
            attestation=policy,
            quorum=2,
            created=self.clock(),
        )
        return sign_manifest(manifest, {name: keys.signing for name, keys in self.members.items()})

    # --- owners -------------------------------------------------------------------------------------------------------

    def card(self, owner: str = "north", name: str = "cardio", **changed: Any) -> DatasetCard:
        columns = (
            Column(name="age", dtype="float32", lower=0.0, upper=120.0),
            Column(name="outcome", dtype="int64", lower=0.0, upper=1.0),
        )
        return DatasetCard(**({"name": name, "owner": owner, "columns": columns, "row_bound": 200} | changed))

    def permissions(self, **rules: Rule | None) -> tuple[Permission, ...]:
        """Scientists may list, clara may train for research and read; some rules replaced, or left out if None."""
        usual: dict[Any, Rule | None] = {
            "list": RoleIs(principal="submitter", role="scientist"),
            "train": AllOf(rules=(MemberIs(principal="submitter", member="clara"), ForPurpose(purpose=PURPOSE))),
            "read_result": MemberIs(principal="recipient", member="clara"),
            "read_metrics": MemberIs(principal="recipient", member="clara"),
        }
        merged = usual | rules
        return tuple(Permission(action=action, rule=rule) for action, rule in merged.items() if rule is not None)

    def licence(self, dataset: str, **changed: Any) -> Licence:
        fields: dict[str, Any] = {
            "number": 1,
            "dataset": dataset,
            "permissions": self.permissions(),
            "epsilon": 3.0,
            "epsilon_per_job": 2.0,
            "delta": 1e-4,
            "expires": self.clock() + 30 * DAY_MS,
        }
        return Licence(**(fields | changed))

    def prepared(self, owner: str = "north") -> bytes:
        """A sealing key for one more dataset version."""
        answer = self.ask(owner, self.stewards[owner], PrepareDataset(owner=owner))
        assert isinstance(answer, DatasetPrepared), answer
        return answer.sealing_key

    def seal_dataset(self, owner: str = "north", *, by: Person | None = None, to: bytes | None = None) -> bytes:
        """Signed head of a new dataset envelope, sealed to the key that the owner's key broker prepares, or to another."""
        envelope = seal_envelope(
            "dataset",
            os.urandom(64),
            (to or self.prepared(owner),),
            consortium=self.consortium.id,
            key=(by or self.stewards[owner]).keys.signing,
            created=self.clock(),
        )
        return bytes(split_envelope(envelope, max_bytes=1 << 20)[0])

    def dataset(
        self, owner: str = "north", name: str = "cardio", *, head: bytes | None = None, **licence: Any
    ) -> Dataset:
        """A dataset ready to be registered."""
        card = self.card(owner, name)
        head = head or self.seal_dataset(owner)
        return Dataset(card, self.licence(card.id, **licence), head, open_head(head).header.digest, owner)

    def registration(self, dataset: Dataset, **changed: Any) -> RegisterDataset:
        signed = sign(dataset.licence, self.stewards[dataset.card.owner].keys.signing)
        return RegisterDataset(**({"card": dataset.card, "licence": signed, "head": dataset.head} | changed))

    def register(self, owner: str = "north", name: str = "cardio", **licence: Any) -> Dataset:
        dataset = self.dataset(owner, name, **licence)
        answer = self.ask(owner, self.stewards[owner], self.registration(dataset))
        assert isinstance(answer, DatasetRegistered), answer
        return dataset

    # --- people -------------------------------------------------------------------------------------------------------

    def request(self, broker: str, person: Person, body: Any, **changed: Any) -> bytes:
        """A sealed request to a key broker."""
        fields: dict[str, Any] = {
            "consortium": self.consortium.id,
            "key_broker": broker,
            "id": os.urandom(16),
            "created": self.clock(),
            "delegation": person.delegation,
            "body": body,
        }
        return seal_envelope(
            "request",
            encode(PersonRequest(**(fields | changed))),
            (self.key_brokers[broker].sealing.public,),
            consortium=self.consortium.id,
            key=person.keys.signing,
            created=self.clock(),
        )

    def answer(self, broker: str, person: Person, response: bytes) -> Any:
        """The body of a sealed response."""
        _, plaintext = open_envelope(
            response,
            person.keys.sealing,
            kind="response",
            consortium=self.consortium.id,
            sender=self.key_brokers[broker].signing.public,
            max_bytes=1 << 20,
        )
        return decode(PersonResponse, plaintext).body

    def ask(self, broker: str, person: Person, body: Any) -> Any:
        response = self.broker(broker).message(self.request(broker, person, body))
        return self.answer(broker, person, response)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def plan(self, *uses: DatasetUse, training: dict[str, Any] | None = None, **changed: Any) -> Plan:
        settings: dict[str, Any] = {
            "loss": "binary_cross_entropy",
            "optimizer": SGD(lr=0.1),
            "steps": 10,
            "clipping_norm": 1.0,
            "noise_multiplier": 2.0,
        }
        fields: dict[str, Any] = {
            "purpose": PURPOSE,
            "datasets": tuple(sorted(uses, key=lambda use: use.dataset)),
            "pipeline": PipelineSpec(features=("age",), target="outcome", target_kind="binary"),
            "training": Training(**(settings | (training or {}))),
            "privacy": Privacy(epsilon=3.0, delta=1e-4),
            "recipients": (self.clara.delegation,),
        }
        return Plan(**(fields | changed))

    def job(
        self,
        *uses: DatasetUse,
        plan: Plan | None = None,
        terms: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        by: Person | None = None,
    ) -> Job:
        """A submission of clara's."""
        person = by or self.clara
        fields: dict[str, Any] = {
            "consortium": self.consortium.id,
            "manifest": self.consortium.digest,
            "manifest_number": self.consortium.manifest.number,
            "job_id": os.urandom(16).hex(),
            "created": self.clock(),
            "deadline": self.clock() + DAY_MS,
            "submitter": person.delegation,
            "job_key_broker": "clara",
            "plan": plan or self.plan(*uses),
            "job_spec_commitment": os.urandom(32),
            "initial_weights_commitment": os.urandom(32),
        }
        made = Terms(**(fields | (terms or {})))
        signed = sign(made, person.keys.signing)
        envelope = self._seal("job", os.urandom(64), (made.job_key_broker,), person)
        job_head = bytes(split_envelope(envelope, max_bytes=1 << 20)[0])
        parts: dict[str, Any] = {
            "consortium": self.consortium.id,
            "job_id": made.job_id,
            "terms": signed.digest,
            "job_envelope": open_head(job_head).header.digest,
            "job_key_broker": made.job_key_broker,
            "key_brokers": made.key_brokers,
            "recipients": tuple(item.peek(Delegation).signing_key for item in made.plan.recipients),
            "created": made.created,
            "deadline": made.deadline,
        }
        route = Routing(**(parts | (routing or {})))
        submission = Submission(
            routing=sign(route, person.keys.signing),
            delegation=person.delegation,
            terms_envelope=self._seal("terms", encode(signed), made.key_brokers, person),
        )
        return Job(made, signed, route, PrecheckRequest(submission=submission, job_head=job_head))

    def precheck(self, broker: str, job: Job) -> PrecheckAnswer:
        """The key broker's answer, its signature checked."""
        signed = decode(Signed, self.broker(broker).precheck(encode(job.precheck)))
        return signed.verify(PrecheckAnswer, self.key_brokers[broker].signing.public)

    def detail(self, broker: str, answer: PrecheckAnswer, person: Person | None = None) -> Refusal:
        """The words of a refused precheck."""
        assert answer.detail is not None
        _, plaintext = open_envelope(
            answer.detail,
            (person or self.clara).keys.sealing,
            kind="response",
            consortium=self.consortium.id,
            sender=self.key_brokers[broker].signing.public,
            max_bytes=1 << 20,
        )
        return decode(Refusal, plaintext)

    def accepted_job(self, *uses: DatasetUse, **changed: Any) -> Job:
        """A job that every key broker concerned said yes to."""
        job = self.job(*uses, **changed)
        for broker in job.terms.key_brokers:
            answer = self.precheck(broker, job)
            assert answer.decision == "yes", self.detail(broker, answer)
        return job

    def _seal(self, kind: Any, plaintext: bytes, brokers: tuple[str, ...], person: Person) -> bytes:
        return seal_envelope(
            kind,
            plaintext,
            tuple(self.key_brokers[name].sealing.public for name in brokers),
            consortium=self.consortium.id,
            key=person.keys.signing,
            created=self.clock(),
        )

    # --- workers ------------------------------------------------------------------------------------------------------

    def nonce(self, broker: str, job: Job, attempt: int = 1) -> bytes:
        request = NonceRequest(job_id=job.terms.job_id, terms=job.digest, attempt=attempt)
        return decode(NonceReply, self.broker(broker).nonce(encode(request))).nonce

    def evidence(self, worker: Worker, measurement: bytes = MEASUREMENT, **changed: Any) -> Evidence:
        """Evidence with a nonce of every key broker concerned."""
        nonces = {name: self.nonce(name, worker.job, worker.attempt) for name in worker.job.terms.key_brokers}
        return worker.evidence(worker.claims(self.consortium, nonces, **changed), measurement)

    def grant(self, broker: str, worker: Worker, evidence: Evidence | None = None) -> tuple[Grant, GrantSecrets]:
        """The Grant, its signature checked, and what the worker opens in it."""
        request = worker.request(evidence or self.evidence(worker))
        signed = decode(Signed, self.broker(broker).grant(request))
        grant = signed.verify(Grant, self.key_brokers[broker].signing.public)
        opened = worker.keys.sealing.open_secret(grant.sealed_secrets, info=grant_info(grant.header))
        return grant, decode(GrantSecrets, opened)

    def grant_all(self, job: Job) -> Worker:
        """A worker that holds the Grants of every key broker concerned."""
        worker = Worker(job)
        evidence = self.evidence(worker)
        for broker in job.terms.key_brokers:
            self.grant(broker, worker, evidence)
        return worker

    def receipt(self, broker: str, payload: bytes) -> CommitReceipt:
        """The receipt, its signature checked."""
        return decode(Signed, payload).verify(CommitReceipt, self.key_brokers[broker].signing.public)


__all__ = ["MEASUREMENT", "PURPOSE", "Bench", "Clock", "Dataset", "Job", "Person", "Worker", "chip"]
