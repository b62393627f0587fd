"""Settings, state folder, seed secrets, and the consortium it is pinned to."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from casemate_key_broker import audit_log
from casemate_key_broker.__main__ import open_key_broker
from casemate_key_broker.database import Database, get_meta
from casemate_key_broker.handlers import Handlers
from casemate_key_broker.party import pin_consortium
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_key_broker.settings import Settings
from casemate_messaging.files import read_file
from casemate_messaging.logs import ProgramLog
from casemate_schemas.admission import PrecheckAnswer
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ConsortiumManifest, ManifestChain, sign_manifest
from casemate_schemas.errors import (
    AuthenticationError,
    IntegrityError,
    MalformedError,
    ManifestError,
    NotFoundError,
    SetupError,
    UnavailableError,
)
from casemate_schemas.grant import NonceReply, NonceRequest
from casemate_schemas.identity import Revocation
from casemate_schemas.requests import ListApprovals
from casemate_schemas.signatures import Signed, sign
from support.key_brokers import Bench


def _settings_file(folder: Path, **changed: Any) -> Path:
    fields = {
        "key_broker": "north",
        "nats_url": "nats://127.0.0.1:4222",
        "nats_seed_file": "north.nk",
        "consortium": "07" * 32,
        "manifest_file": "manifest",
        "keys_file": "keys",
        "state_dir": "state",
    } | changed
    path = folder / "settings.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in fields.items()))
    return path


def _founding(bench: Bench, folder: Path, key_broker: str = "north") -> Settings:
    """Of a key broker in ``bench``'s first manifest, with its keys and nothing else in its folder."""
    (folder / "manifest").write_bytes(encode(bench.chain))
    (folder / "keys").touch(mode=0o600)
    (folder / "keys").write_text(bench.key_brokers[key_broker].to_text())
    files = {"keys_file": folder / "keys", "manifest_file": folder / "manifest", "state_dir": folder / "state"}
    return Settings.load(_settings_file(folder, key_broker=key_broker, consortium=bench.consortium.id.hex(), **files))


def test_the_environment_stands_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _settings_file(tmp_path)
    assert Settings.load(path).max_concurrency == 16
    monkeypatch.setenv("CASEMATE_KEY_BROKER_MAX_CONCURRENCY", "3")
    monkeypatch.setenv("CASEMATE_KEY_BROKER_STATE_DIR", "/elsewhere")
    settings = Settings.load(path)
    assert (settings.max_concurrency, settings.state_dir, settings.key_broker) == (3, Path("/elsewhere"), "north")


@pytest.mark.parametrize(
    "changed",
    [{"key_broker": "North"}, {"consortium": "07"}, {"nonce_ttl_s": "0"}, {"surprise": "1"}],
)
def test_settings_that_cannot_be(tmp_path: Path, changed: dict[str, str]) -> None:
    with pytest.raises(SetupError, match=next(iter(changed))):
        Settings.load(_settings_file(tmp_path, **changed))


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("key_broker = \n")
    for name in ("missing.toml", "broken.toml"):
        with pytest.raises(SetupError):
            Settings.load(tmp_path / name)


def test_private_files_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"secret")
    path.chmod(0o640)
    with pytest.raises(SetupError, match="chmod 600"):
        read_file(path, 100, private=True)
    path.chmod(0o600)
    assert read_file(path, 6, private=True) == b"secret"
    with pytest.raises(SetupError):
        read_file(path, 5)
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    with pytest.raises(SetupError, match="chmod 700"):
        Database(folder)


def test_a_state_is_open_once_and_of_one_schema(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    database = Database(folder)
    with pytest.raises(SetupError, match="another process"):
        Database(folder)
    with database.transaction() as tx:
        tx.execute("PRAGMA user_version=2")
    database.close()
    with pytest.raises(SetupError, match="schema 2"):
        Database(folder)


def test_a_seed_secret_is_kept_and_never_made_again(tmp_path: Path) -> None:
    seeds = SeedSecrets(tmp_path, needed=set())
    share = seeds.share(1, b"\x07" * 32)
    assert seeds.epoch == 1 and len(share) == 32 and share.hex() not in repr(seeds)
    assert SeedSecrets(tmp_path, needed={1}).share(1, b"\x07" * 32) == share
    assert SeedSecrets(tmp_path, needed={1}).share(1, b"\x08" * 32) != share
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "seed-secret-2").write_bytes(os.urandom(32))
    (tmp_path / "seed-secret-2").chmod(0o600)
    later = SeedSecrets(tmp_path, needed={1})
    assert later.epoch == 2 and later.share(1, b"\x07" * 32) == share
    file.unlink()
    with pytest.raises(IntegrityError, match="epoch 1"):
        SeedSecrets(tmp_path, needed={1})


