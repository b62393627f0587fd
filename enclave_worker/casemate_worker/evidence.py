"""Evidence for one attempt: every key broker's nonce, both public keys, one report or quote over all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from casemate_attestation.guest import GuestDriver
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, WorkerClaims
from casemate_schemas.grant import NonceReply, NonceRequest
from casemate_schemas.subjects import WorkerOp

from .attempt import Attempt

AskKeyBroker = Callable[[str, WorkerOp, bytes], Awaitable[bytes]]
"""Asks one key broker (id, operation, request) and returns its answer; raises what it refused with."""


async def gather_evidence(attempt: Attempt, consortium: Consortium, guest: GuestDriver, ask: AskKeyBroker) -> Evidence:
    """One piece of evidence that every key broker concerned finds its own nonce in.

    1. Ask all key brokers for a nonce for this job, these terms and this attempt.
    2. Claim: consortium, manifest, job, terms, attempt, both public keys, all nonces.
    3. Have the chip sign a report over the claims' hash, or the virtual TPM that it vouches for a quote.

    Raises what a key broker or the chip refuses with.
    """
    request = encode(NonceRequest(job_id=attempt.job_id, terms=attempt.routing.terms, attempt=attempt.number))
    key_brokers = attempt.routing.key_brokers
    replies = await asyncio.gather(*(ask(name, "nonce", request) for name in key_brokers))  # 1
    claims = WorkerClaims(  # 2
        consortium=consortium.id,
        manifest=consortium.digest,
        job_id=attempt.job_id,
        terms=attempt.routing.terms,
        attempt=attempt.number,
        sealing_key=attempt.sealing.public,
        signing_key=attempt.signing.public,
        nonces=tuple(
            KeyBrokerNonce(key_broker=name, nonce=decode(NonceReply, reply).nonce)
            for name, reply in zip(key_brokers, replies, strict=True)
        ),
    )
    component = await asyncio.to_thread(guest.attest, claims.report_data)  # 3
    return Evidence(claims=claims, components=(component,))
