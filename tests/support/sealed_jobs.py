"""Jobs that a worker has sealed, as far as a gateway can tell."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_schemas.admission import Routing, Submission
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.envelope import SealedKey, open_head, split_envelope
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, SevSnp, WorkerClaims
from casemate_schemas.job_state import advance
from casemate_schemas.keyring import KeyRing
from casemate_schemas.result import Release
from casemate_schemas.sealing import seal_envelope
from casemate_schemas.signatures import sign

from .gateway import Caller, House, now_ms


async def sealed_job(
    house: House, caller: Caller, *, state: str = "sealed", size: int = 3 << 20, **changes: Any
) -> tuple[str, bytes, bytes]:
    """(path, release, result envelope) of a job that a worker brought to ``state``."""
    submission, _ = await house.submitted(caller, **changes)
    client = await house.client("worker-1")
    worker = KeyRing.generate()
    consortium = house.keys.consortium.id
    result = seal_envelope("result", _noise(size), [], consortium=consortium, key=worker.signing, created=now_ms())
    digest = await put(EnvelopeStore(client, BlobStore(client)), result)
    release = encode(sign(release_of(house, submission, worker, digest), worker.signing))
    job_id = submission.routing.peek(Routing).job_id
    jobs = JobStore(client)
    for step in ("queued", "claimed", "running", "committing", "sealed"):
        more = {"release": release, "upload": digest} if step == "committing" else {}
        await jobs.change(job_id, lambda found, step=step, more=more: advance(found, step, now_ms=now_ms(), **more))
        if step == state:
            break
    return f"{JOBS_PATH}/{job_id}", release, result


def _noise(size: int) -> bytes:
    """Random, but for what is above a few MiB, where nobody looks."""
    return (secrets.token_bytes(min(size, 3 << 20)) * (size // (3 << 20) + 1))[:size]


async def put(store: EnvelopeStore, envelope: bytes) -> bytes:
    signed_head, ciphertext = split_envelope(envelope, max_bytes=len(envelope))

    async def once() -> AsyncIterator[bytes]:
        yield bytes(ciphertext)

    await store.put(bytes(signed_head), once())
    return open_head(signed_head).header.digest


def release_of(house: House, submission: Submission, worker: KeyRing, result: bytes) -> Release:
    """A release whose evidence and receipts are noise: they are for the recipients to judge, not for the gateway."""
    routing = submission.routing.peek(Routing)
    claims = WorkerClaims(
        consortium=routing.consortium,
        manifest=house.keys.consortium.digest,
        job_id=routing.job_id,
        terms=routing.terms,
        attempt=1,
        sealing_key=worker.sealing.public,
        signing_key=worker.signing.public,
        nonces=(KeyBrokerNonce(key_broker="clara", nonce=b"n" * 32),),
    )
    component = SevSnp(report=bytes(1184), certificates=(b"a", b"b", b"c"))
    noise = sign(claims, worker.signing)
    return Release(
        consortium=routing.consortium,
        job_id=routing.job_id,
        terms=routing.terms,
        result=result,
        evidence=Evidence(claims=claims, components=(component,)),
        grants=(noise,),
        receipts=(noise,),
        sealed_keys=(SealedKey(method="hpke", recipient=b"r" * 32, ciphertext=b"c" * 64),),
        at=now_ms(),
    )
