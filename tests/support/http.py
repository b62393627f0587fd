"""HTTP in tests: applications served, and requests signed as a person does, over the components that the gateway wants."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web
from aiohttp.test_utils import TestServer
from casemate_schemas.api import DELEGATION_HEADER, SIGNATURE_LABEL, SIGNATURE_TAG, SIGNED_COMPONENTS
from casemate_schemas.codec import encode
from casemate_schemas.signatures import Signed, SigningKey
from http_message_signatures import ContentDigest, HTTPMessageSigner, algorithms


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """The address of an application on a free port of this machine, which ends with the block."""
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.close()


@dataclass
class SignedRequest:
    """A request with the headers that make it somebody's; tests change what they like after signing."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)


class _AnyDigest(ContentDigest):
    """Leaves the digest as it is, also where it is wrong."""

    @classmethod
    def prepare(cls, headers: object, body: bytes | None, *, use_existing_digest: bool) -> None:
        pass


class _Signer(HTTPMessageSigner):
    content_digest_class = _AnyDigest


def content_digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode('ascii')}:"


def signed_request(
    key: SigningKey,
    delegation: Signed,
    method: str,
    url: str,
    body: bytes = b"",
    *,
    digest: str | None = None,
    now_ms: int | None = None,
    nonce: str | None = None,
    label: str = SIGNATURE_LABEL,
    tag: str = SIGNATURE_TAG,
    key_id: str | None = None,
    components: tuple[str, ...] = SIGNED_COMPONENTS,
    expires_ms: int | None = None,
) -> SignedRequest:
    """The request, signed by ``key`` (RFC 9421, RFC 9530); every part of the signature can be chosen wrongly."""
    headers = {
        "Content-Digest": digest or content_digest(body),
        DELEGATION_HEADER: base64.b64encode(encode(delegation)).decode("ascii"),
    }
    request = SignedRequest(method, url, headers)
    signer = _Signer(signature_algorithm=algorithms.ED25519)
    prepared = signer.prepare(
        request,
        key_id=key_id or key.public.hex(),
        created=_time(now_ms) or datetime.now(UTC),
        expires=_time(expires_ms),
        nonce=secrets.token_hex(16) if nonce is None else nonce,
        label=label,
        tag=tag,
        covered_component_ids=components,
    )
    signer.apply(request, prepared, key.sign_bytes(prepared.signature_base))
    return request


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
