"""Does a result's provenance hold? Twelve numbered steps, offline; nothing opens to a user before all of them hold.

What is trusted to begin with: the consortium's id, the person's own keys, and (if it was submitted from here) the terms.
Everything else (release, envelope, evidence, Grants, receipts) came through the gateway and is checked.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from casemate_attestation.evidence import verify_evidence
from casemate_privacy.auditing import audit_report, profile_epsilons_beside
from casemate_privacy.statement import privacy_statement
from casemate_schemas.audit import AuditCounts, AuditReport
from casemate_schemas.codec import decode, digest_of
from casemate_schemas.consortium import Consortium, ManifestChain
from casemate_schemas.envelope import EnvelopeHead, open_head, split_envelope
from casemate_schemas.errors import CasemateError, ReleaseError
from casemate_schemas.evidence import Evidence
from casemate_schemas.grant import AuditEntry, CommitReceipt, Grant
from casemate_schemas.job import Plan
from casemate_schemas.keys import sealing_key_id
from casemate_schemas.metrics import MetricSums, has_accuracy, noise_std
from casemate_schemas.result import RESULT_SECTIONS, PrivacyStatement, Release, ResultManifest
from casemate_schemas.sealing import check_consortium, open_ciphertext, unseal_key
from casemate_schemas.sections import unpack_sections
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import Terms, VerifiedTerms, verify_terms

from ._session import consortium_at
from .identity import Identity

MAX_RESULT_BYTES: Final = 4 << 30
MAX_MANIFEST_BYTES: Final = 2 << 20
_RELATIVE_TOLERANCE: Final = 1e-6
_ABSOLUTE_TOLERANCE: Final = 1e-6
"""Of figures near zero, which are ends of bisections."""
_BOUNDS: Final = {"epsilon", "one_run_epsilon", "profile_epsilon"}


@dataclass(frozen=True)
class Step:
    """One step that held: what was found, and who vouches for it."""

    number: int
    name: str
    by: str
    finding: str

    def __str__(self) -> str:
        return f"✓ {self.number:2d} {self.name}: {self.finding} ({self.by})"


@dataclass(frozen=True)
class Verification:
    """What was verified, and by whose word: all twelve steps, in order. It exists only if every one held."""

    steps: tuple[Step, ...]
    simulation: bool

    def __str__(self) -> str:
        lines = [str(step) for step in self.steps]
        return "\n".join(
            [*lines, "  SIMULATED: these chips prove nothing about a machine"] if self.simulation else lines
        )


@dataclass(frozen=True)
class Bundle:
    """What a verification starts from, as bytes that can be kept and checked again years later."""

    chain: ManifestChain
    release: Signed
    envelope: bytes


@dataclass(frozen=True)
class Expected:
    """Whose terms the result must answer. Without ``terms`` (a digest) the submitter's name decides, ``person@member``."""

    consortium: bytes
    job_id: str
    terms: bytes | None
    submitter: str | None


@dataclass(frozen=True)
class VerifiedResult:
    """A result whose provenance holds, opened."""

    verification: Verification
    manifest: ResultManifest
    terms: VerifiedTerms
    weights: memoryview


