"""Jobs that wait for people, and people whose delegations were revoked, at the gateway's door."""

from __future__ import annotations

import secrets

from casemate_messaging.jobs import JobStore
from casemate_messaging.revocations import RevocationStore, TrustedRevocations
from casemate_schemas.admission import PrecheckAnswer, Routing
from casemate_schemas.api import JOB_HEADER, JOBS_PATH, KEY_BROKERS_PATH, REVOCATIONS_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.identity import Delegation, Revocation
from casemate_schemas.signatures import Signed, sign
from support.gateway import Caller, Decision, House, now_ms
from support.waiting import record_once


async def test_a_job_waits_until_an_approval_passes_by(a_house: House) -> None:
    """What is awaited is shown, the key broker that said yes is not asked again, and a message about the job wakes it."""
    decisions: list[tuple[Decision, str | None]] = [("awaiting", None)]

    async def says(_: Routing) -> tuple[Decision, str | None]:
        return decisions[-1]

    async with a_house.gateway_running() as gateway:
        clara, nora = a_house.caller("clara"), a_house.caller("north")
        north, own = await a_house.key_broker("north", says), await a_house.key_broker("clara")
        _, reply = await a_house.submitted(clara)
        job_id = reply.json["job_id"]
        jobs = JobStore(await a_house.client("gateway"))
        record = await record_once(jobs, job_id, lambda record: bool(record.approvals["north"].answer))
        assert (record.state, record.approvals["north"].verdict) == ("awaiting_approval", "pending")
        assert decode(Signed, record.approvals["north"].answer).peek(PrecheckAnswer).decision == "awaiting"
        assert {item["verdict"] for item in (await clara.get(f"{JOBS_PATH}/{job_id}")).json["approvals"]} <= {
            "pending",
            "yes",
        }
        decisions.append(("yes", None))
        woken: list[str] = []
        wake = gateway.admission.wake
        gateway.admission.wake = lambda job: (woken.append(job), wake(job))[1]  # type: ignore[method-assign]
        envelope = a_house.envelope(nora, "request", b"sealed", ("north",))
        told = await nora.post(f"{KEY_BROKERS_PATH}/north/messages", envelope, headers={JOB_HEADER: job_id})
        assert (told.status, woken) == (200, [job_id])
        await record_once(jobs, job_id, lambda record: record.state == "queued")
    assert own.asked.count(job_id) == 1 < north.asked.count(job_id)


def revocation(house: House, member: str, by: str, *, before: int | None = None, **changed: object) -> Signed:
    now = now_ms()
    fields: dict[str, object] = {"consortium": house.keys.consortium.id, "member": member, "created": now}
    return sign(
        Revocation(**{**fields, "person": "clara", "before": before or now, **changed}),  # type: ignore[arg-type]
        house.keys.members[by].signing,
    )


async def revoke(caller: Caller, signed: Signed) -> int:
    return (await caller.post(REVOCATIONS_PATH, encode(signed))).status


async def test_a_revoked_person_is_nobody_here(a_house: House) -> None:
    """Everywhere, after a restart too; by their member's word alone; and a later delegation is good."""
    async with a_house.gateway_running():
        lost, admin = a_house.caller("clara", person="clara"), a_house.caller("clara", person="ada")
        stranger = a_house.caller("north", person="clara")
        assert (await lost.get(JOBS_PATH)).status == 200
        assert await revoke(stranger, revocation(a_house, "clara", "north")) == 401
        assert await revoke(stranger, revocation(a_house, "clara", "clara")) == 403
        assert await revoke(admin, revocation(a_house, "clara", "clara", consortium=bytes(32))) == 401
        assert (await lost.get(JOBS_PATH)).status == 200
        signed = revocation(a_house, "clara", "clara")
        assert [await revoke(admin, signed) for _ in range(2)] == [201, 201]
        answer = await lost.get(JOBS_PATH)
        assert (answer.status, answer.json["reason"]) == (401, "not_authenticated")
        assert [(await who.get(JOBS_PATH)).status for who in (admin, stranger)] == [200, 200]
    async with a_house.gateway_running():
        lost.origin = admin.origin = a_house.origin
        assert (await lost.get(JOBS_PATH)).status == 401
        again = a_house.caller("clara", person="clara")
        delegation = again.person.delegation.peek(Delegation).model_copy(update={"not_before": now_ms()})
        renewed = sign(delegation, a_house.keys.members["clara"].signing)
        object.__setattr__(again.person, "delegation", renewed)
        assert (await again.get(JOBS_PATH)).status == 200
        stored = await RevocationStore(await a_house.client("north")).read(1)
        assert [decode(Signed, item.data) for item in stored] == [signed], "a key broker can read it"
        known = TrustedRevocations(lambda: (a_house.keys.consortium,))
        assert [known.offer(decode(Signed, item.data)) for item in stored] == [True]


async def test_rubbish_among_the_revocations_hides_none(a_house: House) -> None:
    async with a_house.gateway_running():
        lost, admin = a_house.caller("clara", person="clara"), a_house.caller("clara", person="ada")
        js = (await a_house.client("gateway")).jetstream()
        for junk in (b"", secrets.token_bytes(5000), encode(revocation(a_house, "clara", "north"))):
            await js.publish(f"casemate.revocation.{secrets.token_hex(32)}", junk)
        assert await revoke(admin, revocation(a_house, "clara", "clara")) == 201
    async with a_house.gateway_running():
        lost.origin = a_house.origin
        assert (await lost.get(JOBS_PATH)).status == 401
