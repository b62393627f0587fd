"""What every call needs: who asks, of which consortium, through which gateway; and one sealed question to a key broker."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from casemate_schemas import api
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.consortium import Consortium, KeyBroker, ManifestChain, verify_chain
from casemate_schemas.errors import ManifestError, SealError, UnavailableError, error_from_reason
from casemate_schemas.requests import (
    ListDatasets,
    PersonRequest,
    PersonResponse,
    Refusal,
    RegisterDataset,
    ShowBudget,
)
from casemate_schemas.sealing import open_envelope, seal_envelope

from ._http import ATTEMPTS, BytesBody, Gateway, printable
from .identity import Identity
from .state import State

MAX_RESPONSE_BYTES: Final = 8 << 20

Question = ListDatasets | RegisterDataset | ShowBudget

_R = TypeVar("_R", bound=WireModel)


@dataclass(frozen=True)
class Session:
    """One person's connection to one consortium. ``clock`` gives Unix ms."""

    gateway: Gateway
    identity: Identity
    consortium: Consortium
    chain: ManifestChain
    state: State
    clock: Callable[[], int]

    @property
    def simulation(self) -> bool:
        """Whether the consortium's own manifest says that its chips are simulated."""
        return self.consortium.manifest.simulation

    async def ask(self, broker: KeyBroker, question: Question, answer: type[_R]) -> _R:
        """What a key broker answers, end to end sealed: the gateway between learns neither question nor answer.

        Raises the typed error of a refusal, :class:`SealError` or :class:`~casemate_schemas.errors.MalformedError` for
        an answer that is not the key broker's to this question, and :class:`~casemate_schemas.errors.UnavailableError`.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._ask_once(broker, question, answer)
            except UnavailableError:
                if attempt == ATTEMPTS:
                    raise
            await self.gateway.pause(attempt)
        raise UnavailableError(f"key broker {broker.id} does not answer")

    async def _ask_once(self, broker: KeyBroker, question: Question, answer: type[_R]) -> _R:
        """Each time under a new id, since a key broker takes an id once. Every question may be asked again."""
        request = PersonRequest(
            consortium=self.consortium.id,
            key_broker=broker.id,
            id=secrets.token_bytes(16),
            created=self.clock(),
            delegation=self.identity.signed_delegation,
            body=question,
        )
        sealed = seal_envelope(
            "request",
            encode(request),
            [broker.sealing_key],
            consortium=self.consortium.id,
            key=self.identity.keys.signing,
            created=request.created,
        )
        path = f"{api.KEY_BROKERS_PATH}/{broker.id}/messages"
        reply = await self.gateway.post(path, BytesBody(sealed), max_bytes=MAX_RESPONSE_BYTES, again=False)
        return self._opened(reply.body, broker, request.id, answer)

    def _opened(self, reply: bytes, broker: KeyBroker, request_id: bytes, answer: type[_R]) -> _R:
        _, plaintext = open_envelope(
            reply,
            self.identity.keys.sealing,
            kind="response",
            consortium=self.consortium.id,
            sender=broker.signing_key,
            max_bytes=MAX_RESPONSE_BYTES,
        )
        response = decode(PersonResponse, plaintext, max_bytes=MAX_RESPONSE_BYTES)
        if response.id != request_id:
            raise SealError(f"key broker {broker.id} answered another question")
        if isinstance(response.body, Refusal):
            raise error_from_reason(response.body.reason, f"{broker.id}: {printable(response.body.message)}")
        if not isinstance(response.body, answer):
            raise SealError(f"key broker {broker.id} gave another kind of answer than asked for")
        return response.body


def consortium_at(chain: ManifestChain, digest: bytes, *, consortium: bytes) -> Consortium:
    """The consortium of that id as it was at the manifest of that digest. Raises :class:`ManifestError`."""
    for number, signed in enumerate(chain.manifests, start=1):
        if signed.digest == digest:
            return verify_chain(ManifestChain(manifests=chain.manifests[:number]), consortium=consortium)
    raise ManifestError("no version of the manifest that this party knows has that digest")