@pytest.mark.parametrize(("secret", "mode"), [(bytes(31), 0o600), (bytes(32), 0o644)])
def test_a_seed_secret_that_is_none(tmp_path: Path, secret: bytes, mode: int) -> None:
    path = tmp_path / "seed-secret-1"
    path.write_bytes(secret)
    path.chmod(mode)
    with pytest.raises(IntegrityError):
        SeedSecrets(tmp_path, needed=set())


def test_it_never_goes_back_behind_a_manifest(bench: Bench, tmp_path: Path) -> None:
    database = Database(tmp_path / "state")
    first = bench.consortium

    def following(name: str) -> ManifestChain:
        fields = dict(first.manifest) | {"number": 2, "previous": first.digest, "name": name}
        keys = {member: ring.signing for member, ring in bench.members.items()}
        return ManifestChain(manifests=(*bench.chain.manifests, sign_manifest(ConsortiumManifest(**fields), keys)))

    for chain, number in ((bench.chain, 1), (following("grown"), 2), (following("grown"), 2)):
        assert pin_consortium(database, "north", first.id, chain, 1).manifest.number == number
    for older in (bench.chain, following("forked")):
        with pytest.raises(ManifestError):
            pin_consortium(database, "north", first.id, older, 1)
    for key_broker, consortium in (("south", first.id), ("north", os.urandom(32))):
        with pytest.raises(SetupError):
            pin_consortium(database, key_broker, consortium, following("grown"), 1)
    database.close()


def test_the_keys_must_be_those_in_the_manifest(bench: Bench, tmp_path: Path) -> None:
    settings = _founding(bench, tmp_path)
    for owner, expected in (("south", SetupError), ("north", None)):
        settings.keys_file.write_text(bench.key_brokers[owner].to_text())
        database = Database(settings.state_dir)
        if expected is None:
            assert open_key_broker(settings, database).manifests.current.id == bench.consortium.id
        else:
            with pytest.raises(expected, match="other keys"):
                open_key_broker(settings, database)
        database.close()


async def _no_news() -> bool:
    return False


async def test_a_state_that_breaks_stops_the_program(bench: Bench) -> None:
    job = bench.accepted_job(bench.register().use())
    request = encode(NonceRequest(job_id=job.terms.job_id, terms=job.digest, attempt=1))
    stop = asyncio.Event()
    handlers = Handlers(lambda: bench.broker("north"), _no_news, ProgramLog("key-broker"), stop)
    assert decode(NonceReply, await handlers.by_op["nonce"](request)).expires > bench.clock()
    handlers.raise_for_failure()
    bench.database("north").close()
    with pytest.raises(IntegrityError):
        await handlers.by_op["nonce"](request)
    assert stop.is_set()
    with pytest.raises(UnavailableError):
        await handlers.by_op["nonce"](request)
    with pytest.raises(IntegrityError):
        handlers.raise_for_failure()


async def test_whoever_is_ahead_is_judged_by_the_manifest_they_know(bench: Bench) -> None:
    """A scientist signs terms under manifest 2 before this key broker has looked for it; a worker comes again by itself."""
    dataset, older = bench.register(), {"manifest": bench.consortium.digest, "manifest_number": 1}
    bench.broker("north"), bench.broker("clara")
    bench.amend("clara", name="grown")
    ahead, behind = bench.job(dataset.use()), bench.job(dataset.use(), terms=older)
    asked: list[str] = []

    async def catch_up() -> bool:
        asked.append("north")
        bench.restart("north")
        return len(asked) == 1

    handlers = Handlers(lambda: bench.broker("north"), catch_up, ProgramLog("key-broker"), asyncio.Event())
    with pytest.raises(UnavailableError, match="manifest 2 was not seen here yet"):
        bench.broker("north").precheck(encode(ahead.precheck))
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM answers").fetchone() == (0,), "no answer that would stand for ever"
    for job in (ahead, behind):
        answer = decode(Signed, await handlers.by_op["precheck"](encode(job.precheck))).peek(PrecheckAnswer)
        assert answer.decision == "yes"
    assert asked == ["north"]
    with pytest.raises(NotFoundError):
        await handlers.by_op["nonce"](encode(NonceRequest(job_id="0" * 32, terms=bytes(32), attempt=1)))
    assert asked == ["north"]


