"""What is removed when nobody needs it any more, and that nothing is that somebody does, or begins to."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from casemate_gateway.gateway import Gateway
from casemate_gateway.housekeeping import LEASE_S, Housekeeping, Removed, Retention
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.leases import LeaseStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.stored import StoredSizes
from casemate_messaging.uploads import UploadState, UploadStore
from casemate_schemas import subjects
from casemate_schemas.admission import Routing
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.envelope import EnvelopeKind, open_head, split_envelope
from casemate_schemas.errors import ConflictError, IntegrityError, NotFoundError
from casemate_schemas.job_state import advance, revise
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import seal_envelope
from support.gateway import Caller, House, now_ms

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
RETENTION = Retention(unreferenced_s=DAY_S, ended_s=30 * DAY_S, records_s=90 * DAY_S)


@dataclass
class Clock:
    """The real time, and so many seconds more."""

    ahead_s: float = 0.0

    def __call__(self) -> int:
        return now_ms() + int(1000 * self.ahead_s)


@dataclass
class Keeper:
    """A housekeeper with a clock of its own, and what it keeps in order."""

    house: House
    store: EnvelopeStore
    jobs: JobStore
    housekeeping: Housekeeping
    clock: Clock
    worker: KeyRing = field(default_factory=KeyRing.generate)

    async def after(self, days: float) -> Removed:
        self.clock.ahead_s = days * DAY_S
        removed = await self.housekeeping.collect()
        assert removed is not None
        return removed

    async def put(self, kind: EnvelopeKind) -> bytes:
        """A worker's envelope; its digest."""
        consortium = self.house.keys.consortium.id
        data = secrets.token_bytes(600_000)
        envelope = seal_envelope(kind, data, [], consortium=consortium, key=self.worker.signing, created=now_ms())
        signed_head, ciphertext = split_envelope(envelope, max_bytes=1 << 20)

        async def once() -> AsyncIterator[bytes]:
            yield bytes(ciphertext)

        await self.store.put(bytes(signed_head), once())
        return open_head(signed_head).header.digest

    async def there(self, digest: bytes) -> bool:
        """Whether the envelope is there: then all of it is."""
        try:
            stored = await self.store.head(digest)
        except NotFoundError:
            return False
        whole = b"".join([piece async for piece in self.store.ciphertext(stored)])
        return len(whole) == stored.head.header.ciphertext_bytes


async def keeper(house: House) -> Keeper:
    client, clock = await house.client("gateway"), Clock()
    blobs = BlobStore(client, may_purge=True)
    store, jobs = EnvelopeStore(client, blobs), JobStore(client)
    housekeeping = Housekeeping(
        client,
        jobs=jobs,
        blobs=blobs,
        envelopes=store,
        uploads=UploadStore(client, blobs),
        sizes=StoredSizes(client),
        retention=RETENTION,
        log=ProgramLog("gateway"),
        clock=clock,
    )
    return Keeper(house, store, jobs, housekeeping, clock)


async def uploaded(house: House, caller: Caller, kind: EnvelopeKind) -> bytes:
    reply = await caller.post(ENVELOPES_PATH, house.envelope(caller, kind, secrets.token_bytes(600_000)))
    assert reply.status in (200, 201)
    return bytes.fromhex(reply.json["envelope"])


async def moved(found: Keeper, job_id: str, *states: Any, **changes: Any) -> None:
    for state in states:
        await found.jobs.change(job_id, lambda record, state=state: advance(record, state, now_ms=now_ms()))
    if changes:
        await found.jobs.change(job_id, lambda record: revise(record, now_ms=now_ms(), **changes))


async def test_what_goes_and_what_stays(running_house: House) -> None:
    """A day after: what nobody refers to. A month after the job's end: all that was its own. Datasets: never."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    dataset, orphan = await uploaded(running_house, clara, "dataset"), await uploaded(running_house, clara, "job")
    submission, _ = await running_house.submitted(clara)
    routing = submission.routing.peek(Routing)
    old, newest, result = [await found.put(kind) for kind in ("checkpoint", "checkpoint", "result")]
    await moved(found, routing.job_id, "queued", "claimed", "running", checkpoint=newest, upload=result)
    assert await found.after(0.9) == Removed()
    assert await found.after(1.1) == Removed(envelopes=2, blobs=2)
    kept = {"dataset": dataset, "job": routing.job_envelope, "checkpoint": newest, "result": result}
    assert {name: await found.there(digest) for name, digest in kept.items()} == dict.fromkeys(kept, True)
    assert not await found.there(orphan) and not await found.there(old)
    await moved(found, routing.job_id, "failed")
    assert await found.after(29) == Removed(envelopes=1, blobs=1)
    assert not await found.there(newest) and await found.there(result)
    assert await found.after(31) == Removed(envelopes=2, blobs=3)
    assert [await found.there(digest) for digest in kept.values()] == [True, False, False, False]
    gateway = await running_house.client("gateway")
    assert (await gateway.jetstream().stream_info(subjects.BLOB_STREAM)).state.messages == 2
    assert await found.after(89) == Removed()
    assert await found.after(91) == Removed(records=1)
    assert await found.after(3000) == Removed()


async def test_a_job_is_forgotten_long_after_its_end_and_is_never_begun_again(running_house: House) -> None:
    """By whoever posts its submission once more; one that has not ended stays, however old it is."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    (ended, _), (going, _) = [await running_house.submitted(clara) for _ in range(2)]
    paths = [f"{JOBS_PATH}/{submission.routing.peek(Routing).job_id}" for submission in (ended, going)]
    assert (await clara.post(f"{paths[0]}/cancel")).status == 202
    await found.after(89)
    assert [(await clara.get(path)).status for path in paths] == [200, 200]
    assert (await clara.post(JOBS_PATH, encode(ended))).json["state"] == "cancelled"
    assert (await found.after(91)).records == 1
    assert [(await clara.get(path)).status for path in paths] == [404, 200]
    async with running_house.gateway_running() as late:
        object.__setattr__(late, "clock", found.clock)
        again = await replace(clara, origin=running_house.origin).post(JOBS_PATH, encode(ended))
    assert (again.status, again.json["reason"]) == (422, "invalid_parameter")


