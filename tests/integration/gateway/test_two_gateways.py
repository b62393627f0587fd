"""The same job id submitted through two gateways at once: one job, whoever was faster."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from casemate_schemas.admission import Routing
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import encode
from support.gateway import House

ROUNDS = 5


async def test_the_same_body_is_one_job_and_another_body_is_refused(a_house: House) -> None:
    async with a_house.gateway_running():
        clara = a_house.caller("clara")
        async with a_house.gateway_running():
            doors = (clara, replace(clara, origin=a_house.origin))
            assert doors[0].origin != doors[1].origin
            first, _ = await a_house.submitted(clara)
            envelope = first.routing.peek(Routing).job_envelope
            for _ in range(ROUNDS):
                same = a_house.submission(clara, envelope)
                routing = same.routing.peek(Routing)
                other = a_house.submission(clara, envelope, job_id=routing.job_id)
                posts = [encode(same)] * 4
                replies = await asyncio.gather(*(doors[n % 2].post(JOBS_PATH, body) for n, body in enumerate(posts)))
                assert sorted(reply.status for reply in replies) == [200, 200, 200, 202]
                assert {reply.json["job_id"] for reply in replies} == {routing.job_id}
                assert len({reply.json["created"] for reply in replies}) == 1
                late = [await door.post(JOBS_PATH, encode(other)) for door in doors]
                assert [(reply.status, reply.json["reason"]) for reply in late] == [(422, "key_reused")] * 2
            listed = [job["job_id"] for job in (await doors[1].get(JOBS_PATH)).json["jobs"]]
            assert len(listed) == len(set(listed)) == ROUNDS + 1


async def test_of_two_bodies_under_one_id_one_is_the_job(a_house: House) -> None:
    """At the same moment, through different gateways: the one that was acknowledged is the one that is there."""
    async with a_house.gateway_running():
        clara = a_house.caller("clara")
        async with a_house.gateway_running():
            doors = (clara, replace(clara, origin=a_house.origin))
            first, _ = await a_house.submitted(clara)
            envelope = first.routing.peek(Routing).job_envelope
            for _ in range(ROUNDS):
                one = a_house.submission(clara, envelope)
                job_id = one.routing.peek(Routing).job_id
                bodies = encode(one), encode(a_house.submission(clara, envelope, job_id=job_id))
                posting = zip(doors, bodies, strict=True)
                replies = await asyncio.gather(*(door.post(JOBS_PATH, body) for door, body in posting))
                statuses = [reply.status for reply in replies]
                assert sorted(statuses) == [202, 422]
                winner, loser = statuses.index(202), statuses.index(422)
                assert replies[loser].json["reason"] == "key_reused"
                assert (await doors[loser].post(JOBS_PATH, bodies[winner])).status == 200
                assert (await doors[winner].post(JOBS_PATH, bodies[loser])).status == 422
