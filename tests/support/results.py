"""A complete, valid result and its release, made in this process; every part can be broken by one edit.

Two hospitals and clara's lab, a simulated chip, a worker that trained and a successor that released. What is changed by an
edit is signed again, so that a test breaks only what it means to break.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from casemate.identity import Identity, new_person
from casemate.verification import Bundle, Expected
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedChip, SimulatedKeys
from casemate_models.tensors import write_tensors
from casemate_privacy.statement import privacy_statement
from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.consortium import (
    Consortium,
    ConsortiumManifest,
    KeyBroker,
    ManifestChain,
    Member,
    SignedManifest,
    sign_manifest,
    verify_chain,
)
from casemate_schemas.envelope import EnvelopeHead, SealedKey, frame_head
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, SevSnp, WorkerClaims
from casemate_schemas.grant import AuditEntry, CommitReceipt, Grant, GrantHeader, InclusionProof
from casemate_schemas.job import SGD, DatasetUse, Plan, Privacy, Rational, Training
from casemate_schemas.keyring import KeyRing
from casemate_schemas.merkle import inclusion_path, leaf_hash, root_hash
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.result import PrivacyStatement, Release, ResultManifest
from casemate_schemas.sealing import ContentKey, EnvelopeSealer
from casemate_schemas.sections import pack_sections
from casemate_schemas.signatures import Signed, SigningKey, sign
from casemate_schemas.terms import Terms

MEASUREMENT = b"\x4d" * 48
MEMBERS = ("lab", "north", "south")
JOB_ID = "0123456789abcdef" * 2
WEIGHTS = {"0.weight": np.array([[0.5, -0.25]], np.float32), "0.bias": np.array([0.125], np.float32)}

_T = TypeVar("_T")
Edit = Callable[[_T], _T]


def unchanged(value: Any) -> Any:
    """The edit that edits nothing."""
    return value


@dataclass(frozen=True)
class Edits:
    """What to change on the way. Grants and claims of the releasing worker and of the training one have their own."""

    terms: Edit[Terms] = unchanged
    claims: Edit[WorkerClaims] = unchanged
    evidence: Edit[Evidence] = unchanged
    grant: Edit[GrantHeader] = unchanged
    grants: Edit[tuple[Signed, ...]] = unchanged
    trained_claims: Edit[WorkerClaims] = unchanged
    trained_evidence: Edit[Evidence] = unchanged
    trained_grant: Edit[GrantHeader] = unchanged
    trained_grants: Edit[tuple[Signed, ...]] = unchanged
    statement: Edit[PrivacyStatement] = unchanged
    manifest: Edit[ResultManifest] = unchanged
    weights: Edit[bytes] = unchanged
    receipt: Edit[CommitReceipt] = unchanged
    receipts: Edit[tuple[Signed, ...]] = unchanged
    audit_entry: Edit[AuditEntry] = unchanged
    proof: Edit[InclusionProof] = unchanged
    sealed_keys: Edit[tuple[SealedKey, ...]] = unchanged
    release: Edit[Release] = unchanged
    release_signer: SigningKey | None = None
    terms_signer: SigningKey | None = None
    result_signer: SigningKey | None = None
    grant_signer: SigningKey | None = None
    receipt_signer: SigningKey | None = None
    envelope_consortium: bytes | None = None
    chain: Edit[ManifestChain] = unchanged
    envelope: Edit[bytes] = unchanged


@dataclass(frozen=True)
class Worker:
    """One attempt's keys and what was said about them."""

    attempt: int
    keys: KeyRing = field(default_factory=KeyRing.generate)


