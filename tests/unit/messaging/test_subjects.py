"""Names on NATS, and what each role may do, judged by NATS' own rule for matching subjects."""

from __future__ import annotations

import pytest
from casemate_messaging.accounts import User, accounts
from casemate_schemas import subjects
from casemate_schemas.errors import MalformedError
from casemate_schemas.subjects import Permissions


def matches(pattern: str, subject: str) -> bool:
    """Whether ``subject`` is among those ``pattern`` stands for: ``*`` is one token, a last ``>`` is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(given) >= len(wanted) and all(w in ("*", g) for w, g in zip(wanted[:-1], given, strict=False))
    return len(given) == len(wanted) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def may_publish(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.publish)


def may_subscribe(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.subscribe)


GATEWAY = subjects.gateway_permissions()
WORKER = subjects.worker_permissions("worker-1")
NORTH = subjects.key_broker_permissions("north")


@pytest.mark.parametrize("value", ["", "a.b", "*", ">", "a b", "A", "-a", "a-", "a" * 65, "a\r\nPUB", "é", "$js"])
def test_token_refuses_what_is_not_one_token(value: str) -> None:
    with pytest.raises(MalformedError):
        subjects.token(value)


@pytest.mark.parametrize("value", ["a", "0", "north", "worker-1", "f" * 64])
def test_token_accepts_names_and_digests(value: str) -> None:
    assert subjects.token(value) == value


@pytest.mark.parametrize(
    "build",
    [
        subjects.key_broker,
        subjects.event,
        subjects.blob_marker,
        subjects.head,
        subjects.inbox_prefix,
        subjects.key_broker_account,
        lambda name: subjects.work("cpu", name),
        lambda name: subjects.blob_chunk("aa", name),
        lambda name: subjects.blob_chunk(name, "aa"),
    ],
)
def test_no_subject_can_be_widened_by_a_name(build) -> None:
    for name in ("north.>", "*", ">", "a.b", ""):
        with pytest.raises(MalformedError):
            build(name)


@pytest.mark.parametrize("op", subjects.GATEWAY_OPS)
def test_only_the_gateway_calls_gateway_ops(op) -> None:
    subject = subjects.key_broker_op("north", op)
    assert may_publish(GATEWAY, subject)
    assert not may_publish(WORKER, subject)
    assert not may_publish(NORTH, subject)


@pytest.mark.parametrize("op", subjects.WORKER_OPS)
def test_only_workers_call_worker_ops(op) -> None:
    subject = subjects.key_broker_op("north", op)
    assert may_publish(WORKER, subject)
    assert not may_publish(GATEWAY, subject)
    assert not may_publish(NORTH, subject)


def test_a_key_broker_hears_only_itself_and_reads_manifests_of_its_own_accord() -> None:
    assert may_subscribe(NORTH, "casemate.kb.north.grant")
    assert may_subscribe(NORTH, "_INBOX_north.x")
    for other in (
        "casemate.kb.south.grant",
        "casemate.kb.northern.grant",
        "_INBOX_south.x",
        "_INBOX_gateway.x",
        "$JS.API.INFO",
    ):
        assert not may_subscribe(NORTH, other)
    assert NORTH.publish == (
        "$JS.API.DIRECT.GET.MANIFESTS.casemate.manifest.*",
        "$JS.API.DIRECT.GET.REVOCATIONS",
        "casemate.ledger-head.north",
        "$JS.API.DIRECT.GET.LEDGER_HEADS.casemate.ledger-head.north",
    )
    assert NORTH.allow_responses


def test_inboxes_are_private() -> None:
    users = {"gateway": GATEWAY, "worker-1": WORKER, "worker-2": subjects.worker_permissions("worker-2")}
    for reader, permissions in users.items():
        for owner in users:
            assert may_subscribe(permissions, f"{subjects.inbox_prefix(owner)}.abc.def") == (reader == owner)


@pytest.mark.parametrize("verb", ["CREATE", "DELETE", "UPDATE", "PURGE", "INFO", "LIST", "SNAPSHOT", "RESTORE"])
def test_workers_have_no_hold_on_streams(verb: str) -> None:
    for stream in (subjects.BLOB_STREAM, *subjects.JOB_STREAMS, subjects.work_stream("cpu")):
        assert not may_publish(WORKER, f"$JS.API.STREAM.{verb}.{stream}")


def test_workers_make_no_consumers() -> None:
    for stream in (subjects.BLOB_STREAM, *subjects.JOB_STREAMS, subjects.work_stream("cpu")):
        assert not may_publish(WORKER, f"$JS.API.CONSUMER.CREATE.{stream}")
        assert not may_publish(WORKER, f"$JS.API.CONSUMER.CREATE.{stream}.x")
        assert not may_publish(WORKER, f"$JS.API.CONSUMER.CREATE.{stream}.x.casemate.blob.chunk.>")


def test_workers_cannot_queue_jobs_or_forget_nonces() -> None:
    assert not may_publish(WORKER, subjects.work("cpu", "a" * 32))
    assert not may_publish(WORKER, f"$KV.{subjects.NONCE_BUCKET}.aa")


def test_the_gateway_deletes_no_stream() -> None:
    for stream in (subjects.BLOB_STREAM, *subjects.JOB_STREAMS, subjects.EVENT_STREAM, subjects.work_stream("cpu")):
        assert not may_publish(GATEWAY, f"$JS.API.STREAM.DELETE.{stream}")
    for stream in subjects.JOB_STREAMS:
        assert not may_publish(GATEWAY, f"$JS.API.STREAM.PURGE.{stream}")


USERS = (
    User("gateway", "gateway", "UG"),
    User("worker", "worker-1", "UW"),
    User("key_broker", "north", "UN"),
    User("key_broker", "south", "US"),
)


def test_every_user_lives_in_one_account() -> None:
    sections = accounts(USERS)
    lives = {user["nkey"]: account for account, section in sections.items() for user in section["users"]}
    assert lives == {"UG": "CASEMATE", "UW": "WORKERS", "UN": "KEY_BROKER_north", "US": "KEY_BROKER_south"}
    assert [a for a, section in sections.items() if "jetstream" in section] == ["CASEMATE"]


def test_key_brokers_reach_no_other_account() -> None:
    for name in ("north", "south"):
        section = accounts(USERS)[f"KEY_BROKER_{name}"]
        read = [
            {"account": "CASEMATE", "subject": "$JS.API.DIRECT.GET.MANIFESTS.casemate.manifest.*"},
            {"account": "CASEMATE", "subject": "$JS.API.DIRECT.GET.REVOCATIONS"},
        ]
        own = [
            {"account": "CASEMATE", "subject": f"casemate.ledger-head.{name}"},
            {"account": "CASEMATE", "subject": f"$JS.API.DIRECT.GET.LEDGER_HEADS.casemate.ledger-head.{name}"},
        ]
        assert section["imports"] == [{"service": service} for service in (*read, *own)]
        assert section["exports"] == [
            {"service": f"casemate.kb.{name}.*", "response_type": "stream", "accounts": ["CASEMATE", "WORKERS"]}
        ]


def test_what_workers_import_is_what_they_may_publish() -> None:
    sections = accounts(USERS)
    imported = {entry["service"]["subject"] for entry in sections["WORKERS"]["imports"]}
    own = {"casemate.worker.worker-1.presence", "$JS.API.DIRECT.GET.WORKERS.casemate.worker.worker-1.drain"}
    assert {s for s in WORKER.publish if not s.startswith("casemate.kb.")} - own == {
        s for s in imported if not s.startswith("casemate.kb.")
    } - set(subjects.PRESENCE_SERVICES)
    assert own < set(WORKER.publish) and set(subjects.PRESENCE_SERVICES) < imported
    assert {"casemate.kb.north.*", "casemate.kb.south.*"} <= imported
    heads = {service: name for name in ("north", "south") for service in subjects.ledger_head_services(name)}
    assert {offer["service"] for offer in sections["CASEMATE"]["exports"]} == {
        *subjects.WORKER_SERVICES,
        *subjects.PRESENCE_SERVICES,
        *subjects.KEY_BROKER_SERVICES,
        *heads,
    }
    for offer in sections["CASEMATE"]["exports"]:
        if (name := heads.get(offer["service"])) is not None:
            assert offer["accounts"] == [f"KEY_BROKER_{name}"]
            continue
        readers = ["KEY_BROKER_north", "KEY_BROKER_south"] if offer["service"] in subjects.KEY_BROKER_SERVICES else []
        of_workers = (*subjects.WORKER_SERVICES, *subjects.PRESENCE_SERVICES)
        workers = ["WORKERS"] if offer["service"] in of_workers else []
        assert offer["accounts"] == [*workers, *readers]


@pytest.mark.parametrize("subject", [subjects.manifest(2), subjects.revocation("a" * 64)])
def test_only_the_gateway_stores_what_everyone_reads(subject: str) -> None:
    assert may_publish(GATEWAY, subject)
    assert not may_publish(WORKER, subject) and not may_publish(NORTH, subject)


def test_a_key_broker_may_answer_each_request_once() -> None:
    (north,) = accounts(USERS)["KEY_BROKER_north"]["users"]
    assert north["permissions"]["allow_responses"]["max"] == 1


@pytest.mark.parametrize(
    "subject",
    [
        f"$KV.{subjects.UPLOAD_BUCKET}.clara.{'a' * 64}",
        f"$KV.{subjects.LEASE_BUCKET}.housekeeping",
        f"$JS.API.STREAM.PURGE.{subjects.UPLOAD_STREAM}",
        f"$JS.API.STREAM.MSG.DELETE.{subjects.JOB_STREAMS[0]}",
        f"$JS.API.DIRECT.GET.{subjects.HEAD_STREAM}",
        f"$JS.API.DIRECT.GET.{subjects.BLOB_MARKER_STREAM}",
    ],
)
def test_only_gateways_know_unfinished_uploads_and_keep_house(subject: str) -> None:
    assert may_publish(GATEWAY, subject)
    assert not may_publish(WORKER, subject)
    assert not may_publish(NORTH, subject)


def test_only_the_gateways_account_may_ask_how_servers_keep_streams() -> None:
    sections = accounts(USERS)
    assert may_publish(GATEWAY, subjects.SERVER_STATUS)
    assert not may_publish(WORKER, subjects.SERVER_STATUS) and not may_publish(NORTH, subjects.SERVER_STATUS)
    system = sections[subjects.SYSTEM_ACCOUNT]
    assert system["users"] == [] and "jetstream" not in system
    assert system["exports"] == [
        {"service": "$SYS.REQ.SERVER.PING.JSZ", "response_type": "stream", "accounts": ["CASEMATE"]}
    ]
    assert [a for a, section in sections.items() if "SYS" in str(section.get("imports"))] == ["CASEMATE"]


def test_a_worker_speaks_of_itself_alone_and_orders_nobody() -> None:
    for worker in ("worker-1", "worker-2"):
        is_own = worker == "worker-1"
        assert may_publish(WORKER, subjects.worker_presence(worker)) == is_own
        assert may_publish(WORKER, f"$JS.API.DIRECT.GET.WORKERS.{subjects.worker_drain(worker)}") == is_own
        assert not may_publish(WORKER, subjects.worker_drain(worker))
        assert may_publish(GATEWAY, subjects.worker_drain(worker))
        assert not may_publish(GATEWAY, subjects.worker_presence(worker))