async def test_only_the_record_that_was_looked_at_is_forgotten(running_house: House) -> None:
    found = await keeper(running_house)
    submission, _ = await running_house.submitted(running_house.caller("clara"))
    job_id = submission.routing.peek(Routing).job_id
    _, revision = await found.jobs.get(job_id)
    await moved(found, job_id, "queued")
    await found.jobs.forget(job_id, revision)
    assert (await found.jobs.get(job_id))[0].state == "queued"


async def test_sizes_are_forgotten_of_what_is_neither_there_nor_on_its_way(running_house: House) -> None:
    found = await keeper(running_house)
    sizes = StoredSizes(await running_house.client("gateway"))
    kept = await uploaded(running_house, running_house.caller("clara"), "dataset")
    size = (await sizes.total("clara")).size
    await sizes.add("clara", "0" * 64, 1000)
    assert (await found.after(0.9), (await sizes.total("clara")).size) == (Removed(), size + 1000)
    assert (await found.after(1.1), (await sizes.total("clara")).size) == (Removed(), size)
    assert [envelope async for envelope, _ in sizes.list()] == [kept.hex()]


async def test_unfinished_uploads_end_at_their_expiry(running_house: House) -> None:
    found = await keeper(running_house)
    async with running_house.gateway_running() as gateway:
        digest, size = secrets.token_bytes(32), 9 << 20
        state = await begun(gateway, digest, size)
        state, _ = await gateway.unfinished.append(
            *state, pieces(4 << 20), 4 << 20, expires=now_ms() + int(1000 * 2 * DAY_S)
        )
        assert await found.after(1.9) == Removed()
        assert await found.after(2.1) == Removed(uploads=1)
        with pytest.raises(NotFoundError):
            await gateway.unfinished.get("clara", state.envelope)
        stream = await (await running_house.client("gateway")).jetstream().stream_info(subjects.BLOB_STREAM)
        assert stream.state.messages == 0


async def begun(gateway: Gateway, digest: bytes, size: int) -> Any:
    now = now_ms()
    state = UploadState(
        member="clara", envelope=digest.hex(), signed_head=b"", digest=digest, size=size, created=now, expires=now
    )
    return state, await gateway.unfinished.create(state)


async def pieces(size: int) -> AsyncIterator[bytes]:
    yield bytes(size)


