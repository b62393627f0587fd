"""Amending and revoking a licence, erasing a dataset or its old versions, a patient's withdrawal, and new seed secrets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from casemate_key_broker import audit_log, dataset_keys, key_release, ledger
from casemate_key_broker.backups import back_up
from casemate_key_broker.database import FILE_NAME, Database
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_schemas.custody import (
    AmendLicence,
    BackUpState,
    DatasetErased,
    DatasetShown,
    EraseDataset,
    LicenceAmended,
    PrepareDataset,
    RotateSeeds,
    SeedsRotated,
    ShowDataset,
)
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import CommitConflictError, ConflictError, DatasetError, LicenceError, SealError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.licence import AllOf, Licence, MemberIs, Permission, RoleIs
from casemate_schemas.requests import Budget, DatasetListing, DatasetRegistered, ListDatasets, Refusal, ShowBudget
from casemate_schemas.sealing import ContentKey, SealingKey, seal_envelope, unseal_content_key
from casemate_schemas.signatures import sign
from support.key_brokers import Bench, Dataset, Job, Worker

CARDIO = "cardio@north"


@pytest.fixture
def dataset(bench: Bench) -> Dataset:
    return bench.register()


def _steward(bench: Bench, body: Any) -> Any:
    return bench.ask("north", bench.stewards["north"], body)


def _amend(bench: Bench, licence: Licence) -> Any:
    return _steward(bench, AmendLicence(licence=sign(licence, bench.stewards["north"].keys.signing)))


def _shown(bench: Bench, dataset: str = CARDIO) -> DatasetShown:
    shown = _steward(bench, ShowDataset(dataset=dataset))
    assert isinstance(shown, DatasetShown), shown
    return shown


def _erase(bench: Bench, *, keep_current: bool = False) -> Any:
    return _steward(bench, EraseDataset(dataset=CARDIO, envelope=_shown(bench).envelope, keep_current=keep_current))


def _newer(bench: Bench, licence: Licence, **card: Any) -> Dataset:
    """Another version of the same dataset under the licence in force."""
    head = bench.seal_dataset()
    newer = Dataset(bench.card(**card), licence, head, open_head(head).header.digest, "north")
    assert isinstance(_steward(bench, bench.registration(newer)), DatasetRegistered)
    return newer


def _entries(bench: Bench, *events: str) -> list[AuditEntry]:
    with bench.database("north").transaction() as tx:
        audit_log.verify(tx)
        ledger.verify(tx)
        return [entry for entry in audit_log.entries(tx) if entry.event in events]


def _commit(bench: Bench, worker: Worker, result: bytes) -> None:
    first = bench.broker("clara").commit(worker.commit(result))
    bench.broker("north").commit(worker.commit(result, first))


NOTHING = (
    Permission(
        action="list",
        rule=AllOf(
            rules=(MemberIs(principal="submitter", member="north"), RoleIs(principal="submitter", role="steward"))
        ),
    ),
)


# --- amendment ----------------------------------------------------------------------------------------------------------


def test_an_amendment_is_in_force_at_once_and_in_the_audit_log(bench: Bench, dataset: Dataset) -> None:
    stricter = bench.licence(CARDIO, number=2, epsilon=2.5)
    amended = _amend(bench, stricter)
    assert isinstance(amended, LicenceAmended)
    shown = _shown(bench)
    assert shown.licence.digest == amended.licence and shown.envelope == dataset.envelope
    assert [(line.number, line.person) for line in shown.licences] == [(1, "nora@north"), (2, "nora@north")]
    (entry,) = _entries(bench, "amended")
    assert (entry.subject, entry.licence, entry.person) == (CARDIO, amended.licence, "nora@north")
    assert _amend(bench, stricter) == amended and len(_entries(bench, "amended")) == 1


BAD: dict[str, tuple[tuple[str, dict[str, Any]], str]] = {
    "an older number": ((CARDIO, {"number": 1, "epsilon": 2.0}), "conflict"),
    "expired": ((CARDIO, {"number": 2, "expires": 1}), "invalid_parameter"),
    "of a dataset that is not there": (("other@north", {"number": 2}), "not_found"),
    "of another owner": (("cardio@south", {"number": 2}), "not_allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_amendments_that_are_refused(bench: Bench, dataset: Dataset, case: str) -> None:
    (dataset_id, changed), reason = BAD[case]
    refusal = _amend(bench, bench.licence(dataset_id, **changed))
    assert isinstance(refusal, Refusal) and refusal.reason == reason
    assert len(_shown(bench).licences) == 1 and not _entries(bench, "amended")


def test_only_the_owners_stewards_amend_look_prepare_and_erase(bench: Bench, dataset: Dataset) -> None:
    scientist = bench.person("north", "sam", ("scientist",))
    for person in (scientist, bench.stewards["south"], bench.clara):
        bodies = (
            AmendLicence(licence=sign(bench.licence(CARDIO, number=2), person.keys.signing)),
            ShowDataset(dataset=CARDIO),
            PrepareDataset(owner="north"),
            EraseDataset(dataset=CARDIO, envelope=dataset.envelope, keep_current=False),
        )
        for body in bodies:
            refusal = bench.ask("north", person, body)
            assert isinstance(refusal, Refusal) and refusal.reason == "not_allowed", body
    forged = AmendLicence(licence=sign(bench.licence(CARDIO, number=2), bench.clara.keys.signing))
    assert _steward(bench, forged).reason == "not_authenticated"


def test_revoked_means_no_key_for_anybody_but_what_was_granted_may_commit(bench: Bench, dataset: Dataset) -> None:
    granted, waiting = (bench.accepted_job(dataset.use()) for _ in range(2))
    worker = bench.grant_all(granted)
    assert isinstance(_amend(bench, bench.licence(CARDIO, number=2, permissions=NOTHING)), LicenceAmended)
    for job, attempt in ((granted, 2), (waiting, 1)):
        with pytest.raises(LicenceError):
            bench.grant("north", Worker(job, attempt))
    assert bench.precheck("north", bench.job(dataset.use())).decision == "refused"
    listing = bench.ask("north", bench.clara, ListDatasets())
    assert isinstance(listing, DatasetListing) and listing.datasets == ()
    _commit(bench, worker, b"r" * 32)
    (line,) = _steward(bench, ShowBudget(dataset=CARDIO)).lines
    assert (line.terms, line.state) == (granted.digest, "committed")


def test_what_is_committed_can_be_released_and_no_more(bench: Bench, dataset: Dataset) -> None:
    """A successor gets the seed share, and the job's own key from the submitter's key broker; of datasets nothing."""
    job = bench.accepted_job(dataset.use())
    first = Worker(job)
    _, before = bench.grant("north", first, evidence := bench.evidence(first))
    bench.grant("clara", first, evidence)
    _commit(bench, first, b"r" * 32)
    assert isinstance(_amend(bench, bench.licence(CARDIO, number=2, permissions=NOTHING)), LicenceAmended)
    assert isinstance(_erase(bench), DatasetErased)

    successor = Worker(job, 2)
    evidence = bench.evidence(successor)
    grant, secrets = bench.grant("north", successor, evidence)
    assert grant.header.committed == b"r" * 32 and grant.header.licences == (dataset.use().licence,)
    assert (grant.header.envelopes, secrets.content_keys) == ((), ())
    assert secrets.seed_share == before.seed_share
    own, _ = bench.grant("clara", successor, evidence)
    assert own.header.envelopes == (job.routing.job_envelope,)
    _commit(bench, successor, b"r" * 32)
    with pytest.raises(CommitConflictError):
        bench.broker("clara").commit(successor.commit(b"s" * 32))
    assert len(_entries(bench, "committed")) == 1


# --- erasure ------------------------------------------------------------------------------------------------------------


def _every_key(bench: Bench) -> list[SealingKey]:
    """All sealing keys that anybody still has: members', key brokers', people's, and what key brokers hold for datasets."""
    rings = [*bench.members.values(), *bench.key_brokers.values(), bench.clara.keys]
    keys = [ring.sealing for ring in (*rings, *(person.keys for person in bench.stewards.values()))]
    for name in bench.key_brokers:
        with bench.database(name).transaction() as tx:
            keys += [SealingKey(private) for (private,) in tx.execute("SELECT private FROM dataset_keys")]
    return keys


