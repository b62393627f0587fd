"""Jobs from submission to their end, over loopback, with key brokers that open the terms and sign what they say."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any, Literal

import pytest
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas.admission import PrecheckAnswer, Routing, Submission
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.job_state import JobEvent, JobRecord, advance
from casemate_schemas.signatures import Signed, sign
from support.gateway import Caller, House, Reply, now_ms

DAY_MS = 24 * 3600 * 1000
Decision = tuple[Literal["yes", "refused"], str | None]


def job_path(submission: Submission) -> str:
    return f"{JOBS_PATH}/{submission.routing.peek(Routing).job_id}"


async def until(caller: Caller, path: str, *states: str) -> dict[str, Any]:
    """The job's status once it is in one of ``states``, heard from its events and then read."""
    async with asyncio.timeout(30):
        while True:
            status = (await caller.get(path)).json
            if status["state"] in states:
                return status
            await asyncio.sleep(0.02)


async def refuses(_: Routing) -> Decision:
    return "refused", "budget_exceeded"


async def test_an_approved_job_is_queued_once(running_house: House) -> None:
    asked = [await running_house.key_broker(name) for name in ("clara", "north")]
    clara = running_house.caller("clara")
    submission, reply = await running_house.submitted(clara)
    path = job_path(submission)
    assert (reply.status, reply.headers["Location"], reply.json["state"]) == (202, path, "awaiting_approval")
    status = await until(clara, path, "queued")
    assert [(item["key_broker"], item["verdict"]) for item in status["approvals"]] == [
        ("clara", "yes"),
        ("north", "yes"),
    ]
    for item in status["approvals"]:
        answer = decode(Signed, base64.b64decode(item["answer"]))
        key = running_house.keys.key_brokers[item["key_broker"]].signing.public
        assert answer.verify(PrecheckAnswer, key).terms == submission.routing.peek(Routing).terms
    assert status["simulation"] is True
    assert [program.asked for program in asked] == [[status["job_id"]]] * 2
    queue = WorkQueue(await running_house.client("worker-1"))
    delivery = await queue.pull(5)
    assert delivery is not None
    assert delivery.job_id == status["job_id"]
    assert await queue.pull(0.2) is None


