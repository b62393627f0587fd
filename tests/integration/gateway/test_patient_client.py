"""The SDK at a gateway that turns it away for a while: it comes back when it was told to, or says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from casemate._http import BytesBody, Gateway
from casemate.identity import Identity
from casemate_schemas import api
from casemate_schemas.codec import encode
from casemate_schemas.errors import QuotaError, ThrottledError
from casemate_schemas.identity import Delegation
from support.gateway import Caller, House

KIB, MAX_BYTES = 1 << 10, 1 << 20


class Waiting:
    """What the client waits for, and what goes on meanwhile."""

    def __init__(self, meanwhile: Callable[[], Awaitable[object]] | None = None) -> None:
        self.waited_s: list[float] = []
        self._meanwhile = meanwhile

    async def __call__(self, seconds: float) -> None:
        self.waited_s.append(seconds)
        if self._meanwhile is not None:
            await self._meanwhile()


def client(house: House, caller: Caller, sleep: Waiting, session: aiohttp.ClientSession) -> Gateway:
    person = caller.person
    identity = Identity(person.keys, person.delegation, person.delegation.peek(Delegation))
    return Gateway(house.origin, identity, session, sleep=sleep)


async def test_a_member_that_is_full_waits_as_long_as_it_is_told_and_then_gets_in(a_house: House) -> None:
    async with a_house.gateway_running(max_jobs_per_member=1):
        clara = a_house.caller("clara")
        _, first = await a_house.submitted(clara)
        refused, reply = await a_house.submitted(clara)
        assert (reply.status, reply.headers["Retry-After"]) == (429, "60")

        async def cancel() -> None:
            assert (await clara.post(f"{api.JOBS_PATH}/{first.json['job_id']}/cancel")).status == 202

        sleep = Waiting(cancel)
        gateway = client(a_house, clara, sleep, a_house.session)
        answer = await gateway.post(api.JOBS_PATH, BytesBody(encode(refused)), max_bytes=MAX_BYTES)
    assert answer.status == 202
    assert len(sleep.waited_s) == 1 and 60 <= sleep.waited_s[0] <= 75


async def test_a_member_that_stays_full_is_told_so_and_for_how_long(a_house: House) -> None:
    async with a_house.gateway_running(max_stored_bytes_per_member=64 * KIB):
        clara, sleep = a_house.caller("clara"), Waiting()
        gateway = client(a_house, clara, sleep, a_house.session)
        body = BytesBody(a_house.envelope(clara, "dataset", bytes(100 * KIB)))
        with pytest.raises(QuotaError, match=r"\(try again in 60 s\)") as refused:
            await gateway.post(api.ENVELOPES_PATH, body, max_bytes=MAX_BYTES)
    assert refused.value.retry_after_s == 60
    assert [60 <= wait <= 75 for wait in sleep.waited_s] == [True]


async def test_what_would_take_too_long_or_must_not_be_repeated_is_refused_at_once(a_house: House) -> None:
    async with a_house.gateway_running(request_burst_per_member=1, requests_per_s_per_member=0.01):
        clara, sleep = a_house.caller("clara"), Waiting()
        gateway = client(a_house, clara, sleep, a_house.session)
        assert (await gateway.get(api.JOBS_PATH, max_bytes=MAX_BYTES)).status == 200
        with pytest.raises(ThrottledError) as refused:
            await gateway.get(api.JOBS_PATH, max_bytes=MAX_BYTES)
        assert 90 < refused.value.retry_after_s <= 100
    async with a_house.gateway_running(request_burst_per_member=1, requests_per_s_per_member=0.1):
        gateway = client(a_house, clara, sleep, a_house.session)
        assert (await gateway.get(api.JOBS_PATH, max_bytes=MAX_BYTES)).status == 200
        with pytest.raises(ThrottledError) as refused:
            await gateway.post(f"{api.JOBS_PATH}/{'0' * 32}/cancel", max_bytes=MAX_BYTES, again=False)
        assert 1 <= refused.value.retry_after_s <= 10
    assert sleep.waited_s == []