def _opens(bench: Bench, head: bytes) -> bool:
    """Whether some key opens the content key, whoever it is said to be sealed to."""
    opened = open_head(head)
    for key in _every_key(bench):
        renamed = tuple(sealed.model_copy(update={"recipient": key.id}) for sealed in opened.sealed_keys)
        try:
            unseal_content_key(opened.model_copy(update={"sealed_keys": renamed}), key)
        except SealError:
            continue
        return True
    return False


def _private_key(bench: Bench, dataset: Dataset) -> bytes:
    with bench.database("north").transaction() as tx:
        return dataset_keys.load(tx, dataset.envelope, CARDIO).to_bytes()


def test_once_erased_no_key_opens_it_and_ledger_and_audit_log_stand(bench: Bench, dataset: Dataset) -> None:
    other = bench.register(name="other")
    job = bench.accepted_job(dataset.use())
    bench.grant("north", Worker(job))
    before, private = _steward(bench, ShowBudget(dataset=CARDIO)), _private_key(bench, dataset)
    assert _opens(bench, dataset.head) and private in _state_bytes(bench)

    erased = _erase(bench)
    assert isinstance(erased, DatasetErased) and erased.envelopes == (dataset.envelope,)
    assert not _opens(bench, dataset.head) and _opens(bench, other.head)
    assert private not in _state_bytes(bench) and private[:32] not in _state_bytes(bench)
    (entry,) = _entries(bench, "erased")
    assert (entry.subject, entry.envelope, entry.person) == (CARDIO, dataset.envelope, "nora@north")
    after = _steward(bench, ShowBudget(dataset=CARDIO))
    assert isinstance(after, Budget) and (after.lines, after.epsilon_spent) == (before.lines, before.epsilon_spent)
    with pytest.raises(DatasetError, match="erased"):
        bench.grant("north", Worker(job, 2))
    refused = bench.job(dataset.use())
    assert "erased" in bench.detail("north", bench.precheck("north", refused)).message
    assert _shown(bench).erased and [line.erased for line in _shown(bench).versions] == [True]
    listing = bench.ask("north", bench.clara, ListDatasets())
    assert [offer.card.id for offer in listing.datasets] == ["other@north"]
    bench.restart("north")
    assert not _opens(bench, dataset.head)