def verify_result(bundle: Bundle, identity: Identity, expected: Expected) -> VerifiedResult:
    """The opened result, if every step holds. Needs no network and changes nothing.

    1. *release*: signed by the key in its own evidence's claims, for this consortium and job.
    2. *manifest*: the claims name a version of this consortium's manifest; each version up to it is duly signed.
    3. *grants*: the claims are about this consortium, job and terms; key brokers of that manifest granted their keys to
       this worker, on this evidence, for these terms.
    4. *evidence*: it was genuine and met that manifest's policy when the Grants were issued. That a revocation list was
       looked at, where the policy demands one, rests on those who granted.
    5. *receipts*: the same key brokers hold this result for these terms.
    6. *inclusion*: each of these commits stands in its key broker's audit log.
    7. *envelope*: the result at hand is the one they hold, to the last byte.
    8. *opening*: the content key released to this person opens it.
    9. *terms*: the ones inside are those released; the expected submitter signed them; key brokers, datasets and
       recipients are as they say.
    10. *training worker*: the envelope's sender; Grants and evidence as in steps 3 and 4, for the same terms, under the
        manifest that it names (a successor may have released the result under a newer one).
    11. *result manifest*: it is about this consortium and job, and says truly whether it was simulated.
    12. *privacy*: sample rate, noise, steps and delta of each owner are those of the terms, and each epsilon equals its
        recomputation and is within the terms' target. Metrics are there if the terms ask for them, with their noise.
        Of an audit there is a report and no weights; its bounds equal their recomputation from its counts and the terms.

    Args:
        bundle: what was fetched. The chain is verified here again.
        identity: a recipient.
        expected: whose result it must be.

    Raises :class:`ReleaseError` that names the step. Source: docs/protocol.md, "One job", step 10.
    """
    steps = _Steps()
    with steps(1, "release") as note:
        release = _release(bundle.release, expected)
        note("the worker", f"job {expected.job_id}, result {release.result.hex()[:16]}…")
    with steps(2, "manifest") as note:
        consortium = consortium_at(bundle.chain, release.evidence.claims.manifest, consortium=expected.consortium)
        note("members of the consortium", f"number {consortium.manifest.number} of {consortium.manifest.name}")
    with steps(3, "grants") as note:
        grants = _grants(release.grants, release.evidence, release, consortium)
        note(_names(grants), f"keys granted to attempt {release.evidence.claims.attempt}")
    with steps(4, "evidence") as note:
        _appraise(release.evidence, grants, consortium)
        note(_chip(consortium), "the releasing worker runs an accepted program")
    with steps(5, "receipts") as note:
        receipts = _receipts(release, consortium)
        _same("receipts are from", _names(receipts), _names(grants))
        note(_names(receipts), "this result, and no other, is committed")
    with steps(6, "inclusion") as note:
        for receipt in receipts.values():
            _inclusion(receipt)
        note(_names(receipts), "every commit stands in the audit log")
    with steps(7, "envelope") as note:
        head, ciphertext = _envelope(bundle.envelope, release, consortium)
        note("SHA-256", f"{len(ciphertext):,} bytes of ciphertext are the committed ones")
    with steps(8, "opening") as note:
        sections = _open(head, ciphertext, release, identity)
        manifest = decode(ResultManifest, bytes(sections["manifest"]), max_bytes=MAX_MANIFEST_BYTES)
        note(identity.name, "opens with this person's key")
    with steps(9, "terms") as note:
        terms = _terms(manifest.terms, release, consortium, identity, expected)
        _same("the terms concern key brokers", ", ".join(terms.terms.key_brokers), _names(grants))
        _cover(terms.terms, grants, trained=False)
        _recipients(release, terms)
        note(_person(terms), f"purpose {terms.terms.plan.purpose}, {len(terms.terms.plan.datasets)} datasets")
    with steps(10, "training worker") as note:
        then = consortium_at(bundle.chain, manifest.evidence.claims.manifest, consortium=expected.consortium)
        trained = _grants(manifest.grants, manifest.evidence, release, then)
        _same("it was granted keys by", _names(trained), _names(grants))
        _cover(terms.terms, trained, trained=True)
        _appraise(manifest.evidence, trained, then)
        _equal("the envelope's sender", head.header.preamble.sender, manifest.evidence.claims.signing_key)
        note(_chip(consortium), f"attempt {manifest.evidence.claims.attempt} trained and sealed it")
    with steps(11, "result manifest") as note:
        _about(manifest, release, consortium)
        note("the training worker", "agrees with all of the above")
    with steps(12, "privacy") as note:
        _privacy(manifest.privacy, terms.terms)
        _metrics(manifest.metrics, terms.terms.plan)
        _audit(manifest.audit, sections["weights"], terms.terms.plan)
        note("recomputed here", ", ".join(f"{o.dataset} ε {o.epsilon:.4g}" for o in manifest.privacy.owners))
    return VerifiedResult(steps.verification(consortium), manifest, terms, sections["weights"])