async def test_the_same_submission_is_the_same_job(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, first = await running_house.submitted(clara)
    again = await clara.post(JOBS_PATH, encode(submission))
    assert (first.status, again.status) == (202, 200)
    assert again.json["created"] == first.json["created"]
    other = running_house.submission(clara, submission.routing.peek(Routing).job_envelope, job_id=first.json["job_id"])
    conflict = await clara.post(JOBS_PATH, encode(other))
    assert (conflict.status, conflict.json["reason"]) == (422, "key_reused")


async def test_a_hundred_hurried_submissions_are_one_job(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    fresh = running_house.submission(clara, submission.routing.peek(Routing).job_envelope)
    replies = await asyncio.gather(*(clara.post(JOBS_PATH, encode(fresh)) for _ in range(20)))
    assert sorted(reply.status for reply in replies) == [200] * 19 + [202]
    assert len((await clara.get(JOBS_PATH)).json["jobs"]) == 2


async def test_one_refusal_ends_the_job_though_another_is_silent(running_house: House) -> None:
    test_over = asyncio.Event()

    async def silent(_: Routing) -> Decision:
        await test_over.wait()
        return "yes", None

    await running_house.key_broker("clara", silent)
    await running_house.key_broker("north", refuses)
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    status = await until(clara, job_path(submission), "refused", "queued")
    assert (status["state"], status["reason"]) == ("refused", "budget_exceeded")
    assert [item["verdict"] for item in status["approvals"]] == ["pending", "refused"]
    assert await WorkQueue(await running_house.client("worker-1")).pull(0.2) is None
    test_over.set()


async def test_a_key_broker_that_comes_late_is_asked_again(running_house: House) -> None:
    north = await running_house.key_broker("north")
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    while not north.asked:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await running_house.key_broker("clara")
    await until(clara, job_path(submission), "queued")
    assert len(north.asked) == 1


async def test_a_job_waits_while_a_key_broker_awaits_approvals(running_house: House) -> None:
    """It holds no worker and is asked again; the others' yes stands meanwhile."""
    answers = iter([("awaiting", None), ("awaiting", None), ("yes", None)])
    other = await running_house.key_broker("clara")

    async def says(_: Routing) -> Any:
        assert await WorkQueue(await running_house.client("worker-1")).pull(0.05) is None
        return next(answers)

    north = await running_house.key_broker("north", says)
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    await until(clara, job_path(submission), "queued")
    assert (len(north.asked), len(other.asked)) == (3, 1)


@pytest.mark.parametrize("lie", ["signer", "terms", "job", "broker", "consortium", "reasonless", "noise"])
async def test_an_answer_that_is_not_the_key_brokers_about_this_job(running_house: House, lie: str) -> None:
    await running_house.key_broker("clara")
    north = await running_house.key_broker("north")
    told = asyncio.Event()

    async def lies(data: bytes) -> bytes:
        answer = decode(Signed, await north.answered(data)).peek(PrecheckAnswer)
        told.set()
        changes: dict[str, Any] = {
            "terms": {"terms": b"o" * 32},
            "job": {"job_id": "f" * 32},
            "broker": {"key_broker": "clara"},
            "consortium": {"consortium": b"o" * 32},
            "reasonless": {"decision": "refused"},
        }.get(lie, {})
        key = running_house.keys.key_brokers["clara" if lie == "signer" else "north"].signing
        return b"\x00" if lie == "noise" else encode(sign(answer.model_copy(update=changes), key))

    north.answers = lies
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    await told.wait()
    told.clear()
    await told.wait()  # asked again: the lie was not taken for an answer
    status = (await clara.get(job_path(submission))).json
    assert status["state"] == "awaiting_approval"
    assert next(item for item in status["approvals"] if item["key_broker"] == "north")["verdict"] == "pending"
    north.answers = None
    await until(clara, job_path(submission), "queued")


async def test_a_deadline_ends_the_wait(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara, deadline=now_ms() + 1000)
    assert (await until(clara, job_path(submission), "expired"))["state"] == "expired"


async def test_polling_with_an_etag(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    path = job_path(submission)
    first = await clara.get(path)
    known = {"If-None-Match": first.headers["ETag"]}
    unchanged = await clara.get(path, headers=known)
    assert (unchanged.status, unchanged.body, unchanged.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert first.headers["Retry-After"] == unchanged.headers["Retry-After"] == "2"
    cancelled = await clara.post(path + "/cancel")
    assert (cancelled.status, cancelled.json["state"]) == (202, "cancelled")
    changed = await clara.get(path, headers=known)
    assert (changed.status, changed.json["state"]) == (200, "cancelled")
    assert "Retry-After" not in changed.headers
    assert (await clara.get(path, headers={"If-None-Match": f'"x", {changed.headers["ETag"]}'})).status == 304


async def test_cancelling(running_house: House) -> None:
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    clara, north = running_house.caller("clara"), running_house.caller("north")
    submission, _ = await running_house.submitted(clara)
    path = job_path(submission)
    await until(clara, path, "queued")
    forbidden = await north.post(path + "/cancel")
    assert (forbidden.status, forbidden.json["reason"]) == (403, "not_allowed")
    assert (await running_house.caller("south").post(path + "/cancel")).status == 404
    assert (await running_house.caller("clara").post(path + "/cancel")).json["state"] == "cancelled"
    assert (await clara.post(path + "/cancel")).status == 202
    assert await WorkQueue(await running_house.client("worker-1")).pull(0.2) is None


@pytest.mark.parametrize("state", ["committing", "sealed", "refused"])
async def test_what_can_no_longer_be_cancelled(running_house: House, state: str) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    await worked(running_house, submission, state)
    reply = await clara.post(job_path(submission) + "/cancel")
    assert (reply.status, reply.json["reason"]) == (409, "wrong_state")
    assert (await clara.get(job_path(submission))).json["state"] == state


async def worked(house: House, submission: Submission, state: str, **changes: Any) -> JobRecord:
    """The record as workers leave it in ``state``."""
    road = {"refused": ("refused",), "running": ("queued", "claimed", "running")}
    road["committing"] = (*road["running"], "committing")
    road["sealed"] = (*road["committing"], "sealed")
    jobs = JobStore(await house.client("worker-1"))
    record = (await jobs.get(submission.routing.peek(Routing).job_id))[0]
    for step in road[state]:
        more = changes if step == state else {}
        record = await jobs.change(
            record.job_id, lambda found, step=step, more=more: advance(found, step, now_ms=now_ms(), **more)
        )
    return record


async def test_whom_a_job_concerns(running_house: House) -> None:
    clara, east = running_house.caller("clara"), running_house.caller("east")
    recipients = (clara.person.signing.public, east.person.signing.public)
    submission, _ = await running_house.submitted(clara, recipients=recipients)
    path = job_path(submission)
    others = ["clara", "north", "east", "south"]
    seen = {name: (await running_house.caller(name).get(path)).status for name in others}
    assert seen == {"clara": 200, "north": 200, "east": 404, "south": 404}
    assert (await east.get(path)).status == 200
    south = running_house.caller("south")
    unknown = [await south.get(path), await south.get(f"{JOBS_PATH}/{'0' * 32}"), await south.get(f"{JOBS_PATH}/x..y")]
    assert len({(reply.status, reply.body) for reply in unknown}) == 1
    listed = {name: len((await running_house.caller(name).get(JOBS_PATH)).json["jobs"]) for name in others}
    assert listed == {"clara": 1, "north": 0, "east": 0, "south": 0}
    assert (await south.get(path + "/events")).status == 404


async def test_the_newest_jobs_are_listed_first(a_house: House) -> None:
    async with a_house.gateway_running(max_jobs_listed=3):
        clara = a_house.caller("clara")
        ids = [(await a_house.submitted(clara))[1].json["job_id"] for _ in range(5)]
        listed = (await clara.get(JOBS_PATH)).json["jobs"]
        assert [job["job_id"] for job in listed] == ids[:1:-1]


REFUSED = {
    "deadline passed": ({"created": -1000, "deadline": -1}, 422, "invalid_parameter"),
    "deadline too far": ({"deadline": 31 * DAY_MS}, 422, "invalid_parameter"),
    "too old": ({"created": -3700_000}, 422, "invalid_parameter"),
    "from the future": ({"created": 400_000}, 422, "invalid_parameter"),
    "unknown key broker": ({"key_brokers": ("clara", "west")}, 422, "invalid_parameter"),
    "another's key broker": ({"job_key_broker": "north"}, 403, "not_allowed"),
    "another consortium": ({"consortium": b"o" * 32}, 403, "not_allowed"),
    "no job envelope": ({"job_envelope": b"o" * 32}, 404, "not_found"),
}


@pytest.mark.parametrize(("changes", "status", "reason"), REFUSED.values(), ids=REFUSED.keys())
async def test_routing_that_is_refused(running_house: House, changes: dict[str, Any], status: int, reason: str) -> None:
    clara = running_house.caller("clara")
    times = {name: now_ms() + changes[name] for name in ("created", "deadline") if name in changes}
    submission, reply = await running_house.submitted(clara, **{**changes, **times})
    assert (reply.status, reply.json["reason"]) == (status, reason)
    assert (await clara.get(job_path(submission))).status == 404


async def posted(house: House, caller: Caller, submission: Submission) -> Reply:
    reply = await caller.post(JOBS_PATH, encode(submission))
    if reply.status >= 400:
        assert (await caller.get(job_path(submission))).status == 404
    return reply


async def test_parts_from_somebody_else(running_house: House) -> None:
    clara, other = running_house.caller("clara"), running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    envelope = submission.routing.peek(Routing).job_envelope
    own, strange = running_house.submission(clara, envelope), running_house.submission(other, envelope)

    async def refused(found: Submission) -> tuple[int, str]:
        reply = await posted(running_house, clara, found)
        return reply.status, reply.json["reason"]

    assert await refused(strange) == (401, "bad_signature")
    assert await refused(own.model_copy(update={"delegation": strange.delegation})) == (401, "not_authenticated")
    assert await refused(own.model_copy(update={"terms_envelope": strange.terms_envelope})) == (403, "not_allowed")
    assert (await posted(running_house, other, strange)).status == 403  # the job envelope is clara's


async def test_terms_envelopes_that_are_refused(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    own = running_house.submission(clara, submission.routing.peek(Routing).job_envelope)
    cut = own.terms_envelope[:-1] + bytes([own.terms_envelope[-1] ^ 1])
    cases = {
        "another kind": (running_house.envelope(clara, "job", b"x", ("clara", "north")), 400),
        "one key broker missing": (running_house.envelope(clara, "terms", b"x", ("clara",)), 422),
        "somebody more": (running_house.envelope(clara, "terms", b"x", ("clara", "north", "south")), 422),
        "somebody else": (running_house.envelope(clara, "terms", b"x", ("clara", "south")), 422),
        "changed ciphertext": (cut, 400),
        "no envelope": (b"nothing", 400),
    }
    for name, (envelope, status) in cases.items():
        reply = await posted(running_house, clara, own.model_copy(update={"terms_envelope": envelope}))
        assert reply.status == status, name


async def test_only_scientists_submit(running_house: House) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    steward = running_house.caller("clara", keys=clara.person.keys, roles=("steward",))
    own = running_house.submission(steward, submission.routing.peek(Routing).job_envelope)
    assert (await posted(running_house, steward, own)).status == 403


@pytest.mark.parametrize("body", [b"", b"\x80", b"{}", b"\xc1" * 100])
async def test_bodies_that_are_no_submission(running_house: House, body: bytes) -> None:
    reply = await running_house.caller("clara").post(JOBS_PATH, body)
    assert (reply.status, reply.json["reason"]) == (400, "malformed")


async def test_a_submission_that_is_too_large(running_house: House) -> None:
    reply = await running_house.caller("clara").post(JOBS_PATH, bytes(1 << 20))
    assert (reply.status, reply.json["reason"]) == (413, "too_large")


async def test_unsigned_and_replayed_requests(running_house: House) -> None:
    clara = running_house.caller("clara")
    async with running_house.session.get(running_house.origin + JOBS_PATH) as response:
        assert response.status == 401
        assert json.loads(await response.read())["type"] == "https://casemate.dev/problems/not_authenticated"
    nonce = "0123456789abcdef"
    assert [(await clara.get(JOBS_PATH, nonce=nonce)).status for _ in range(2)] == [200, 401]


async def test_a_request_with_a_body_where_none_belongs(running_house: House) -> None:
    clara = running_house.caller("clara")
    assert (await clara.request("GET", JOBS_PATH, b"x")).status == 413


# --- events -------------------------------------------------------------------------------------------------------


def frames(text: str) -> list[tuple[int, dict[str, Any]]]:
    """(id, data) of each event in a stream; comments are none."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            assert lines["event"] == "job"
            found.append((int(lines["id"]), json.loads(lines["data"])))
    return found


async def test_events_are_replayed_followed_and_resumed(running_house: House) -> None:
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    path = job_path(submission)
    await until(clara, path, "queued")
    watching = asyncio.create_task(clara.get(path + "/events"))
    assert (await clara.post(path + "/cancel")).status == 202
    reply = await asyncio.wait_for(watching, 20)
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    told = frames(reply.body.decode())
    assert [event["state"] for _, event in told] == ["awaiting_approval", "queued", "cancelled"]
    assert [number for number, _ in told] == sorted({number for number, _ in told})
    assert {event["job_id"] for _, event in told} == {path.rpartition("/")[2]}
    rest = await clara.get(path + "/events", headers={"Last-Event-ID": str(told[0][0])})
    assert frames(rest.body.decode()) == told[1:]
    late = JobEvent.model_validate({**told[1][1], "state": "claimed"})
    await EventLog(await running_house.client("worker-1")).publish(late)  # by a worker that was cancelled
    end = await asyncio.wait_for(clara.get(path + "/events", headers={"Last-Event-ID": str(told[-1][0])}), 20)
    assert (end.status, end.body) == (204, b"")


async def test_a_quiet_stream_lives_and_an_event_that_was_lost_is_made_up_for(a_house: House) -> None:
    async with a_house.gateway_running(heartbeat_s=0.1, reconcile_every_s=0.2, max_event_streams=1) as gateway:
        clara = a_house.caller("clara")
        submission, _ = await a_house.submitted(clara)
        watching = asyncio.create_task(clara.get(job_path(submission) + "/events"))
        while gateway.event_streams.free:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await worked(a_house, submission, "refused")  # and whoever did it died before telling
        reply = await asyncio.wait_for(watching, 20)
        assert ": still here\n\n" in reply.body.decode()
        assert [event["state"] for _, event in frames(reply.body.decode())] == ["awaiting_approval", "refused"]


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "9" * 19, "1" + "²"])
async def test_event_ids_that_are_none(running_house: House, value: str) -> None:
    clara = running_house.caller("clara")
    submission, _ = await running_house.submitted(clara)
    reply = await clara.get(job_path(submission) + "/events", headers={"Last-Event-ID": value})
    assert reply.status == 400


async def test_more_streams_than_there_is_room_for(a_house: House) -> None:
    async with a_house.gateway_running(max_event_streams=1) as gateway:
        clara = a_house.caller("clara")
        submission, _ = await a_house.submitted(clara)
        path = job_path(submission)
        watching = asyncio.create_task(clara.get(path + "/events"))
        while gateway.event_streams.free:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await clara.get(path + "/events")).status == 503
        await clara.post(path + "/cancel")
        assert (await watching).status == 200
