"""What people ask: registering, listing, budgets; and what others may not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from casemate_key_broker import audit_log
from casemate_schemas.codec import digest_of
from casemate_schemas.dataset import Column
from casemate_schemas.errors import AuthenticationError, CasemateError, SealError, SignatureError
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import ForPurpose, Permission, RoleIs
from casemate_schemas.requests import (
    MAX_REQUEST_AGE_MS,
    Budget,
    DatasetListing,
    DatasetRegistered,
    ListDatasets,
    Refusal,
    RegisterDataset,
    ShowBudget,
)
from casemate_schemas.sealing import seal_envelope
from casemate_schemas.signatures import sign
from support.key_brokers import Bench, Dataset


def _register(bench: Bench, dataset: Dataset, **changed: Any) -> Any:
    return bench.ask("north", bench.stewards["north"], bench.registration(dataset, **changed))


def test_a_name_keeps_its_lineage_and_its_charges(bench: Bench) -> None:
    dataset = bench.dataset()
    first = _register(bench, dataset)
    assert isinstance(first, DatasetRegistered)
    bench.grant_all(bench.accepted_job(dataset.use()))
    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    again = _register(bench, dataset)
    newer = bench.dataset(number=2, epsilon=3.5)
    amended = _register(bench, newer)
    assert again == first and isinstance(amended, DatasetRegistered)
    assert (amended.lineage, amended.envelope == first.envelope) == (first.lineage, False)
    after = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert after.lines == budget.lines and after.epsilon == 3.5
    bench.restart("north")
    other = bench.ask("north", bench.stewards["north"], bench.registration(bench.dataset(name="other")))
    assert isinstance(other, DatasetRegistered) and other.lineage != first.lineage


@pytest.mark.parametrize("number", [1, 2])
def test_licence_numbers_only_go_up(bench: Bench, number: int) -> None:
    dataset = bench.dataset(number=2)
    assert isinstance(_register(bench, dataset), DatasetRegistered)
    lower = replace(dataset, licence=bench.licence(dataset.card.id, number=number, epsilon=2.5))
    refusal = _register(bench, lower)
    assert isinstance(refusal, Refusal) and refusal.reason == "conflict"
    listing = bench.ask("north", bench.clara, ListDatasets())
    assert [offer.licence.digest for offer in listing.datasets] == [digest_of(dataset.licence)]


Change = Callable[[Bench, Dataset], RegisterDataset]


def _signed_by_another(bench: Bench, dataset: Dataset) -> RegisterDataset:
    return bench.registration(dataset, licence=sign(dataset.licence, bench.stewards["south"].keys.signing))


BAD_REGISTRATIONS: dict[str, tuple[Change, str]] = {
    "card of another owner": (lambda b, d: b.registration(d, card=b.card("south")), "not_allowed"),
    "licence for another dataset": (
        lambda b, d: b.registration(replace(d, licence=b.licence("other@north"))),
        "invalid_parameter",
    ),
    "licence expired": (
        lambda b, d: b.registration(replace(d, licence=b.licence(d.card.id, expires=b.clock()))),
        "invalid_parameter",
    ),
    "licence that allows more than it seems to": (
        lambda b, d: b.registration(
            replace(d, licence=b.licence(d.card.id, permissions=b.permissions(train=ForPurpose(purpose="research"))))
        ),
        "invalid_parameter",
    ),
    "licence signed by another": (_signed_by_another, "not_authenticated"),
    "envelope of another sender": (
        lambda b, d: b.registration(d, head=b.seal_dataset(by=b.stewards["south"])),
        "seal_does_not_open",
    ),
    "envelope for another key broker": (
        lambda b, d: b.registration(d, head=b.seal_dataset(to=b.prepared("south"))),
        "seal_does_not_open",
    ),
    "envelope for the key broker's own key": (
        lambda b, d: b.registration(d, head=b.seal_dataset(to=b.key_brokers["north"].sealing.public)),
        "seal_does_not_open",
    ),
    "envelope that is none": (lambda b, d: b.registration(d, head=b"\x93\x00\x00\x00"), "malformed"),
}


@pytest.mark.parametrize("case", BAD_REGISTRATIONS)
def test_registrations_that_do_not_hold_together(bench: Bench, case: str) -> None:
    change, reason = BAD_REGISTRATIONS[case]
    refusal = bench.ask("north", bench.stewards["north"], change(bench, bench.dataset()))
    assert isinstance(refusal, Refusal) and refusal.reason == reason and refusal.message
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM datasets").fetchone() == (0,)
        entry = audit_log.entries(tx)[-1]
    assert (entry.event, entry.reason, entry.person) == ("refused", reason, "nora@north")


def test_an_envelope_belongs_to_one_name_and_one_card(bench: Bench) -> None:
    dataset = bench.register()
    elsewhere = bench.dataset(name="fresh-budget", head=dataset.head)
    wider = replace(dataset, card=bench.card(row_bound=400))
    for attempt in (elsewhere, wider):
        refusal = _register(bench, attempt)
        assert isinstance(refusal, Refusal) and refusal.reason == "conflict"


def test_only_stewards_of_the_owner_register_and_look(bench: Bench) -> None:
    dataset = bench.register()
    scientist = bench.person("north", "sam", ("scientist",))
    for person in (scientist, bench.stewards["south"], bench.clara):
        for body in (bench.registration(dataset), ShowBudget(dataset=dataset.card.id)):
            refusal = bench.ask("north", person, body)
            assert isinstance(refusal, Refusal) and refusal.reason == "not_allowed"
    elsewhere = bench.ask("clara", bench.stewards["north"], bench.registration(dataset))
    assert isinstance(elsewhere, Refusal) and elsewhere.reason == "not_allowed"


def test_listing_shows_what_each_licence_lets_one_list(bench: Bench) -> None:
    seen, hidden = bench.register(name="seen"), bench.dataset(name="hidden")
    stewards_only = (Permission(action="list", rule=RoleIs(principal="submitter", role="steward")),)
    hidden = replace(hidden, licence=bench.licence(hidden.card.id, permissions=stewards_only))
    assert isinstance(_register(bench, hidden), DatasetRegistered)
    listing = bench.ask("north", bench.clara, ListDatasets())
    assert isinstance(listing, DatasetListing)
    (offer,) = listing.datasets
    assert (offer.card, offer.envelope, offer.epsilon_spent) == (seen.card, seen.envelope, 0.0)
    assert offer.epsilon_remaining == seen.licence.epsilon and offer.card_digest == digest_of(seen.card)
    steward = bench.ask("north", bench.stewards["south"], ListDatasets())
    assert [offer.card.id for offer in steward.datasets] == ["hidden@north"]


def test_a_listing_too_large_to_be_sent(bench: Bench) -> None:
    column = Column(name="x", dtype="float32", lower=0.0, upper=1.0, description="x" * 2000)
    columns = tuple(column.model_copy(update={"name": f"x{number}"}) for number in range(120))
    for number in range(5):
        dataset = bench.dataset(name=f"wide-{number}")
        wide = replace(dataset, card=bench.card(name=f"wide-{number}", columns=columns))
        assert isinstance(_register(bench, wide), DatasetRegistered)
    refusal = bench.ask("north", bench.clara, ListDatasets())
    assert isinstance(refusal, Refusal) and refusal.reason == "too_large"


def test_an_unknown_datasets_budget(bench: Bench) -> None:
    refusal = bench.ask("north", bench.stewards["north"], ShowBudget(dataset="unheard-of@north"))
    assert isinstance(refusal, Refusal) and refusal.reason == "not_found"


def test_a_registration_is_not_repeated_by_whoever_carries_it(bench: Bench) -> None:
    steward = bench.stewards["north"]
    request = bench.request("north", steward, bench.registration(bench.dataset()))
    first = bench.answer("north", steward, bench.broker("north").message(request))
    bench.restart("north")
    again = bench.answer("north", steward, bench.broker("north").message(request))
    assert isinstance(first, DatasetRegistered)
    assert isinstance(again, Refusal) and again.reason == "conflict"
    bench.clock.advance(MAX_REQUEST_AGE_MS / 1000 + 1)
    with pytest.raises(AuthenticationError):
        bench.broker("north").message(request)


def test_an_answer_is_for_the_one_who_asked(bench: Bench) -> None:
    response = bench.broker("north").message(bench.request("north", bench.clara, ListDatasets()))
    with pytest.raises(SealError):
        bench.answer("north", bench.stewards["north"], response)


def test_requests_that_cannot_be_authenticated(bench: Bench) -> None:
    now = bench.clock()
    thief, expired = bench.stewards["south"], bench.person("north", "nils", ("steward",), days=1)
    borrowed = replace(thief, delegation=bench.stewards["north"].delegation)
    outsider = replace(thief, delegation=sign(thief.delegation.peek(Delegation), thief.keys.signing))
    cases: list[tuple[type[CasemateError], bytes]] = [
        (AuthenticationError, bench.request("north", borrowed, ListDatasets())),
        (AuthenticationError, bench.request("north", outsider, ListDatasets())),
        (AuthenticationError, bench.request("north", expired, ListDatasets())),
        (AuthenticationError, bench.request("north", bench.clara, ListDatasets(), key_broker="south")),
        (AuthenticationError, bench.request("north", bench.clara, ListDatasets(), consortium=os.urandom(32))),
        (
            AuthenticationError,
            bench.request("north", bench.clara, ListDatasets(), created=now - MAX_REQUEST_AGE_MS - 1),
        ),
        (
            AuthenticationError,
            bench.request("north", bench.clara, ListDatasets(), created=now + MAX_REQUEST_AGE_MS + 1),
        ),
        (SealError, bench.request("south", bench.clara, ListDatasets())),
    ]
    for error, payload in cases:
        with pytest.raises(error):
            bench.broker("north").message(payload)
    changed = bytearray(bench.request("north", bench.clara, ListDatasets()))
    changed[-1] ^= 1
    with pytest.raises((SealError, SignatureError)):
        bench.broker("north").message(bytes(changed))


def test_a_request_of_another_kind(bench: Bench) -> None:
    other = seal_envelope(
        "terms",
        b"",
        (bench.key_brokers["north"].sealing.public,),
        consortium=bench.consortium.id,
        key=bench.clara.keys.signing,
        created=bench.clock(),
    )
    with pytest.raises(CasemateError, match="expected a request envelope"):
        bench.broker("north").message(other)


def test_the_budget_of_a_single_job_is_its_own_epsilon(bench: Bench) -> None:
    """The filter's bound on one job lies above it; a charge within the licence is never shown as more than that."""
    dataset = bench.register(epsilon=0.8, epsilon_per_job=0.8)
    bench.grant_all(bench.accepted_job(dataset.use()))
    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert isinstance(budget, Budget)
    assert budget.epsilon_spent == budget.lines[0].epsilon <= 0.8
    assert budget.lines[0].committed is None