class _Steps:
    """Collects steps; any error within one becomes a :class:`ReleaseError` that names it."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    @contextmanager
    def __call__(self, number: int, name: str) -> Iterator[_Note]:
        note = _Note()
        try:
            yield note
        except CasemateError as error:
            raise ReleaseError(f"step {number} ({name}): {error}") from error
        self._steps.append(Step(number, name, note.by, note.finding))

    def verification(self, consortium: Consortium) -> Verification:
        return Verification(tuple(self._steps), consortium.manifest.simulation)


class _Note:
    """What a step found, and on whose word."""

    def __init__(self) -> None:
        self.by, self.finding = "", ""

    def __call__(self, by: str, finding: str) -> None:
        self.by, self.finding = by, finding


def _release(signed: Signed, expected: Expected) -> Release:
    claimed = signed.peek(Release)
    release = signed.verify(Release, claimed.evidence.claims.signing_key)
    _equal("its consortium", release.consortium, expected.consortium)
    _same("it is for job", release.job_id, expected.job_id)
    return release


def _grants(
    signed_grants: tuple[Signed, ...], evidence: Evidence, release: Release, consortium: Consortium
) -> dict[str, Grant]:
    """The Grants by key broker, if each is signed by it and about this very worker, evidence and terms."""
    claims = evidence.claims
    _same("the evidence is for job", claims.job_id, release.job_id)
    _equal("the evidence's consortium", claims.consortium, consortium.id)
    _equal("the evidence's manifest", claims.manifest, consortium.digest)
    _equal("the evidence's terms", claims.terms, release.terms)
    grants: dict[str, Grant] = {}
    for signed in signed_grants:
        broker = consortium.manifest.key_broker(signed.peek(Grant).header.key_broker)
        grant = signed.verify(Grant, broker.signing_key)
        header = grant.header
        _equal(f"{broker.id}: consortium", header.consortium, consortium.id)
        _equal(f"{broker.id}: manifest", header.manifest, consortium.digest)
        _same(f"{broker.id}: manifest number", str(header.manifest_number), str(consortium.manifest.number))
        _same(f"{broker.id}: job", header.job_id, release.job_id)
        _equal(f"{broker.id}: terms", header.terms, release.terms)
        _same(f"{broker.id}: attempt", str(header.attempt), str(claims.attempt))
        _equal(f"{broker.id}: evidence", header.evidence, digest_of(evidence))
        _equal(f"{broker.id}: worker key", header.worker_key, claims.signing_key)
        _equal(f"{broker.id}: committed result", header.committed or release.result, release.result)
        if broker.id in grants or claims.nonce_of(broker.id) is None:
            raise ReleaseError(f"{broker.id}: granted twice, or without a nonce of its own")
        grants[broker.id] = grant
    return grants


def _appraise(evidence: Evidence, grants: dict[str, Grant], consortium: Consortium) -> None:
    """Judged at the time the first Grant was issued: certificates may expire afterwards.

    No revocation list of that day is at hand. Where the policy demands one, those who granted had it.
    """
    policy = consortium.manifest.attestation.model_copy(update={"crl_required": False, "max_crl_age_s": None})
    at = datetime.fromtimestamp(min(grant.header.issued for grant in grants.values()) / 1000, UTC)
    verify_evidence(evidence, policy, at).raise_for_failure()


def _receipts(release: Release, consortium: Consortium) -> dict[str, CommitReceipt]:
    receipts: dict[str, CommitReceipt] = {}
    for signed in release.receipts:
        broker = consortium.manifest.key_broker(signed.peek(CommitReceipt).key_broker)
        receipt = signed.verify(CommitReceipt, broker.signing_key)
        _equal(f"{broker.id}: consortium", receipt.consortium, consortium.id)
        _same(f"{broker.id}: job", receipt.job_id, release.job_id)
        _equal(f"{broker.id}: terms", receipt.terms, release.terms)
        _equal(f"{broker.id}: result", receipt.result, release.result)
        if broker.id in receipts:
            raise ReleaseError(f"{broker.id}: two receipts")
        receipts[broker.id] = receipt
    return receipts


def _inclusion(receipt: CommitReceipt) -> None:
    receipt.proof.check()
    entry = decode(AuditEntry, receipt.proof.entry)
    _same("the entry is of key broker", entry.key_broker, receipt.key_broker)
    _same("the entry is of event", entry.event, "committed")
    _same("the entry is about job", entry.subject, receipt.job_id)
    _equal("the entry's terms", entry.terms or b"", receipt.terms)
    _equal("the entry's result", entry.result or b"", receipt.result)


def _envelope(envelope: bytes, release: Release, consortium: Consortium) -> tuple[EnvelopeHead, memoryview]:
    signed_head, ciphertext = split_envelope(envelope, max_bytes=MAX_RESULT_BYTES)
    head = open_head(signed_head, kind="result")
    check_consortium(head, consortium.id)
    _equal("its digest", head.header.digest, release.result)
    _equal("its ciphertext", hashlib.sha256(ciphertext).digest(), head.header.ciphertext_digest)
    return head, ciphertext


def _open(head: EnvelopeHead, ciphertext: memoryview, release: Release, identity: Identity) -> dict[str, memoryview]:
    key = identity.keys.sealing
    sealed = next((item for item in release.sealed_keys if item.recipient == key.id), None)
    if sealed is None:
        raise ReleaseError(f"{identity.name} is not among its recipients")
    content_key = unseal_key(sealed, head.header, key)
    return unpack_sections(open_ciphertext(head.header, content_key, ciphertext), RESULT_SECTIONS)


def _terms(
    signed: Signed, release: Release, consortium: Consortium, identity: Identity, expected: Expected
) -> VerifiedTerms:
    _equal("their digest", signed.digest, release.terms)
    terms = verify_terms(signed, consortium)
    _same("they are for job", terms.terms.job_id, release.job_id)
    if expected.terms is not None:
        _equal("the digest of those submitted from here", expected.terms, signed.digest)
    elif expected.submitter is not None:
        _same("they are submitted by", _person(terms), expected.submitter)
    elif terms.submitter.signing_key != identity.keys.signing.public:
        raise ReleaseError(f"{_person(terms)} submitted them: pass submitter={_person(terms)!r} if that is expected")
    return terms


def _cover(terms: Terms, grants: dict[str, Grant], *, trained: bool) -> None:
    """Each owner's key broker granted the dataset version of the terms, under the licence of the terms.

    Whoever only released what was committed already was granted no dataset any more.
    """
    for use in terms.plan.datasets:
        header = grants[use.key_broker].header
        is_granted = use.envelope in header.envelopes or (not trained and header.committed is not None)
        if not is_granted or use.licence not in header.licences:
            raise ReleaseError(f"{use.key_broker} granted another version or licence of {use.dataset}")


def _recipients(release: Release, terms: VerifiedTerms) -> None:
    named = {sealing_key_id(person.sealing_key) for person in terms.recipients}
    if {sealed.recipient for sealed in release.sealed_keys} != named:
        raise ReleaseError("it was released to others than the terms name")


def _about(manifest: ResultManifest, release: Release, consortium: Consortium) -> None:
    _equal("its consortium", manifest.consortium, consortium.id)
    _same("it is for job", manifest.job_id, release.job_id)
    _same("it says simulated", str(manifest.simulation), str(consortium.manifest.simulation))


def _privacy(stated: PrivacyStatement, terms: Terms) -> None:
    """Floating-point results may differ in the last digits between machines; all else must be equal."""
    recomputed = privacy_statement(terms.plan)
    for owner, expected in zip(stated.owners, recomputed.owners, strict=False):
        _close(f"epsilon of {expected.dataset}", owner.epsilon, expected.epsilon)
        if expected.epsilon > terms.plan.privacy.epsilon * (1 + _RELATIVE_TOLERANCE):
            raise ReleaseError(f"{expected.dataset}: epsilon {expected.epsilon:.6g} is over the target")
    _close("a person's epsilon", stated.person_epsilon or 0.0, recomputed.person_epsilon or 0.0)
    if _without_epsilon(stated) != _without_epsilon(recomputed):
        raise ReleaseError("datasets, sample rates, noise, steps or delta are not those of the terms")


def _metrics(released: MetricSums | None, plan: Plan) -> None:
    """That metrics are those of the terms: there or not, for which kind of target, with which noise and bound."""
    stated = released and (released.noise_std, released.loss_bound, released.right is not None)
    loss, asked = plan.training.loss, plan.metrics
    if stated != (asked and (noise_std(loss, asked.noise_multiplier), asked.loss_bound, has_accuracy(loss))):
        raise ReleaseError("metrics are not those that the terms ask for")


def _audit(report: AuditReport | None, weights: memoryview, plan: Plan) -> None:
    """That there is a report in place of weights if the terms ask for one, and that it says what follows from its counts."""
    if (report is not None, len(weights) == 0) != (plan.audit is not None,) * 2:
        raise ReleaseError("the terms ask for weights or for an audit's report, and the result is the other")
    if report is None:
        return
    counts = AuditCounts(guesses=report.guesses)
    expected = audit_report(plan, counts)
    if not _is_close(report.profile_epsilon, expected.profile_epsilon) and any(
        _is_close(report.profile_epsilon, beside) for beside in profile_epsilons_beside(plan, counts)
    ):
        expected = expected.model_copy(update={"profile_epsilon": report.profile_epsilon})
    for name in sorted(_BOUNDS):
        _close(f"the audit's {name}", getattr(report, name), getattr(expected, name))
    if report.model_copy(update=expected.model_dump(include=_BOUNDS)) != expected:
        raise ReleaseError("canaries, rate, confidence or delta of the audit are not those of the terms")


def _without_epsilon(statement: PrivacyStatement) -> PrivacyStatement:
    owners = tuple(owner.model_copy(update={"epsilon": 0.0}) for owner in statement.owners)
    return statement.model_copy(update={"owners": owners, "person_epsilon": None})


def _equal(what: str, got: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(got, expected):
        raise ReleaseError(f"{what}: expected {expected.hex()[:16]}…, got {got.hex()[:16]}…")


def _same(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise ReleaseError(f"{what} {got}, expected {expected}")


def _close(what: str, got: float, expected: float) -> None:
    if not _is_close(got, expected):
        raise ReleaseError(f"{what}: stated {got!r}, recomputed {expected!r}")


def _is_close(got: float, expected: float) -> bool:
    return math.isclose(got, expected, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)


def _names(items: dict[str, Grant] | dict[str, CommitReceipt]) -> str:
    return ", ".join(sorted(items))


def _person(terms: VerifiedTerms) -> str:
    return f"{terms.submitter.person}@{terms.submitter.member}"


def _chip(consortium: Consortium) -> str:
    return "SIMULATED chip" if consortium.manifest.simulation else "AMD's chip"