async def test_an_upload_that_goes_on_just_then(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is counted between the moment the housekeeper saw that the upload has expired and that it ends it."""
    found = await keeper(running_house)
    async with running_house.gateway_running() as gateway:
        state, revision = await begun(gateway, secrets.token_bytes(32), 9 << 20)
        give_up = UploadStore.give_up

        async def late(self: UploadStore, *args: Any) -> None:
            await gateway.unfinished.append(state, revision, pieces(4 << 20), 4 << 20, expires=now_ms() + 10**9)
            await give_up(self, *args)

        monkeypatch.setattr(UploadStore, "give_up", late)
        assert await found.after(1) == Removed()
        kept, _ = await gateway.unfinished.get("clara", state.envelope)
        assert kept.offset == 4 << 20


def blocked(found: Keeper, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """The housekeeper stops once something is condemned, before it looks again: (it has stopped, let it go on)."""
    stopped, go_on = asyncio.Event(), asyncio.Event()
    hold = found.housekeeping._lease.hold

    async def held(condemned: tuple[bytes, ...] = ()) -> None:
        await hold(condemned)
        if condemned:
            stopped.set()
            await go_on.wait()

    monkeypatch.setattr(found.housekeeping._lease, "hold", held)
    return stopped, go_on


async def test_a_job_that_is_submitted_just_then(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its envelope is condemned already: the submission waits, the housekeeper sees the job, and the envelope stays."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    envelope = await uploaded(running_house, clara, "job")
    found.clock.ahead_s = 2 * DAY_S
    stopped, go_on = blocked(found, monkeypatch)
    collecting = asyncio.create_task(found.housekeeping.collect())
    await stopped.wait()
    submission = running_house.submission(clara, envelope)
    submitting = asyncio.create_task(clara.post(JOBS_PATH, encode(submission)))
    async with asyncio.timeout(20):
        while [record async for record, _ in found.jobs.list()] == []:
            pass
    go_on.set()
    assert await collecting == Removed()
    assert (await submitting).status == 202
    assert await found.there(envelope)


async def test_a_job_that_is_submitted_after_the_last_look(
    running_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The housekeeper has seen no job and is about to remove the envelope, which is still there: the submission waits."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    envelope = await uploaded(running_house, clara, "job")
    found.clock.ahead_s = 2 * DAY_S
    stopped, go_on = asyncio.Event(), asyncio.Event()

    async def drop(candidate: Any) -> None:
        stopped.set()
        await go_on.wait()
        await found.store.delete_head(candidate.digest, sequence=candidate.sequence)

    monkeypatch.setattr(found.housekeeping, "_drop_head", drop)
    asked = asyncio.Event()
    condemned = LeaseStore.condemned

    async def heard(self: LeaseStore) -> frozenset[bytes]:
        answer = await condemned(self)
        asked.set()
        return answer

    monkeypatch.setattr(LeaseStore, "condemned", heard)
    collecting = asyncio.create_task(found.housekeeping.collect())
    await stopped.wait()
    asked.clear()
    submission = running_house.submission(clara, envelope)
    submitting = asyncio.create_task(clara.post(JOBS_PATH, encode(submission)))
    await asked.wait()
    go_on.set()
    assert await collecting == Removed(envelopes=1, blobs=1)
    reply = await submitting
    assert (reply.status, reply.json["reason"]) == (404, "not_found")


async def test_a_job_that_is_submitted_too_late(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The envelope goes between the submission's look and the record: the job fails, and says why."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    envelope = await uploaded(running_house, clara, "job")
    create = JobStore.create

    async def late(self: JobStore, record: Any) -> Any:
        await found.after(2)
        return await create(self, record)

    monkeypatch.setattr(JobStore, "create", late)
    submission = running_house.submission(clara, envelope)
    reply = await clara.post(JOBS_PATH, encode(submission))
    assert (reply.status, reply.json["reason"]) == (404, "not_found")
    record, _ = await found.jobs.get(submission.routing.peek(Routing).job_id)
    assert (record.state, record.reason) == ("failed", "not_found")


async def test_what_is_stored_anew_stays(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A housekeeper that slept: what it was about to remove was removed by another, and uploaded once more."""
    found, rival, clara = await keeper(running_house), await keeper(running_house), running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(600_000))
    assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201
    digest = open_head(split_envelope(envelope, max_bytes=1 << 20)[0]).header.digest
    found.clock.ahead_s = 2 * DAY_S
    drop = Housekeeping._drop_head

    async def asleep(self: Housekeeping, candidate: Any) -> None:
        if self is found.housekeeping:
            rival.clock.ahead_s = 2 * DAY_S + 2 * LEASE_S
            assert await rival.housekeeping.collect() == Removed(envelopes=1, blobs=1)
            assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201
        await drop(self, candidate)

    monkeypatch.setattr(Housekeeping, "_drop_head", asleep)
    with pytest.raises(ConflictError):
        await found.housekeeping.collect()
    assert await found.there(digest)


async def test_one_at_a_time(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    found, rival, clara = await keeper(running_house), await keeper(running_house), running_house.caller("clara")
    await uploaded(running_house, clara, "job")
    found.clock.ahead_s = rival.clock.ahead_s = 2 * DAY_S
    stopped, go_on = blocked(found, monkeypatch)
    collecting = asyncio.create_task(found.housekeeping.collect())
    await stopped.wait()
    assert await rival.housekeeping.collect() is None
    found.clock.ahead_s += 2 * LEASE_S
    go_on.set()
    with pytest.raises(ConflictError):
        await collecting
    rival.clock.ahead_s += 2 * LEASE_S
    assert await rival.housekeeping.collect() == Removed(envelopes=1, blobs=1)


async def test_what_cannot_be_read_is_not_taken_for_nothing(running_house: House) -> None:
    """A broken job record stops everything; a broken head stops the removal of ciphertexts, for it may name one."""
    found, clara = await keeper(running_house), running_house.caller("clara")
    dataset = await uploaded(running_house, clara, "dataset")
    client = await running_house.client("gateway")
    head = subjects.head(dataset.hex())
    await client.jetstream().purge_stream(subjects.HEAD_STREAM, subject=head)
    await client.jetstream().publish(head, b"spoilt")
    with pytest.raises(IntegrityError):
        await found.after(1000)
    await client.jetstream().publish(subjects.job_record("a" * 32), b"spoilt")
    with pytest.raises(IntegrityError):
        await found.after(1000)
    assert (await client.jetstream().stream_info(subjects.BLOB_STREAM)).state.messages == 2