@dataclass(frozen=True)
class World:
    """A consortium with everybody's keys, and one job of clara's."""

    chip: SimulatedChip
    members: dict[str, KeyRing]
    brokers: dict[str, KeyRing]
    chain: ManifestChain
    consortium: Consortium
    clara: Identity
    now: int

    def terms(
        self,
        edit: Edit[Terms] = unchanged,
        signer: SigningKey | None = None,
        recipients: tuple[Identity, ...] = (),
    ) -> Signed:
        """Clara's signed terms: two hospitals, a logistic regression, epsilon at most 3; for her, unless others are named."""
        terms = Terms(
            consortium=self.consortium.id,
            manifest=self.consortium.digest,
            manifest_number=self.consortium.manifest.number,
            job_id=JOB_ID,
            created=self.now,
            deadline=self.now + 3_600_000,
            submitter=self.clara.signed_delegation,
            job_key_broker="lab",
            plan=self.plan(recipients),
            job_spec_commitment=bytes(32),
            initial_weights_commitment=bytes(32),
        )
        return sign(edit(terms), signer or self.clara.keys.signing)

    def plan(self, recipients: tuple[Identity, ...] = ()) -> Plan:
        """Sampled at a quarter, 100 steps, noise 4.5."""
        uses = tuple(
            DatasetUse(
                dataset=f"cardio@{owner}",
                envelope=owner.encode().ljust(32, b"e"),
                card=owner.encode().ljust(32, b"c"),
                licence=owner.encode().ljust(32, b"l"),
                key_broker=owner,
                row_bound=200,
                sample_rate=Rational.of(Fraction(1, 4)),
            )
            for owner in ("north", "south")
        )
        return Plan(
            purpose="research",
            datasets=uses,
            pipeline=PipelineSpec(features=("age", "pulse"), target="outcome", target_kind="binary"),
            training=Training(
                loss="binary_cross_entropy",
                optimizer=SGD(lr=0.5),
                steps=100,
                clipping_norm=1.0,
                noise_multiplier=4.5,
            ),
            privacy=Privacy(epsilon=3.0, delta=1e-3),
            recipients=tuple(person.signed_delegation for person in recipients or (self.clara,)),
        )

    def evidence(
        self, worker: Worker, terms: Signed, edit_claims: Edit[WorkerClaims], edit: Edit[Evidence]
    ) -> Evidence:
        """Genuine evidence of the simulated chip for that worker."""
        claims = edit_claims(
            WorkerClaims(
                consortium=self.consortium.id,
                manifest=self.consortium.digest,
                job_id=JOB_ID,
                terms=terms.digest,
                attempt=worker.attempt,
                sealing_key=worker.keys.sealing.public,
                signing_key=worker.keys.signing.public,
                nonces=tuple(KeyBrokerNonce(key_broker=name, nonce=secrets.token_bytes(32)) for name in MEMBERS),
            )
        )
        template = replace(self.chip.launch(MEASUREMENT).template, report_data=claims.report_data)
        component = SevSnp(report=self.chip.sign(template.body()), certificates=self.chip.certificates)
        return edit(Evidence(claims=claims, components=(component,)))

    def grant(self, name: str, terms: Signed, evidence: Evidence, edit: Edit[GrantHeader], **signer: Any) -> Signed:
        """One key broker's signed Grant to the worker of that evidence."""
        header = GrantHeader(
            consortium=self.consortium.id,
            manifest=self.consortium.digest,
            manifest_number=self.consortium.manifest.number,
            key_broker=name,
            job_id=JOB_ID,
            terms=terms.digest,
            attempt=evidence.claims.attempt,
            envelopes=(name.encode().ljust(32, b"e"),),
            licences=() if name == "lab" else (name.encode().ljust(32, b"l"),),
            evidence=digest_of(evidence),
            worker_key=evidence.claims.signing_key,
            reservation=bytes(32),
            ledger_head=bytes(32),
            committed=None,
            issued=self.now + 1000,
            expires=self.now + 60_000,
        )
        key = signer.get("signer") or self.brokers[name].signing
        return sign(Grant(header=edit(header), sealed_secrets=b"sealed"), key)

    def receipt(self, name: str, terms: Signed, result: bytes, edits: Edits) -> Signed:
        """One key broker's signed receipt, with its entry the third of four in the audit log."""
        entry = AuditEntry(
            key_broker=name,
            event="committed",
            at=self.now + 5000,
            subject=JOB_ID,
            terms=terms.digest,
            result=result,
        )
        entries = [b"earlier", b"early", encode(edits.audit_entry(entry)), b"later"]
        leaves = [leaf_hash(item) for item in entries]
        proof = InclusionProof(
            entry=entries[2], index=2, size=4, path=inclusion_path(leaves, 2), root=root_hash(leaves)
        )
        receipt = CommitReceipt(
            consortium=self.consortium.id,
            key_broker=name,
            job_id=JOB_ID,
            terms=terms.digest,
            result=result,
            ledger_head=bytes(32),
            proof=edits.proof(proof),
            at=self.now + 5000,
        )
        return sign(edits.receipt(receipt), edits.receipt_signer or self.brokers[name].signing)

    def result(
        self, edits: Edits | None = None, *, successor: bool = True, recipients: tuple[Identity, ...] = ()
    ) -> Bundle:
        """The road of docs/protocol.md, steps 5 to 9: trained by attempt 1; released by attempt 2, or by 1 itself."""
        edits = edits or Edits()
        terms = self.terms(edits.terms, edits.terms_signer, recipients)
        trainer = Worker(1)
        trained = self.evidence(trainer, terms, edits.trained_claims, edits.trained_evidence)
        envelope, content_key, header = self._sealed(edits, terms, trainer, trained)
        releaser = Worker(2) if successor else trainer
        evidence = self.evidence(releaser, terms, edits.claims, edits.evidence)
        grants = tuple(self.grant(name, terms, evidence, edits.grant, signer=edits.grant_signer) for name in MEMBERS)
        people = recipients or (self.clara,)
        sealed_keys = tuple(content_key.seal_to(person.keys.sealing.public, header) for person in people)
        release = Release(
            consortium=self.consortium.id,
            job_id=JOB_ID,
            terms=terms.digest,
            result=header.digest,
            evidence=evidence,
            grants=edits.grants(grants),
            receipts=edits.receipts(tuple(self.receipt(name, terms, header.digest, edits) for name in MEMBERS)),
            sealed_keys=edits.sealed_keys(sealed_keys),
            at=self.now + 6000,
        )
        signed = sign(edits.release(release), edits.release_signer or releaser.keys.signing)
        return Bundle(edits.chain(self.chain), signed, edits.envelope(envelope))

    def expected(self, **changes: Any) -> Expected:
        """What clara expects: her own terms."""
        return replace(Expected(self.consortium.id, JOB_ID, None, None), **changes)

    def _sealed(
        self, edits: Edits, terms: Signed, trainer: Worker, evidence: Evidence
    ) -> tuple[bytes, ContentKey, Any]:
        manifest = ResultManifest(
            consortium=self.consortium.id,
            job_id=JOB_ID,
            simulation=True,
            terms=terms,
            evidence=evidence,
            grants=edits.trained_grants(
                tuple(self.grant(name, terms, evidence, edits.trained_grant) for name in MEMBERS)
            ),
            privacy=edits.statement(privacy_statement(self.plan())),
            software={"casemate": "0.1.0"},
            isolation="none: a test",
            finished=self.now + 4000,
        )
        plaintext = pack_sections(
            {"manifest": encode(edits.manifest(manifest)), "weights": edits.weights(write_tensors(WEIGHTS))}
        )
        signer = edits.result_signer or trainer.keys.signing
        consortium = edits.envelope_consortium or self.consortium.id
        sealer = EnvelopeSealer("result", consortium=consortium, sender=signer.public, created=self.now)
        ciphertext = b"".join(sealer.update(plaintext)) + sealer.finish()
        header = sealer.header()
        head = EnvelopeHead(header=header, sealed_keys=(sealer.content_key.wrap_under(bytes(32), header),))
        return frame_head(head, signer) + ciphertext, sealer.content_key, header

    def next_manifest(self, **changes: Any) -> SignedManifest:
        """Manifest 2, signed by everyone."""
        fields = {"number": 2, "previous": self.consortium.digest, "created": self.now, **changes}
        manifest = self.consortium.manifest.model_copy(update=fields)
        return sign_manifest(manifest, {name: keys.signing for name, keys in self.members.items()})


