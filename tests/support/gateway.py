"""A real gateway on a real nats-server for one test, people who sign requests to it, and key brokers that sign answers."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
from casemate_gateway.app import running
from casemate_gateway.gateway import Gateway
from casemate_gateway.settings import Settings
from casemate_messaging.logs import ProgramLog
from casemate_messaging.rpc import serve
from casemate_schemas import subjects
from casemate_schemas.admission import PrecheckAnswer, PrecheckRequest, Routing, Submission
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.envelope import EnvelopeKind, open_head
from casemate_schemas.sealing import open_envelope, seal_envelope
from casemate_schemas.signatures import sign
from nats.aio.client import Client

from .consortium import ConsortiumKeys, PersonKeys, consortium_for_tests
from .http import signed_request
from .nats import NatsStack


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Reply:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class Caller:
    """A person at the gateway's door."""

    person: PersonKeys
    origin: str
    session: aiohttp.ClientSession

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        sent: Callable[[], AsyncIterator[bytes]] | bytes | None = None,
        **options: Any,
    ) -> Reply:
        """A signed request; ``sent`` is what goes over the wire, if it is not the ``body`` that was signed."""
        signed = signed_request(
            self.person.signing, self.person.delegation, method, self.origin + path, body, **options
        )
        data = sent() if callable(sent) else io.BytesIO(body if sent is None else sent)
        async with self.session.request(
            method, signed.url, data=data, headers={**signed.headers, **(headers or {})}
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: bytes = b"", **options: Any) -> Reply:
        return await self.request("POST", path, body, **options)


Decision = Literal["yes", "awaiting", "refused"]


@dataclass
class KeyBrokerProgram:
    """A key broker as the gateway sees it: it opens terms with its own key and signs what it says."""

    keys: ConsortiumKeys
    name: str
    says: Callable[[Routing], Awaitable[tuple[Decision, str | None]]]
    people: list[PersonKeys]
    asked: list[str] = field(default_factory=list)
    answers: Callable[[bytes], Awaitable[bytes]] | None = None
    """What it does instead of :meth:`answered`, if it is not what it should be."""

    async def precheck(self, data: bytes) -> bytes:
        return await (self.answers or self.answered)(data)

    async def answered(self, data: bytes) -> bytes:
        request = decode(PrecheckRequest, data)
        routing = request.submission.routing.peek(Routing)
        self.asked.append(routing.job_id)
        open_head(request.job_head, kind="job", sender=request.submission.routing.signer)
        _, terms = open_envelope(
            request.submission.terms_envelope,
            self.keys.key_brokers[self.name].sealing,
            kind="terms",
            consortium=self.keys.consortium.id,
            sender=request.submission.routing.signer,
            max_bytes=1 << 20,
        )
        decision, reason = await self.says(routing)
        answer = PrecheckAnswer(
            consortium=self.keys.consortium.id,
            key_broker=self.name,
            job_id=routing.job_id,
            terms=hashlib.sha256(terms).digest(),
            decision=decision,
            reason=reason,
            detail=None,
            at=now_ms(),
        )
        return encode(sign(answer, self.keys.key_brokers[self.name].signing))

    async def message(self, envelope: bytes) -> bytes:
        """Answers, to the person who asks, with what they sent, backwards."""
        own, consortium = self.keys.key_brokers[self.name], self.keys.consortium.id
        head, text = open_envelope(envelope, own.sealing, kind="request", consortium=consortium, max_bytes=1 << 20)
        self.asked.append(head.header.digest.hex())
        person = next(p for p in self.people if p.signing.public == head.header.preamble.sender)
        to = [person.keys.sealing.public]
        return seal_envelope("response", text[::-1], to, consortium=consortium, key=own.signing, created=now_ms())


async def yes(_: Routing) -> tuple[Decision, str | None]:
    return "yes", None