def test_a_newer_manifest_is_pinned_then_used_and_one_without_this_key_broker_ends_it(
    bench: Bench, tmp_path: Path
) -> None:
    """Also by those that are asked while it changes: a request under way keeps the key broker it began with."""
    settings = _founding(bench, tmp_path, "south")
    database = Database(settings.state_dir)
    program = open_key_broker(settings, database)
    before = program.serving()
    bench.amend(name="grown")
    assert program.manifests.offer_chain(bench.chain)
    assert program.serving() is not before
    with database.transaction() as tx:
        assert get_meta(tx, "manifest") == (2, bench.consortium.digest)
        assert [entry.subject for entry in audit_log.entries(tx)] == ["manifest 1", "manifest 2"]
    manifest = bench.consortium.manifest
    bench.amend(
        members=tuple(m for m in manifest.members if m.id != "south"),
        key_brokers=tuple(b for b in manifest.key_brokers if b.id != "south"),
    )
    with pytest.raises(SetupError, match="manifest 3 no longer lists this key broker"):
        program.manifests.offer_chain(bench.chain)
    with pytest.raises(SetupError, match="manifest 3 no longer lists this key broker"):
        open_key_broker(settings, database)
    database.close()


def test_a_revocation_is_kept_then_used_under_every_manifest(bench: Bench, tmp_path: Path) -> None:
    """Also after a restart, without a word from NATS."""
    settings = _founding(bench, tmp_path)
    nora, now = bench.stewards["north"], bench.clock()
    asked = bench.request("north", nora, ListApprovals())
    revocation = Revocation(consortium=bench.consortium.id, member="north", person="nora", before=now, created=now)
    database = Database(settings.state_dir)
    program = open_key_broker(settings, database)
    assert bench.answer("north", nora, program.serving().message(asked)).n_pending == 0
    assert program.revocations.offer(sign(revocation, bench.members["north"].signing))
    bench.amend(name="grown")
    for _ in range(2):
        with pytest.raises(AuthenticationError, match="north has revoked"):
            program.serving().message(asked)
        assert program.manifests.offer_chain(bench.chain) or program.manifests.current.manifest.number == 2
        with pytest.raises(AuthenticationError, match="north has revoked"):
            program.serving().message(asked)
        with database.transaction() as tx:
            told = [(entry.event, entry.subject) for entry in audit_log.entries(tx)]
        database.close()
        database = Database(settings.state_dir)
        program = open_key_broker(settings, database)
    assert told == [("manifest", "manifest 1"), ("person_revoked", "nora@north"), ("manifest", "manifest 2")]
    database.close()


async def test_operations_are_logged_by_reason_code_alone(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = Handlers(lambda: bench.broker("north"), _no_news, ProgramLog("key-broker"), asyncio.Event())
    with pytest.raises(MalformedError):
        await handlers.by_op["precheck"](b"a canary in the bytes")
    (line,) = capfd.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["op"], event["reason"]) == ("refused", "precheck", "malformed")
    assert "canary" not in line


class _Deliberate:
    """A key broker that judges for as long as the test lets it."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.judged: list[bytes] = []

    def precheck(self, payload: bytes) -> bytes:
        self.may_end.wait()
        self.judged.append(payload)
        return payload

    def nonce(self, payload: bytes) -> bytes:
        return b"nonce " + payload

    message = grant = commit = nonce


async def test_jobs_that_take_long_to_judge_hold_up_nothing_else() -> None:
    broker: Any = _Deliberate()
    log = ProgramLog("key-broker")
    handlers = Handlers(lambda: broker, _no_news, log, asyncio.Event(), max_concurrency=16).by_op
    judging = [asyncio.create_task(handlers["precheck"](bytes([i]))) for i in range(8)]
    try:
        async with asyncio.timeout(20):
            for op in ("nonce", "message", "grant", "commit"):
                assert await handlers[op](b"x") == b"nonce x"
            with pytest.raises(UnavailableError, match="judging other jobs"):
                await handlers["precheck"](b"one too many")
        assert broker.judged == [] and not any(task.done() for task in judging)
    finally:
        broker.may_end.set()
    assert sorted(await asyncio.gather(*judging)) == [bytes([i]) for i in range(8)]
    assert await handlers["precheck"](b"again") == b"again"
