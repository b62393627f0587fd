"""Who asks: HTTP message signatures (RFC 9421) by a person's key, under a delegation that their member signed."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import http_sf
from aiohttp import web
from casemate_messaging.nonces import NonceStore
from casemate_schemas.api import (
    DELEGATION_HEADER,
    SIGNATURE_LABEL,
    SIGNATURE_TAG,
    SIGNATURE_WINDOW_S,
    SIGNED_COMPONENTS,
)
from casemate_schemas.codec import decode
from casemate_schemas.consortium import Consortium, check_delegation, verify_delegation
from casemate_schemas.errors import AuthenticationError, MalformedError, SignatureError
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import MAX_DELEGATION_BYTES
from casemate_schemas.signatures import Signed
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSignaturesException,
    HTTPMessageVerifier,
    InvalidSignature,
    MappingKeyResolver,
    VerifyResult,
    algorithms,
)
from multidict import CIMultiDictProxy

from .limits import TokenBuckets

MIN_NONCE_CHARS: Final = 16
MAX_NONCE_CHARS: Final = 128
_REQUIRED: Final = frozenset(f'"{name}"' for name in SIGNED_COMPONENTS)
"""As they stand in a signature's base: whole fields, without parameters that would cover a part of one."""


@dataclass(frozen=True)
class Person:
    """Who signed the request, and the delegation that says so."""

    delegation: Delegation
    signed_delegation: Signed

    @functools.cached_property
    def keys(self) -> MappingKeyResolver:
        """The one key that the person's requests may be signed by."""
        key = Ed25519PublicKey.from_public_bytes(self.signing_key)
        return MappingKeyResolver(public_keys={self.signing_key.hex(): key}, private_keys={})

    @property
    def signing_key(self) -> bytes:
        """The person's Ed25519 key, and id."""
        return self.delegation.signing_key

    @property
    def member(self) -> str:
        """The member the person acts for."""
        return self.delegation.member


@dataclass(frozen=True)
class Authenticated:
    """The person, and the digest that the request's body must have."""

    person: Person
    content_digest: bytes


class People:
    """Who the delegations in requests' headers speak of; the newest that were verified are remembered.

    A signature that held under a manifest holds as long as that manifest is the newest. What may end sooner (the time, a
    revocation) is looked at each time. Only what a member signed is remembered.
    """

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._known: OrderedDict[tuple[str, bytes], Person] = OrderedDict()

    def find(self, header: str, consortium: Consortium, *, at: int) -> Person:
        """The person. Raises :class:`AuthenticationError`."""
        where = (header, consortium.digest)
        if (person := self._known.get(where)) is not None:
            check_delegation(person.delegation, consortium, at=at)
            self._known.move_to_end(where)
            return person
        signed = _delegation(header)
        person = self._known[where] = Person(verify_delegation(signed, consortium, at=at), signed)
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return person


