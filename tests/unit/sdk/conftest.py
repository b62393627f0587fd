"""A consortium, its gateway in memory, and key brokers that offer two hospitals' datasets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from casemate_schemas.codec import digest_of
from casemate_schemas.custody import DatasetPrepared, PrepareDataset
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import NotFoundError
from casemate_schemas.licence import Licence, Permission, RoleIs
from casemate_schemas.requests import (
    Budget,
    DatasetListing,
    DatasetOffer,
    DatasetRegistered,
    ListDatasets,
    PersonRequest,
    Refusal,
    RegisterDataset,
)
from casemate_schemas.sealing import SealingKey
from casemate_schemas.signatures import sign
from support.fake_gateway import FakeGateway, serving
from support.results import World, world


@pytest.fixture(scope="session")
def w() -> World:
    return world()


def card_of(owner: str, **changes: Any) -> DatasetCard:
    """Age, pulse and an outcome of 0 or 1, for at most 200 patients."""
    fields: dict[str, Any] = {
        "name": "cardio",
        "owner": owner,
        "columns": (
            Column(name="age", dtype="float32", lower=0, upper=120, unit="years"),
            Column(name="pulse", dtype="float32", lower=20, upper=250, unit="1/min"),
            Column(name="outcome", dtype="int64", lower=0, upper=1),
        ),
        "row_bound": 200,
        "description": f"patients of {owner}",
    }
    return DatasetCard(**{**fields, **changes})


def licence_of(owner: str, **changes: Any) -> Licence:
    """Scientists may list and train."""
    rule = RoleIs(principal="submitter", role="scientist")
    read = RoleIs(principal="recipient", role="scientist")
    fields: dict[str, Any] = {
        "number": 1,
        "dataset": f"cardio@{owner}",
        "permissions": (
            Permission(action="list", rule=rule),
            Permission(action="train", rule=rule),
            Permission(action="read_result", rule=read),
        ),
        "epsilon": 10.0,
        "epsilon_per_job": 5.0,
        "delta": 1e-3,
        "expires": 1 << 47,
    }
    return Licence(**{**fields, **changes})


class KeyBrokers:
    """What the key brokers answer; tests change ``offers`` and look at ``asked``."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.offers = {owner: self.offer(card_of(owner), licence_of(owner)) for owner in ("north", "south")}
        self.asked: list[tuple[str, PersonRequest]] = []
        self.prepared = SealingKey.generate()
        self.fail: dict[str, Exception] = {}

    def offer(self, card: DatasetCard, licence: Licence, /, **changes: Any) -> DatasetOffer:
        fields: dict[str, Any] = {
            "card": card,
            "card_digest": digest_of(card),
            "licence": sign(licence, self.w.members[card.owner].signing),
            "envelope": b"\x05" * 32,
            "key_broker": card.owner,
            "epsilon_spent": 0.0,
            "epsilon_remaining": licence.epsilon,
        }
        return DatasetOffer(**{**fields, **changes})

    def answer(self, name: str, request: PersonRequest) -> Any:
        self.asked.append((name, request))
        if name in self.fail:
            raise self.fail[name]
        if isinstance(request.body, ListDatasets):
            return DatasetListing(datasets=(self.offers[name],) if name in self.offers else ())
        if isinstance(request.body, PrepareDataset):
            return DatasetPrepared(sealing_key=self.prepared.public)
        if isinstance(request.body, RegisterDataset):
            return DatasetRegistered(
                dataset=request.body.card.id,
                lineage=bytes(32),
                envelope=b"\x01" * 32,
                licence=request.body.licence.digest,
            )
        if name not in self.offers:
            return Refusal(reason=NotFoundError.reason, message="no such dataset\x1b[31m")
        return Budget(
            dataset=request.body.dataset,
            epsilon=10.0,
            delta=1e-3,
            epsilon_spent=2.5,
            epsilon_remaining=7.5,
            lineage=b"\x05" * 32,
            privacy_unit="record",
            epsilon_estimate=2.25,
            renewals=(),
            n_charges=0,
            lines=(),
        )


@pytest.fixture
def brokers(w: World) -> KeyBrokers:
    return KeyBrokers(w)


@pytest.fixture
async def gateway(w: World, brokers: KeyBrokers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGateway]:
    async def no_pause(self: object, _: float) -> None:
        return None

    monkeypatch.setattr("casemate._http.Gateway.wait", no_pause)
    async with serving(FakeGateway(w, brokers.answer)) as running:
        yield running


@pytest.fixture
def options(w: World, tmp_path: Path) -> dict[str, Any]:
    """Clara's connection."""
    return {"identity": w.clara, "state_dir": tmp_path / "state", "consortium": w.consortium.id.hex()}
