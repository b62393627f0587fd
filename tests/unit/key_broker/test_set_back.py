"""A state that was set back, and whoever shows a newer head to it: what is noted, what is refused, what is left unsaid."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casemate_key_broker import audit_log
from casemate_key_broker.party import Party
from casemate_schemas.codec import decode, encode
from casemate_schemas.custody import DatasetPrepared, EraseDataset, PrepareDataset, RotateSeeds
from casemate_schemas.errors import NotFoundError, RolledBackError
from casemate_schemas.grant import NonceRequest
from casemate_schemas.requests import EndorseState, Refusal, ShowState, StateShown
from casemate_schemas.signatures import Signed
from support.key_brokers import Bench, Dataset, Job, Worker


@pytest.fixture
def dataset(bench: Bench) -> Dataset:
    return bench.register()


@pytest.fixture
def set_back(bench: Bench, dataset: Dataset, tmp_path: Path) -> Callable[..., Signed]:
    """Puts north's state back to before ``meanwhile``; the head that was left then."""

    def to_before(meanwhile: Callable[[], Any]) -> Signed:
        bench.close("north")
        old = shutil.copytree(bench.folder / "north", tmp_path / "old")
        meanwhile()
        newest = decode(Signed, bench.broker("north").head())
        bench.close("north")
        shutil.rmtree(bench.folder / "north")
        shutil.copytree(old, bench.folder / "north")
        return newest

    return to_before


def _audit_size(bench: Bench) -> int:
    with bench.database("north").transaction() as tx:
        return audit_log.size(tx)


def _sent(bench: Bench, request: bytes) -> Any:
    steward = bench.stewards["north"]
    return bench.answer("north", steward, bench.broker("north").message(request))


def test_a_newer_head_is_noted_though_what_it_came_with_is_refused(bench: Bench, set_back: Any) -> None:
    """Otherwise whoever shows nothing, the next worker say, would be served by the old state."""
    steward = bench.stewards["north"]
    newest = set_back(lambda: bench.register(name="newer"))
    assert isinstance(bench.ask("north", steward, PrepareDataset(owner="north")), DatasetPrepared)
    shown = _sent(bench, bench.request("north", steward, PrepareDataset(owner="north"), seen=newest))
    assert isinstance(shown, Refusal) and shown.reason == RolledBackError.reason
    bench.restart("north")
    for body in (PrepareDataset(owner="north"), RotateSeeds()):
        assert bench.ask("north", steward, body).reason == RolledBackError.reason
    state = bench.ask("north", steward, ShowState())
    assert isinstance(state, StateShown) and state.ahead == newest


def test_a_request_that_was_refused_is_not_carried_again(bench: Bench, dataset: Dataset, set_back: Any) -> None:
    """The steward was told no, and may have thought better of it since."""
    steward = bench.stewards["north"]
    newest = set_back(lambda: bench.register(name="newer"))
    erasure = EraseDataset(dataset=dataset.card.id, envelope=dataset.envelope, keep_current=False)
    request = bench.request("north", steward, erasure, seen=newest)
    assert _sent(bench, request).reason == RolledBackError.reason
    assert isinstance(bench.ask("north", steward, EndorseState(ahead=newest.digest)), StateShown)
    again = _sent(bench, request)
    assert isinstance(again, Refusal) and again.reason == "conflict"
    bench.grant("north", Worker(bench.accepted_job(dataset.use())))


def test_workers_are_told_to_wait_and_nothing_is_written(bench: Bench, dataset: Dataset, set_back: Any) -> None:
    """A state that lacks a job must not refuse it for good, nor write down that it did."""
    jobs: list[Job] = []
    newest = set_back(lambda: jobs.append(bench.accepted_job(dataset.use())))
    worker = Worker(jobs[0])
    asked = NonceRequest(terms=jobs[0].digest, job_id=jobs[0].terms.job_id, attempt=1)
    with pytest.raises(NotFoundError):
        bench.nonce("north", jobs[0])
    claims = worker.claims(bench.consortium, {name: os.urandom(32) for name in jobs[0].terms.key_brokers})
    bench.broker("north").observe(encode(newest))
    before = _audit_size(bench)
    north = bench.broker("north")
    asks = {
        north.nonce: encode(asked),
        north.grant: worker.request(worker.evidence(claims)),
        north.commit: worker.commit(bytes(32)),
    }
    for operation, payload in asks.items():
        with pytest.raises(RolledBackError):
            operation(payload)
    assert _audit_size(bench) == before


def test_each_member_served_has_to_endorse_and_to_endorse_the_same(
    bench: Bench, set_back: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one of them, with the host, would give the others' datasets a fresh budget."""
    monkeypatch.setattr(Party, "serves", ("north", "south"))
    north, south = bench.stewards["north"], bench.stewards["south"]
    newest = set_back(lambda: bench.register(name="newer"))
    bench.broker("north").observe(encode(newest))
    assert bench.ask("north", north, ShowState()).awaited == ("north", "south")
    for _ in range(2):
        shown = bench.ask("north", north, EndorseState(ahead=newest.digest))
        assert shown.ahead == newest and shown.awaited == ("south",)
    with pytest.raises(RolledBackError):
        bench.broker("north").head()
    bench.restart("north")
    assert bench.ask("north", south, EndorseState(ahead=bytes(32))).reason == "conflict"
    shown = bench.ask("north", south, EndorseState(ahead=newest.digest))
    assert (shown.ahead, shown.awaited, shown.head.branch) == (None, (), 1)
    bench.broker("north").head()


def test_an_endorsement_is_for_one_newer_head(bench: Bench, set_back: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Party, "serves", ("north", "south"))
    newest: list[Signed] = []

    def meanwhile() -> None:
        for name in ("newer", "newest"):
            bench.register(name=name)
            newest.append(decode(Signed, bench.broker("north").head()))

    set_back(meanwhile)
    for head, member in zip(newest, ("north", "south"), strict=True):
        bench.broker("north").observe(encode(head))
        shown = bench.ask("north", bench.stewards[member], EndorseState(ahead=head.digest))
    assert shown.ahead == newest[1] and shown.awaited == ("north",)