class Authenticator:
    """Establishes who sent a request to the gateway at ``origin`` (``scheme://host[:port]``)."""

    def __init__(
        self,
        consortium: Callable[[], Consortium],
        nonces: NonceStore,
        requests: TokenBuckets,
        *,
        origin: str,
        clock: Callable[[], int],
    ) -> None:
        """``consortium`` gives the newest one known, ``requests`` what members may still ask."""
        self._consortium = consortium
        self._people = People()
        self._nonces = nonces
        self._requests = requests
        self._origin = origin
        self._clock = clock

    async def authenticate(self, request: web.BaseRequest) -> Authenticated:
        """Who sent ``request``; its body is not read.

        1. The delegation in the header is their member's, for this consortium, and valid now.
        2. The one signature of our label and tag is by the delegation's key and covers method, target, content digest
           and delegation; it was made within :data:`SIGNATURE_WINDOW_S` of now, for this gateway's origin.
        3. The content digest is a SHA-256, for the body's reader to check.
        4. The member does not ask too often, replayed requests not counted.
        5. The nonce was never seen before. It is recorded last, so only a signed request can fill the store.

        Raises :class:`AuthenticationError`, :class:`SignatureError`, :class:`MalformedError` or :class:`ThrottledError`, and
        :class:`UnavailableError` if nonces cannot be recorded.
        """
        now_ms = self._clock()
        person = self._people.find(_only(request, DELEGATION_HEADER), self._consortium(), at=now_ms)
        result = self._verified(request, person, now_ms)
        digest = _content_digest(request)
        with self._requests.one(person.member):  # 4
            await self._use_nonce(person, result.nonce)  # 5
        return Authenticated(person, digest)

    def _verified(self, request: web.BaseRequest, person: Person, now_ms: int) -> VerifyResult:
        if not request.raw_path.startswith("/"):
            raise MalformedError("expected a request target that starts with /")
        message = _Message(request.method, self._origin + request.raw_path, request.headers)
        verifier = _Verifier(signature_algorithm=algorithms.ED25519, key_resolver=person.keys)
        verifier.now_s = now_ms / 1000
        try:
            (result,) = verifier.verify(message, max_age=None, expect_tag=SIGNATURE_TAG, expect_label=SIGNATURE_LABEL)
            if not result.covered_components.keys() >= _REQUIRED:  # a fifth cheaper than to have the library look
                raise InvalidSignature("a component is not covered")
        except HTTPMessageSignaturesException as error:
            raise SignatureError(
                f"expected an RFC 9421 signature of label {SIGNATURE_LABEL} by the delegated key over"
                f" {', '.join(SIGNED_COMPONENTS)} for {self._origin}, made within {SIGNATURE_WINDOW_S} s of now"
            ) from error
        return result

    async def _use_nonce(self, person: Person, nonce: str | None) -> None:
        if not isinstance(nonce, str) or not MIN_NONCE_CHARS <= len(nonce) <= MAX_NONCE_CHARS:
            raise AuthenticationError(f"expected a nonce of {MIN_NONCE_CHARS} to {MAX_NONCE_CHARS} characters")
        key = hashlib.sha256(person.signing_key + nonce.encode("ascii")).hexdigest()
        if not await self._nonces.first_use(key):
            raise AuthenticationError("this request was received before: sign it again with a new nonce")


@dataclass(frozen=True)
class _Message:
    """A request as the signature library reads it."""

    method: str
    url: str
    headers: CIMultiDictProxy[str]


class _Verifier(HTTPMessageVerifier):
    """The library's verifier with our clock and a window that is as wide to both sides."""

    now_s: float

    def validate_created_and_expires(self, sig_input: Any, max_age: timedelta | None = None) -> None:
        created, expires = sig_input.params.get("created"), sig_input.params.get("expires")
        if created is None or abs(self.now_s - created) > SIGNATURE_WINDOW_S:
            raise InvalidSignature("not created within the window")
        if expires is not None and self.now_s > expires:
            raise InvalidSignature("expired")


def _delegation(value: str) -> Signed:
    if len(value) > 2 * MAX_DELEGATION_BYTES:
        raise AuthenticationError(f"the {DELEGATION_HEADER} header is too long")
    try:
        return decode(Signed, base64.b64decode(value, validate=True), max_bytes=MAX_DELEGATION_BYTES)
    except (binascii.Error, ValueError, MalformedError) as error:
        raise AuthenticationError(f"the {DELEGATION_HEADER} header is not a signed delegation in base64") from error


def _content_digest(request: web.BaseRequest) -> bytes:
    """The one SHA-256 of RFC 9530's ``Content-Digest: sha-256=:...:``."""
    try:
        found: Any = http_sf.parse(_only(request, "Content-Digest").encode("ascii"), tltype="dictionary")
    except ValueError as error:
        raise AuthenticationError("the Content-Digest header is malformed") from error
    digest = found["sha-256"][0] if list(found) == ["sha-256"] else None
    if not isinstance(digest, bytes) or len(digest) != hashlib.sha256().digest_size:
        raise AuthenticationError("expected a Content-Digest of sha-256 and nothing else")
    return digest


def _only(request: web.BaseRequest, name: str) -> str:
    values = request.headers.getall(name, [])
    if len(values) != 1:
        raise AuthenticationError(f"expected one {name} header, got {len(values)}")
    return values[0]