@dataclass(repr=False)
class House:
    """Everything of one test: the gateway's address, its people and its key brokers."""

    keys: ConsortiumKeys
    stack: NatsStack
    settings: Settings
    exits: AsyncExitStack
    session: aiohttp.ClientSession
    origin: str = ""
    people: list[PersonKeys] = field(default_factory=list)

    def caller(self, member: str, **options: Any) -> Caller:
        """A new person of ``member``."""
        person = self.keys.person(member, not_before=now_ms() - 3 * 3600_000, **options)
        self.people.append(person)
        return Caller(person, self.origin, self.session)

    @asynccontextmanager
    async def gateway_running(self, **changes: Any) -> AsyncIterator[Gateway]:
        """A gateway in this process."""
        client = await self.stack.connect("gateway")
        settings = self.settings.model_copy(update=changes)
        async with running(settings, client, log=ProgramLog("gateway")) as (origin, gateway):
            self.origin = origin
            yield gateway

    async def key_broker(
        self, name: str, says: Callable[[Routing], Awaitable[tuple[Decision, str | None]]] = yes
    ) -> KeyBrokerProgram:
        """A key broker that serves until the test ends."""
        program = KeyBrokerProgram(self.keys, name, says, self.people)
        client = await self.stack.connect(name)
        handlers = {"precheck": program.precheck, "message": program.message}
        await self.exits.enter_async_context(await serve(client, subjects.key_broker(name), handlers))
        return program

    async def client(self, user: str) -> Client:
        return await self.stack.connect(user)

    def envelope(
        self, caller: Caller, kind: EnvelopeKind, plaintext: bytes, recipients: tuple[str, ...] = ("clara",)
    ) -> bytes:
        """An envelope from ``caller`` to key brokers."""
        publics = [self.keys.key_brokers[name].sealing.public for name in recipients]
        return seal_envelope(
            kind,
            plaintext,
            publics,
            consortium=self.keys.consortium.id,
            key=caller.person.signing,
            created=now_ms(),
        )

    def submission(self, caller: Caller, job_envelope: bytes, **changes: Any) -> Submission:
        """A submission about an envelope of that digest; ``changes`` go to the routing header."""
        terms = secrets.token_bytes(64)
        fields: dict[str, Any] = {
            "consortium": self.keys.consortium.id,
            "job_id": secrets.token_hex(16),
            "terms": hashlib.sha256(terms).digest(),
            "job_envelope": job_envelope,
            "job_key_broker": "clara",
            "key_brokers": ("clara", "north"),
            "recipients": (caller.person.signing.public,),
            "created": now_ms(),
            "deadline": now_ms() + 3600_000,
        }
        routing = Routing.model_validate({**fields, **changes})
        known = tuple(name for name in routing.key_brokers if name in self.keys.key_brokers)
        return Submission(
            routing=sign(routing, caller.person.signing),
            delegation=caller.person.delegation,
            terms_envelope=self.envelope(caller, "terms", terms, known),
        )

    async def submitted(self, caller: Caller, **changes: Any) -> tuple[Submission, Reply]:
        """Uploads a job envelope and posts a submission about it."""
        envelope = self.envelope(caller, "job", secrets.token_bytes(1000))
        stored = await caller.post(ENVELOPES_PATH, envelope)
        changes = {"job_envelope": bytes.fromhex(stored.json["envelope"]), **changes}
        submission = self.submission(caller, **changes)
        return submission, await caller.post(JOBS_PATH, encode(submission))


@asynccontextmanager
async def house(folder: Path, stack: NatsStack) -> AsyncIterator[House]:
    """A house without a gateway yet."""
    keys = consortium_for_tests()
    manifest_file = folder / "consortium.manifest"
    manifest_file.write_bytes(encode(keys.chain))
    settings = Settings(
        nats_url=stack.url,
        nats_seed_file=stack.seeds["gateway"],
        consortium=keys.consortium.id.hex(),
        manifest_file=manifest_file,
        port=0,
        precheck_retry_s=0.05,
    )
    async with AsyncExitStack() as exits, aiohttp.ClientSession() as session:
        yield House(keys, stack, settings, exits, session)
