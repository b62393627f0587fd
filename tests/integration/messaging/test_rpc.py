from __future__ import annotations

import asyncio
import logging

import pytest
from casemate_messaging import rpc
from casemate_messaging.connection import settle
from casemate_schemas.errors import (
    BudgetError,
    CasemateError,
    LicenceError,
    MalformedError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from support.nats import NatsStack

GRANT = "casemate.kb.north.grant"


async def served(stack: NatsStack, handler: rpc.Handler, **options):
    return await rpc.serve(await stack.connect("north"), "casemate.kb.north", {"grant": handler}, **options)


async def test_an_answer_of_any_bytes(nats_stack: NatsStack) -> None:
    async def echo(payload: bytes) -> bytes:
        return payload

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, echo):
        for payload in (b"", b"\x00", b"\x01\xff", bytes(rpc.MAX_RPC_BYTES)):
            assert await rpc.call(worker, GRANT, payload, 10) == payload
        with pytest.raises(TooLargeError):
            await rpc.call(worker, GRANT, bytes(rpc.MAX_RPC_BYTES + 1), 10)


async def test_an_error_crosses_as_its_reason_alone(nats_stack: NatsStack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def refuse(_: bytes) -> bytes:
        raise LicenceError("row 17 of the secret cohort")

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, refuse):
        with pytest.raises(LicenceError) as caught:
            await rpc.call(worker, GRANT, b"", 10)
    assert "secret" not in str(caught.value)
    assert str(caught.value) == f"{GRANT} refused: licence_forbids"
    assert "secret" not in caplog.text


async def test_a_public_error_crosses_with_its_text_bounded_and_printable(nats_stack: NatsStack) -> None:
    async def refuse(_: bytes) -> bytes:
        raise rpc.PublicError(BudgetError("needs 3.0,\n\x1b[31m has 1.0 " + "x" * 10_000))

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, refuse):
        with pytest.raises(BudgetError, match=r"needs 3.0,") as caught:
            await rpc.call(worker, GRANT, b"", 10)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


async def test_what_nobody_foresaw_tells_nothing(nats_stack: NatsStack, caplog: pytest.LogCaptureFixture) -> None:
    async def stumble(_: bytes) -> bytes:
        raise KeyError("canary-3141")

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, stumble):
        with pytest.raises(CasemateError) as caught:
            await rpc.call(worker, GRANT, b"", 10)
    assert type(caught.value) is CasemateError
    assert "canary" not in str(caught.value) + caplog.text
    assert "KeyError" in caplog.text


async def test_an_answer_over_the_bound_is_an_error_not_a_silence(nats_stack: NatsStack) -> None:
    async def chatter(_: bytes) -> bytes:
        return bytes(rpc.MAX_RPC_BYTES + 1)

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, chatter):
        with pytest.raises(CasemateError, match="internal"):
            await rpc.call(worker, GRANT, b"", 10)


async def test_an_unknown_op_is_not_found(nats_stack: NatsStack) -> None:
    async def echo(payload: bytes) -> bytes:
        return payload

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, echo):
        with pytest.raises(NotFoundError):
            await rpc.call(worker, "casemate.kb.north.commit", b"", 10)


async def test_nobody_there_is_told_at_once(nats_stack: NatsStack) -> None:
    """Across accounts as well: the caller need not wait for its timeout of an hour."""
    worker = await nats_stack.connect("worker-1")
    with pytest.raises(UnavailableError, match="nobody answers"):
        await asyncio.wait_for(rpc.call(worker, GRANT, b"", 3600), 30)


async def test_no_answer_in_time_is_unavailable(nats_stack: NatsStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a handler that never ends does not keep its program from ending."""
    monkeypatch.setattr(rpc, "CLOSE_GRACE_S", 0.1)
    asked = asyncio.Event()

    async def never(_: bytes) -> bytes:
        asked.set()
        await asyncio.Event().wait()
        return b""

    worker = await nats_stack.connect("worker-1")
    server = await served(nats_stack, never)
    with pytest.raises(UnavailableError):
        await rpc.call(worker, GRANT, b"", 0.3)
    assert asked.is_set()
    await asyncio.wait_for(server.close(), 20)


async def test_more_than_there_is_room_for_are_told_to_come_back(nats_stack: NatsStack) -> None:
    free, running = asyncio.Event(), 0

    async def slow(_: bytes) -> bytes:
        nonlocal running
        running += 1
        await free.wait()
        return b"done"

    worker = await nats_stack.connect("worker-1")
    async with await served(nats_stack, slow, max_concurrency=3):
        calls = [asyncio.create_task(rpc.call(worker, GRANT, b"", 20)) for _ in range(8)]
        done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        while len(waiting) > 3:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert running == 3
        free.set()
        assert [await call for call in waiting] == [b"done"] * 3
    assert all(isinstance(call.exception(), UnavailableError) for call in done)
    assert len(done) == 5


async def test_close_waits_for_handlers_under_way(nats_stack: NatsStack) -> None:
    asked, free = asyncio.Event(), asyncio.Event()

    async def slow(_: bytes) -> bytes:
        asked.set()
        await free.wait()
        return b"done"

    worker = await nats_stack.connect("worker-1")
    server = await served(nats_stack, slow)
    call = asyncio.create_task(rpc.call(worker, GRANT, b"", 20))
    await asked.wait()
    closing = asyncio.create_task(server.close())
    await settle(worker)
    assert not closing.done()
    free.set()
    await closing
    assert await call == b"done"


@pytest.mark.parametrize("reply", [b"", b"\x02", b"plain text", b"\x01", b"\x01\xc1", b"\x01" + bytes(5000)])
async def test_a_reply_that_is_none_is_malformed(nats_stack: NatsStack, reply: bytes) -> None:
    north, worker = await nats_stack.connect("north"), await nats_stack.connect("worker-1")

    async def answer(message) -> None:
        await north.publish(message.reply, reply)

    await north.subscribe("casemate.kb.north.*", cb=answer)
    await settle(north)
    with pytest.raises(MalformedError):
        await rpc.call(worker, GRANT, b"", 10)


async def test_one_request_gets_one_reply(nats_stack: NatsStack) -> None:
    """The server lets a key broker answer once and no more."""
    north, worker = await nats_stack.connect("north"), await nats_stack.connect("worker-1")
    heard: list[bytes] = []

    async def listen(message) -> None:
        heard.append(message.data)

    async def answer(message) -> None:
        await north.publish(message.reply, b"first")
        await north.publish(message.reply, b"second")

    inbox = worker.new_inbox()
    await worker.subscribe(inbox, cb=listen)
    await north.subscribe("casemate.kb.north.*", cb=answer)
    await settle(worker)
    await settle(north)
    await worker.publish(GRANT, b"", reply=inbox)
    async with asyncio.timeout(10):
        while not nats_stack.errors["north"]:
            await settle(worker)
            await settle(north)
    await settle(worker)
    assert heard == [b"first"]
    assert "permissions violation" in str(nats_stack.errors["north"][0]).lower()