@functools.cache
def world() -> World:
    """Made once: RSA-4096 keys take seconds."""
    now = time.time_ns() // 1_000_000
    chip = SimulatedAuthority(SimulatedKeys.generate()).issue_chip()
    members = {name: KeyRing.generate() for name in MEMBERS}
    brokers = {name: KeyRing.generate() for name in MEMBERS}
    manifest = ConsortiumManifest(
        number=1,
        previous=None,
        name="two hospitals and a lab",
        members=tuple(
            Member(id=name, name=name, signing_key=keys.signing.public, sealing_key=keys.sealing.public)
            for name, keys in members.items()
        ),
        key_brokers=tuple(
            KeyBroker(id=name, serves=(name,), signing_key=keys.signing.public, sealing_key=keys.sealing.public)
            for name, keys in brokers.items()
        ),
        attestation=AttestationPolicy(
            simulation=True,
            products=(AcceptedProduct(product="Milan", ark_sha256=(chip.root.ark_sha256,)),),
            measurements=(MEASUREMENT,),
        ),
        quorum=2,
        created=now,
    )
    signed = sign_manifest(manifest, {name: keys.signing for name, keys in members.items()})
    chain = ManifestChain(manifests=(signed,))
    clara = new_person(
        members["lab"],
        consortium=signed.digest,
        member="lab",
        person="clara",
        roles=("scientist",),
        not_before=now - 60_000,
    )
    return World(chip, members, brokers, chain, verify_chain(chain), Identity.of(clara), now)