def _state_bytes(bench: Bench) -> bytes:
    return _bytes_in(bench.folder / "north")


def _bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_what_was_uploaded_and_never_registered_is_erased_too(bench: Bench, dataset: Dataset) -> None:
    orphan, elsewhere = bench.dataset(number=2), bench.dataset("south")
    assert _opens(bench, orphan.head)
    _erase(bench, keep_current=True)
    assert not _opens(bench, orphan.head) and _opens(bench, elsewhere.head) and _opens(bench, dataset.head)
    assert _steward(bench, bench.registration(orphan)).reason == "seal_does_not_open"


def test_in_an_enclave_as_well(tmp_path: Path) -> None:
    bench = Bench(tmp_path, hosted=("north",))
    dataset = bench.register()
    assert _opens(bench, dataset.head)
    assert isinstance(_erase(bench), DatasetErased)
    bench.restart("north")
    assert not _opens(bench, dataset.head)
    bench.close()


def test_a_key_is_gone_from_the_disk_after_many_others_came_and_went(bench: Bench) -> None:
    """Pages are split and refilled meanwhile; none of them keeps a copy."""
    privates = []
    for number in range(12):
        dataset = bench.register(number=number + 1)
        privates.append(_private_key(bench, dataset))
        for _ in range(4):
            bench.prepared()
    assert all(private in _state_bytes(bench) for private in privates)
    assert isinstance(_erase(bench, keep_current=True), DatasetErased)
    kept = _state_bytes(bench)
    assert [private in kept for private in privates] == [False] * 11 + [True]


def test_a_crash_before_the_disk_is_scrubbed_is_mended_by_the_next_start(
    bench: Bench, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = _private_key(bench, dataset)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "scrub", lambda _: None)
        _erase(bench)
    crashed = shutil.copytree(bench.folder / "north", tmp_path / "crashed")  # as a kill leaves it: nothing was closed
    assert private in _bytes_in(crashed)
    started = Database(crashed)
    assert private not in _bytes_in(crashed)
    started.close()


