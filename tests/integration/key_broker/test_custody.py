"""An owner's will over a running key broker: revoking, erasing, new seed secrets, a backup restored."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import Database
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.codec import decode
from casemate_schemas.custody import (
    AmendLicence,
    BackUpState,
    DatasetErased,
    DatasetPrepared,
    EraseDataset,
    LicenceAmended,
    PrepareDataset,
    RotateSeeds,
    SeedsRotated,
    StateBackedUp,
)
from casemate_schemas.envelope import split_envelope
from casemate_schemas.errors import DatasetError, LicenceError, RolledBackError, SealError
from casemate_schemas.grant import CommitReceipt
from casemate_schemas.licence import AllOf, MemberIs, Permission, RoleIs
from casemate_schemas.requests import Budget, EndorseState, ShowBudget, ShowState, StateShown
from casemate_schemas.sealing import SealingKey, open_ciphertext, seal_envelope, unseal_content_key
from casemate_schemas.signatures import Signed, sign
from support.key_brokers import Dataset
from support.nats import NatsStack
from support.north import North

RECORDS = b"the records of four hundred patients" * 1000


async def _revoke(north: North, dataset: Dataset) -> None:
    stewards = AllOf(
        rules=(MemberIs(principal="submitter", member="north"), RoleIs(principal="submitter", role="steward"))
    )
    nothing = (Permission(action="list", rule=stewards),)
    strictest = north.bench.licence(dataset.card.id, number=2, permissions=nothing)
    signed = sign(strictest, north.bench.stewards["north"].keys.signing)
    assert isinstance(await north.steward(AmendLicence(licence=signed)), LicenceAmended)


async def _budget(north: North, dataset: Dataset) -> Budget:
    found = await north.steward(ShowBudget(dataset=dataset.card.id))
    assert isinstance(found, Budget)
    return found


async def test_revoked_at_the_next_request_for_keys(north: North) -> None:
    dataset = await north.register()
    granted, waiting = [await north.accepted(dataset) for _ in range(2)]
    worker, _, before = await north.granted(granted)
    await _revoke(north, dataset)
    for job, attempt in ((waiting, 1), (granted, 2)):
        with pytest.raises(LicenceError):
            await north.grant(job, attempt)
    result = os.urandom(32)
    receipt = decode(Signed, await north.ask("commit", worker.commit(result))).peek(CommitReceipt)
    assert receipt.result == result
    await north.process.kill()
    await north.process.start()
    with pytest.raises(LicenceError):
        await north.grant(waiting)
    _, grant, secrets = await north.granted(granted, 3)
    assert grant.header.committed == result and grant.header.envelopes == (granted.routing.job_envelope,)
    assert secrets.seed_share == before.seed_share
    assert [line.committed for line in (await _budget(north, dataset)).lines] == [result]


async def _uploaded(north: North, store: EnvelopeStore) -> Dataset:
    """A dataset with its ciphertext in NATS."""
    prepared = await north.steward(PrepareDataset(owner="north"))
    assert isinstance(prepared, DatasetPrepared)
    bench = north.bench
    steward = bench.stewards["north"].keys.signing
    envelope = seal_envelope(
        "dataset", RECORDS, (prepared.sealing_key,), consortium=bench.consortium.id, key=steward, created=bench.clock()
    )
    head, ciphertext = split_envelope(envelope, max_bytes=1 << 20)

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(ciphertext)

    assert await store.put(bytes(head), pieces())
    return await north.registered(bytes(head))


async def _opens(store: EnvelopeStore, envelope: bytes, keys: list[SealingKey]) -> bool:
    """Whether what NATS holds opens with one of these keys, whoever it says it is sealed to."""
    stored = await store.head(envelope)
    ciphertext = b"".join([piece async for piece in store.ciphertext(stored)])
    for key in keys:
        sealed = tuple(item.model_copy(update={"recipient": key.id}) for item in stored.head.sealed_keys)
        try:
            content_key = unseal_content_key(stored.head.model_copy(update={"sealed_keys": sealed}), key)
        except SealError:
            continue
        return bytes(open_ciphertext(stored.head.header, content_key, ciphertext)) == RECORDS
    return False


async def _all_keys(north: North) -> list[SealingKey]:
    """Every sealing key that is left once the key broker is stopped: members', people's, key brokers', and all in its state."""
    await north.process.stop()
    bench = north.bench
    people = (bench.clara, *bench.stewards.values())
    rings = (*bench.members.values(), *bench.key_brokers.values(), *(person.keys for person in people))
    database = Database(north.process.state_dir)
    with database.transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        kept = [SealingKey(private) for (private,) in tx.execute("SELECT private FROM dataset_keys")]
    database.close()
    await north.process.start()
    return [*(ring.sealing for ring in rings), *kept]


