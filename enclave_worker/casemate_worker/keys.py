"""Grants: what key brokers let this attempt open, checked against each other and against the terms."""

from __future__ import annotations

from dataclasses import dataclass, field

from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import ConflictError, ReleaseError
from casemate_schemas.evidence import Evidence
from casemate_schemas.grant import Grant, GrantHeader, GrantRequest, GrantSecrets, grant_info
from casemate_schemas.sealing import ContentKey
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms

from .attempt import Attempt
from .evidence import AskKeyBroker
from .key_schedule import resume_key


@dataclass
class Keys:
    """What has been granted so far, by key broker id. Secrets show nowhere."""

    grants: dict[str, Signed] = field(default_factory=dict)
    headers: dict[str, GrantHeader] = field(default_factory=dict)
    content_keys: dict[bytes, ContentKey] = field(default_factory=dict, repr=False)
    seed_shares: dict[str, bytes] = field(default_factory=dict, repr=False)

    def content_key(self, envelope: bytes) -> ContentKey:
        """The content key of an envelope. Raises :class:`ReleaseError` if no Grant holds it."""
        if envelope not in self.content_keys:
            raise ReleaseError("no key broker granted the key of an envelope in the terms")
        return self.content_keys[envelope]

    @property
    def shares(self) -> tuple[bytes, ...]:
        """Seed shares in the order of key broker ids."""
        return tuple(self.seed_shares[name] for name in sorted(self.seed_shares))

    def resume_key(self, terms: bytes) -> bytes:
        """The key that all attempts at these terms share."""
        return resume_key(self.shares, terms)


async def request_grant(
    name: str, attempt: Attempt, evidence: Evidence, consortium: Consortium, ask: AskKeyBroker, keys: Keys
) -> GrantHeader:
    """Asks one key broker for its Grant, checks it, opens it, and puts it with the others.

    1. The Grant is signed by that key broker's key in the manifest.
    2. It is about this very consortium, manifest, job, terms, attempt, evidence and worker key.
    3. Its secrets open with this attempt's sealing key, one key for each envelope it names.

    Raises :class:`SignatureError`, :class:`ReleaseError`, :class:`SealError` or what the key broker refuses with.
    """
    request = encode(sign(GrantRequest(evidence=evidence), attempt.signing))
    signed = decode(Signed, await ask(name, "grant", request))
    grant = signed.verify(Grant, consortium.manifest.key_broker(name).signing_key)  # 1
    header = grant.header
    check_grant(header, name, evidence, consortium)  # 2
    plain = attempt.sealing.open_secret(grant.sealed_secrets, info=grant_info(header))  # 3
    secrets = decode(GrantSecrets, plain)
    if len(secrets.content_keys) != len(header.envelopes):
        raise ReleaseError("a Grant holds another number of keys than it names")
    keys.grants[name] = signed
    keys.headers[name] = header
    keys.seed_shares[name] = secrets.seed_share
    keys.content_keys |= {
        envelope: ContentKey(key) for envelope, key in zip(header.envelopes, secrets.content_keys, strict=True)
    }
    return header


def check_grant(header: GrantHeader, name: str, evidence: Evidence, consortium: Consortium) -> None:
    """Raises :class:`ReleaseError` unless a Grant is by that key broker for exactly this evidence and its claims."""
    claims = evidence.claims
    expected = {
        "key broker": (header.key_broker, name),
        "consortium": (header.consortium, consortium.id),
        "manifest": (header.manifest, claims.manifest),
        "manifest number": (header.manifest_number, consortium.manifest.number),
        "job": (header.job_id, claims.job_id),
        "terms": (header.terms, claims.terms),
        "attempt": (header.attempt, claims.attempt),
        "evidence": (header.evidence, digest_of(evidence)),
        "worker key": (header.worker_key, claims.signing_key),
    }
    for what, (got, wanted) in expected.items():
        if got != wanted:
            raise ReleaseError(f"a Grant names another {what} than this attempt's")


def check_cover(keys: Keys, terms: Terms) -> None:
    """Raises :class:`ReleaseError` unless each owner's own key broker granted the terms' version under the terms' licence.

    Recipients check the same; a result that they would refuse must never be computed. A key broker that holds a commit
    grants no dataset's key any more.
    """
    for use in terms.plan.datasets:
        header = keys.headers[use.key_broker]
        is_granted = use.envelope in header.envelopes or header.committed is not None
        if not is_granted or use.licence not in header.licences:
            raise ReleaseError(f"key broker {use.key_broker} granted another version or licence than that in the terms")


def committed_digest(keys: Keys, terms: Terms) -> bytes | None:
    """The result that holds the deciding (first) key broker's commit already, if one does.

    Raises :class:`ConflictError` if another key broker holds a different one, which an honest set never does.
    """
    first = keys.headers[terms.key_brokers[0]].committed
    if any(header.committed not in (None, first) for header in keys.headers.values()):
        raise ConflictError("key brokers hold different commits for these terms")
    return first
