"""What every call needs: who asks, of which consortium, through which gateway; and one sealed question to a key broker."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from casemate_schemas import api
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.consortium import MAX_CHAIN_BYTES, Consortium, KeyBroker, ManifestChain, verify_versions
from casemate_schemas.custody import (
    AmendLicence,
    BackUpState,
    EraseDataset,
    PrepareDataset,
    RotateSeeds,
    ShowDataset,
)
from casemate_schemas.errors import ManifestError, SealError, UnavailableError, error_from_reason
from casemate_schemas.requests import (
    EndorseState,
    GiveApproval,
    ListApprovals,
    ListDatasets,
    PersonRequest,
    PersonResponse,
    Refusal,
    RegisterDataset,
    RenewBudget,
    ShowApproval,
    ShowBudget,
    ShowState,
    ShowWorkers,
    TellTime,
)
from casemate_schemas.sealing import open_envelope, seal_envelope

from . import hosting
from ._http import BytesBody, Gateway, printable
from .identity import Identity
from .state import State

MAX_RESPONSE_BYTES: Final = 8 << 20

Question = (
    ListDatasets
    | PrepareDataset
    | RegisterDataset
    | ShowDataset
    | AmendLicence
    | EraseDataset
    | ShowBudget
    | RenewBudget
    | ListApprovals
    | ShowApproval
    | GiveApproval
    | ShowWorkers
    | TellTime
    | ShowState
    | EndorseState
    | RotateSeeds
    | BackUpState
)

_R = TypeVar("_R", bound=WireModel)


@dataclass(frozen=True)
class Session:
    """One person's connection to one consortium. ``clock`` gives Unix ms."""

    gateway: Gateway
    identity: Identity
    consortium: Consortium
    state: State
    clock: Callable[[], int]
    attested: set[KeyBroker] = field(default_factory=set, compare=False)
    """Hosted key brokers whose keys, as the manifest lists them, were attested in this session."""

    async def attest(self, broker: KeyBroker, *, fresh: bool = False) -> None:
        """Before anything is sealed to ``broker``: a hosted one has shown that its enclave holds the keys in the manifest.

        Once in a session is enough, since the keys never leave the enclave; ``fresh`` asks again all the same. Raises as
        :func:`.hosting.attest`.
        """
        if broker.hosted == "member" or (broker in self.attested and not fresh):
            return
        found = await hosting.attest(self.gateway, self.consortium, broker.id, now=self.clock())
        hosting.check_listed(broker, found.claims)
        self.attested.add(broker)

    @property
    def simulation(self) -> bool:
        """Whether the consortium's own manifest says that its chips are simulated."""
        return self.consortium.manifest.simulation

    async def newest_chain(self) -> ManifestChain:
        """The chain as the gateway has it now, verified and pinned: others may have moved on since this session began.

        Raises :class:`ManifestError` for an older one or a fork.
        """
        chain = await fetch_chain(self.gateway)
        self.state.accept_chain(chain, self.consortium.id)
        return chain

    async def ask(self, broker: KeyBroker, question: Question, answer: type[_R], *, about: str | None = None) -> _R:
        """What a key broker answers, end to end sealed: the gateway between learns neither question nor answer.

        It is told only what the question is ``about``, if that is given: a job that it should ask about again.

        Raises the typed error of a refusal, :class:`SealError` or :class:`~casemate_schemas.errors.MalformedError` for
        an answer that is not the key broker's to this question, and :class:`~casemate_schemas.errors.UnavailableError`.
        """
        patience = self.gateway.patience()
        while True:
            try:
                return await self._ask_once(broker, question, answer, about)
            except UnavailableError as error:
                await patience.wait(error)

    async def ask_all(
        self, brokers: Sequence[KeyBroker], question: Question, answer: type[_R]
    ) -> tuple[list[tuple[KeyBroker, _R]], dict[str, str]]:
        """What each answers, asked at once; and of those that are away, by id, why. Raises as :meth:`ask` for a wrong answer."""
        answers = await asyncio.gather(*(self.ask(b, question, answer) for b in brokers), return_exceptions=True)
        found: list[tuple[KeyBroker, _R]] = []
        unavailable: dict[str, str] = {}
        for broker, said in zip(brokers, answers, strict=True):
            if isinstance(said, UnavailableError):
                unavailable[broker.id] = str(said)
            elif isinstance(said, BaseException):
                raise said
            else:
                found.append((broker, said))
        return found, unavailable

    async def _ask_once(self, broker: KeyBroker, question: Question, answer: type[_R], about: str | None) -> _R:
        """Each time under a new id, since a key broker takes an id once. Every question may be asked again."""
        await self.attest(broker)
        request = PersonRequest(
            consortium=self.consortium.id,
            key_broker=broker.id,
            id=secrets.token_bytes(16),
            created=self.clock(),
            delegation=self.identity.signed_delegation,
            seen=self.state.ledger_head(broker),
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
        reply = await self.gateway.request(
            "POST",
            path,
            body=BytesBody(sealed),
            max_bytes=MAX_RESPONSE_BYTES,
            headers=None if about is None else {api.JOB_HEADER: about},
            again=False,
        )
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
        if response.head is not None:
            self.state.remember_ledger_head(broker, self.consortium.id, response.head)
        if isinstance(response.body, Refusal):
            raise error_from_reason(response.body.reason, f"{broker.id}: {printable(response.body.message)}")
        if not isinstance(response.body, answer):
            raise SealError(f"key broker {broker.id} gave another kind of answer than asked for")
        return response.body


async def fetch_chain(gateway: Gateway) -> ManifestChain:
    """The gateway's chain, not verified."""
    answer = await gateway.get(api.CONSORTIUM_PATH, max_bytes=MAX_CHAIN_BYTES)
    return decode(ManifestChain, answer.body, max_bytes=MAX_CHAIN_BYTES)


def consortium_at(chain: ManifestChain, digest: bytes, *, consortium: bytes) -> Consortium:
    """The consortium of that id as it was at the manifest of that digest. Raises :class:`ManifestError`."""
    for version in verify_versions(chain, consortium=consortium):
        if version.digest == digest:
            return version
    raise ManifestError("no version of the manifest that this party knows has that digest")