async def test_an_erased_dataset_opens_with_no_key_that_is_left(north: North, nats_stack: NatsStack) -> None:
    client = await nats_stack.connect("gateway")
    store = EnvelopeStore(client, BlobStore(client))
    dataset = await _uploaded(north, store)
    other = await north.register("other")
    job = await north.accepted(dataset)
    await north.grant(job)
    before = await _all_keys(north)
    assert await _opens(store, dataset.envelope, before)
    charged = await _budget(north, dataset)

    request = EraseDataset(dataset=dataset.card.id, envelope=dataset.envelope, keep_current=False)
    assert await north.steward(request) == DatasetErased(dataset=dataset.card.id, envelopes=(dataset.envelope,))
    await north.process.kill()
    left = await _all_keys_after_kill(north)
    assert not await _opens(store, dataset.envelope, left)
    on_disk = b"".join(path.read_bytes() for path in north.process.state_dir.iterdir() if path.is_file())
    (gone,) = {key.to_bytes() for key in before} - {key.to_bytes() for key in left}
    assert gone not in on_disk
    assert (await _budget(north, dataset)).lines == charged.lines != ()
    with pytest.raises(DatasetError):
        await north.grant(job, attempt=2)
    await north.grant(await north.accepted(other))


async def _all_keys_after_kill(north: North) -> list[SealingKey]:
    await north.process.start()
    return await _all_keys(north)


async def test_a_pending_job_survives_new_seed_secrets(north: North) -> None:
    dataset = await north.register()
    job = await north.accepted(dataset)
    _, _, before = await north.granted(job)
    assert await north.steward(RotateSeeds()) == SeedsRotated(epoch=2)
    _, _, fresh = await north.granted(later := await north.accepted(dataset))
    await north.process.kill()
    await north.process.start()
    for pending, share in ((job, before.seed_share), (later, fresh.seed_share)):
        worker, _, again = await north.granted(pending, attempt=2)
        assert again.seed_share == share
        await north.ask("commit", worker.commit(os.urandom(32)))
    assert (await _budget(north, dataset)).n_charges == 2


async def test_a_restored_backup_waits_for_the_owners_and_then_goes_on(north: North, tmp_path: Path) -> None:
    dataset = await north.register()
    kept, lost = [await north.accepted(dataset) for _ in range(2)]
    _, _, before = await north.granted(kept)
    made = await north.steward(BackUpState())
    assert isinstance(made, StateBackedUp)
    _, _, forgotten = await north.granted(lost)
    assert (await _budget(north, dataset)).n_charges == 2

    await north.restarted_from(tmp_path / "backups" / made.name)
    for job in (kept, lost):
        with pytest.raises(RolledBackError):
            await north.grant(job, attempt=2)
    refused = await north.steward(BackUpState())
    assert getattr(refused, "reason", None) == RolledBackError.reason
    shown = await north.steward(ShowState())
    assert isinstance(shown, StateShown) and shown.ahead is not None and shown.head.audit_size >= made.audit_size
    endorsed = await north.steward(EndorseState(ahead=shown.ahead.digest))
    assert isinstance(endorsed, StateShown) and endorsed.head.branch == 1

    _, _, again = await north.granted(kept, attempt=2)
    assert again.seed_share == before.seed_share
    assert (await _budget(north, dataset)).n_charges == 1, "what only the newer state knew is forgotten"
    _, _, once_more = await north.granted(lost, attempt=2)
    assert once_more.seed_share == forgotten.seed_share
    assert (await _budget(north, dataset)).n_charges == 2, "and charged again as soon as the job asks again"