def test_a_version_that_is_erased_while_a_job_is_judged(
    bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.accepted_job(dataset.use())
    bench.grant("north", Worker(job))
    _newer(bench, dataset.licence)
    opening = key_release.open_content_keys

    def interrupted(envelopes: tuple[key_release.Sealed, ...]) -> dict[bytes, ContentKey]:
        keys = opening(envelopes)
        assert isinstance(_erase(bench, keep_current=True), DatasetErased)
        return keys

    worker = Worker(job, 2)
    evidence = bench.evidence(worker)
    monkeypatch.setattr(key_release, "open_content_keys", interrupted)
    with pytest.raises(DatasetError, match="erased"):
        bench.grant("north", worker, evidence)


def test_nobody_erases_what_came_in_between(bench: Bench, dataset: Dataset) -> None:
    newer = _newer(bench, dataset.licence)
    refusal = _steward(bench, EraseDataset(dataset=CARDIO, envelope=dataset.envelope, keep_current=False))
    assert isinstance(refusal, Refusal) and refusal.reason == "conflict"
    assert _opens(bench, dataset.head) and _opens(bench, newer.head)


def test_an_erased_dataset_comes_back_on_the_same_budget_only(bench: Bench, dataset: Dataset) -> None:
    bench.grant("north", Worker(bench.accepted_job(dataset.use())))
    spent = _steward(bench, ShowBudget(dataset=CARDIO))
    _erase(bench)
    again = _steward(bench, bench.registration(dataset))
    assert isinstance(again, Refusal) and again.reason == "seal_does_not_open"
    assert _amend(bench, bench.licence(CARDIO, number=2)).reason == DatasetError.reason
    newer = _newer(bench, dataset.licence)
    now = _steward(bench, ShowBudget(dataset=CARDIO))
    assert (now.lineage, now.epsilon_spent) == (spent.lineage, spent.epsilon_spent) and now.epsilon_spent > 0
    assert bench.precheck("north", bench.job(newer.use())).decision == "yes"


# --- versions and withdrawal ----------------------------------------------------------------------------------------------


def test_a_patient_withdraws(bench: Bench, dataset: Dataset) -> None:
    """The data without the patient is the next version, on the same budget; then the version before is erased."""
    bench.grant("north", Worker(charged := bench.accepted_job(dataset.use())))
    waiting = bench.accepted_job(dataset.use())
    spent = _steward(bench, ShowBudget(dataset=CARDIO))
    bench.clock.advance(60)
    newer = _newer(bench, dataset.licence, row_bound=199)
    erased = _erase(bench, keep_current=True)
    assert isinstance(erased, DatasetErased) and erased.envelopes == (dataset.envelope,)
    assert not _opens(bench, dataset.head) and _opens(bench, newer.head)
    for job, attempt in ((charged, 2), (waiting, 1)):
        with pytest.raises(DatasetError):
            bench.grant("north", Worker(job, attempt))
    now = _steward(bench, ShowBudget(dataset=CARDIO))
    assert (now.lineage, now.epsilon_spent) == (spent.lineage, spent.epsilon_spent)
    shown = _shown(bench)
    assert [(line.envelope, line.row_bound, line.erased) for line in shown.versions] == [
        (dataset.envelope, 200, True),
        (newer.envelope, 199, False),
    ]
    assert shown.versions[1].at - shown.versions[0].at == 60_000
    assert [(entry.event, entry.envelope) for entry in _entries(bench, "registered", "erased")] == [
        ("registered", dataset.envelope),
        ("registered", newer.envelope),
        ("erased", dataset.envelope),
    ]
    bench.grant("north", Worker(bench.accepted_job(newer.use())))
    assert _steward(bench, ShowBudget(dataset=CARDIO)).n_charges == 2


def test_every_version_has_a_key_of_its_own_and_no_other(bench: Bench, dataset: Dataset) -> None:
    with bench.database("north").transaction() as tx:
        used = dataset_keys.load(tx, dataset.envelope, CARDIO).public
    again = bench.dataset(head=bench.seal_dataset(to=used), number=2)
    assert _steward(bench, bench.registration(again)).reason == "conflict"
    prepared = bench.prepared()
    with bench.database("north").transaction() as tx:
        head = open_head(bench.seal_dataset(to=prepared))
        assert dataset_keys.find(tx, head, "north").public == prepared
        with pytest.raises(SealError, match="prepared"):
            dataset_keys.find(tx, head, "south")
    elsewhere = bench.dataset("south", head=bench.seal_dataset("south", to=prepared))
    assert bench.ask("south", bench.stewards["south"], bench.registration(elsewhere)).reason == "seal_does_not_open"


def test_a_content_key_that_others_could_open_too_is_not_registered(bench: Bench) -> None:
    """Erasing the key broker's one key would not be enough then."""
    steward = bench.stewards["north"].keys
    envelope = seal_envelope(
        "dataset",
        b"records",
        (bench.prepared(), steward.sealing.public),
        consortium=bench.consortium.id,
        key=steward.signing,
        created=bench.clock(),
    )
    twice = bench.dataset(head=bytes(split_envelope(envelope, max_bytes=1 << 20)[0]))
    assert _steward(bench, bench.registration(twice)).reason == "seal_does_not_open"


def test_keys_that_nobody_uses_are_few(bench: Bench) -> None:
    first = bench.prepared()
    for _ in range(dataset_keys.MAX_UNUSED):
        bench.clock.advance(1)
        bench.prepared()
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM dataset_keys").fetchone() == (dataset_keys.MAX_UNUSED,)
    late = bench.dataset(head=bench.seal_dataset(to=first))
    assert _steward(bench, bench.registration(late)).reason == "seal_does_not_open"


# --- the key broker's own secrets -------------------------------------------------------------------------------------------


def _share(bench: Bench, job: Job, attempt: int) -> bytes:
    return bench.grant("north", Worker(job, attempt))[1].seed_share


@pytest.mark.parametrize("hosted", [(), ("north",)])
def test_a_new_seed_secret_changes_no_job_that_was_granted_keys(tmp_path: Path, hosted: tuple[str, ...]) -> None:
    bench = Bench(tmp_path, hosted=hosted)
    dataset = bench.register()
    old, new = (bench.accepted_job(dataset.use()) for _ in range(2))
    share = _share(bench, old, 1)
    assert _steward(bench, RotateSeeds()) == SeedsRotated(epoch=2)
    fresh = _share(bench, new, 1)
    bench.restart("north")
    assert (_share(bench, old, 2), _share(bench, new, 2)) == (share, fresh)
    with bench.database("north").transaction() as tx:
        assert ledger.epochs(tx) == {1, 2}
    (entry,) = _entries(bench, "seeds_rotated")
    assert (entry.subject, entry.person) == ("epoch 2", "nora@north")
    for person in (bench.clara, bench.stewards["south"]):
        assert bench.ask("north", person, RotateSeeds()).reason == "not_allowed"
    bench.close()


def test_a_backup_is_a_state_of_its_own(bench: Bench, dataset: Dataset, tmp_path: Path) -> None:
    bench.grant("north", Worker(bench.accepted_job(dataset.use())))
    database = bench.database("north")
    assert isinstance(database, Database)
    name, size = back_up(database, bench.folder / "north", tmp_path / "copies", bench.clock())
    copy = tmp_path / "copies" / name
    assert copy.stat().st_mode & 0o077 == 0
    assert {path.name for path in copy.iterdir()} >= {FILE_NAME, "seed-secret-1"}
    bench.grant("north", Worker(bench.accepted_job(dataset.use())))
    with Database(copy).transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        assert audit_log.size(tx) == size and ledger.newest_entry(tx)[0] == 1
    SeedSecrets(copy, needed={1})
    (tmp_path / "copies" / f"{name}.partial").mkdir()
    with pytest.raises(ConflictError):
        back_up(database, bench.folder / "north", tmp_path / "copies", bench.clock())


def test_a_backup_goes_where_the_settings_say_or_nowhere(bench: Bench) -> None:
    refusal = _steward(bench, BackUpState())
    assert isinstance(refusal, Refusal) and "backup_dir" in refusal.message
    assert not _entries(bench, "backed_up")
