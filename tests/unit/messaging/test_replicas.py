"""Reads that a replica answers which is behind: what must be there is looked for again, for a while."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_messaging import direct, jobs
from casemate_messaging.jobs import JobStore
from casemate_schemas.codec import encode
from casemate_schemas.errors import NotFoundError
from casemate_schemas.job_state import JobRecord, advance

QUEUED = JobRecord(
    job_id="a" * 32, routing=b"r", job_envelope=bytes(32), submission=bytes(32), approvals={}, created=1, updated=1
)
CLAIMED = advance(advance(QUEUED, "queued", now_ms=2), "claimed", now_ms=3, worker="worker-1")
MISSING = SimpleNamespace(data=b"", headers={"Status": "404"})


def answer(record: JobRecord, revision: int) -> Any:
    return SimpleNamespace(data=encode(record), headers={"Nats-Sequence": str(revision), "Nats-Subject": "x"})


class Client:
    """Answers reads with ``replies``, the last one again and again; answers each write with ``written``, revision 7."""

    def __init__(self, *replies: Any, written: bytes = b'{"stream":"KV_jobs-0","seq":7}') -> None:
        self.replies = list(replies)
        self.written = written
        self.asked = 0

    def jetstream(self, **_: object) -> None:
        """Nothing of it is used here."""

    def new_inbox(self) -> str:
        return "_INBOX"

    async def subscribe(self, _: str, cb: Callable[[Any], Awaitable[None]]) -> None:
        self.answer = cb

    async def publish(self, *_: object, reply: str, **__: object) -> None:
        await self.answer(SimpleNamespace(subject=reply, data=self.written, headers=None))

    async def request(self, *_: object, **__: object) -> Any:
        self.asked += 1
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BEHIND_S", 0.0)
    monkeypatch.setattr(jobs, "_RETRY_S", 0.0)
    monkeypatch.setattr(jobs, "REPLICA_LAG_S", 0.05)


async def test_what_must_be_there_is_looked_for_again() -> None:
    client: Any = Client(MISSING, MISSING, answer(QUEUED, 3))
    assert (await direct.read_last(client, "S", "s", patience_s=5)).sequence == 3
    with pytest.raises(NotFoundError):
        await direct.read_last(Client(MISSING), "S", "s", patience_s=0.05)  # type: ignore[arg-type]


async def test_what_is_never_there_is_looked_for_more_and_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever asks for what there is not has NATS asked thirty times."""
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    loop = SimpleNamespace(time=lambda: now)
    monkeypatch.setattr(direct, "_BEHIND_S", 0.1)
    monkeypatch.setattr(direct, "asyncio", SimpleNamespace(get_running_loop=lambda: loop, sleep=sleep))
    client: Any = Client(MISSING)
    with pytest.raises(NotFoundError):
        await direct.read_last(client, "S", "s", patience_s=3.0)
    assert (client.asked, round(now, 3)) == (6, 3.1)


async def test_what_may_not_be_there_is_looked_for_once() -> None:
    client: Any = Client(MISSING, answer(QUEUED, 3))
    with pytest.raises(NotFoundError):
        await JobStore(client).get(QUEUED.job_id)
    assert client.asked == 1


async def test_a_store_reads_what_it_wrote() -> None:
    """Not the revision before, nor nothing."""
    client: Any = Client(MISSING, answer(QUEUED, 3), answer(CLAIMED, 7))
    store = JobStore(client)
    await store.update(CLAIMED, 3)
    assert await store.get(CLAIMED.job_id) == (CLAIMED, 7)


async def test_a_job_that_is_there_already_is_looked_for_again() -> None:
    refused = (
        b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"KV_jobs-0","seq":0}'
    )
    client: Any = Client(MISSING, answer(QUEUED, 3), written=refused)
    assert await JobStore(client).create(QUEUED) == (QUEUED, 3, False)


async def test_a_revision_that_never_comes_was_none() -> None:
    """A NATS that lies about a revision makes a read slow once, and not wrong for ever."""
    client: Any = Client(answer(QUEUED, 3))
    store = JobStore(client)
    await store.update(CLAIMED, 3)
    assert await store.get(QUEUED.job_id) == (QUEUED, 3)
    asked = client.asked
    assert await store.get(QUEUED.job_id) == (QUEUED, 3)
    assert client.asked == asked + 1
