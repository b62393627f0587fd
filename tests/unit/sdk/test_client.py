"""Connecting, pinning, asking: against a gateway that checks every signature."""

from __future__ import annotations

from typing import Any

import casemate as cm
import numpy as np
import pytest
from casemate.identity import Identity, load_keys, new_person, save_keys
from casemate_models.tensors import read_tensors
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import (
    AuthenticationError,
    CasemateError,
    ConflictError,
    DatasetError,
    LicenceError,
    MalformedError,
    ManifestError,
    NotFoundError,
    ParameterError,
    SetupError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
)
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import Licence
from casemate_schemas.requests import PersonRequest, RegisterDataset
from casemate_schemas.sealing import open_ciphertext, unseal_content_key
from casemate_schemas.sections import unpack_sections
from casemate_schemas.signatures import sign
from support.fake_gateway import FakeGateway
from support.results import World

from .conftest import KeyBrokers, card_of, licence_of


async def test_the_consortium_is_verified_and_says_that_it_is_simulated(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        assert consortium.id == w.consortium.id.hex()
        assert consortium.simulation and "SIMULATED" in repr(consortium)
        assert consortium.person == "clara@lab"


async def test_first_contact_is_said_once_unless_the_id_is_given(gateway: FakeGateway, options: dict[str, Any]) -> None:
    del options["consortium"]
    with pytest.warns(cm.FirstContactWarning, match="SIMULATED"):
        async with cm.connect(gateway.url, **options):
            pass
    async with cm.connect(gateway.url, **options):
        pass


async def test_a_newer_manifest_is_pinned_and_an_older_or_forked_one_refused(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    newer = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(name="renamed")))
    gateway.chain = encode(newer)
    async with cm.connect(gateway.url, **options) as consortium:
        assert consortium.manifest.number == 2
    fork = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(name="forked")))
    for chain in (w.chain, fork):
        gateway.chain = encode(chain)
        with pytest.raises(ManifestError, match="seen before"):
            async with cm.connect(gateway.url, **options):
                pass
    gateway.chain = encode(newer)
    async with cm.connect(gateway.url, **options) as consortium:
        assert consortium.manifest.number == 2


async def test_another_consortium_than_the_delegation_names_is_refused(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    with pytest.raises(ManifestError):
        async with cm.connect(gateway.url, **(options | {"consortium": "00" * 32})):
            pass
    with pytest.raises(ParameterError):
        async with cm.connect(gateway.url, **(options | {"consortium": "xyz"})):
            pass
    gateway.chain = encode(ManifestChain(manifests=(w.next_manifest(number=1, previous=None, name="another"),)))
    with pytest.raises(ManifestError, match="another consortium"):
        async with cm.connect(gateway.url, **options):
            pass


async def test_an_expired_delegation_is_refused_at_once(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    with pytest.raises(AuthenticationError, match="not valid at this time"):
        async with cm.connect(gateway.url, **options, clock=lambda: w.now + 93 * 24 * 3_600_000):
            pass


@pytest.mark.parametrize("url", ["ftp://a", "http://", "https://u@a", "https://a/path", "https://a?x", "not a url"])
async def test_a_url_that_is_none_is_a_parameter_error(options: dict[str, Any], url: str) -> None:
    with pytest.raises(ParameterError):
        async with cm.connect(url, **options):
            pass


async def test_datasets_are_listed_from_all_key_brokers_and_print_themselves(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        found = await consortium.datasets()
    assert [item.id for item in found] == ["cardio@north", "cardio@south"]
    text = str(found[0])
    assert "age: float32 in [0, 120] years" in text and "ε 10 of 10 left" in text and "SIMULATED" in text
    assert {name for name, _ in brokers.asked} == {"lab", "north", "south"}
    assert len({request.id for _, request in brokers.asked}) == 3


async def test_a_key_broker_that_is_away_is_named_and_the_others_are_listed(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    brokers.fail["south"] = UnavailableError("asleep")
    async with cm.connect(gateway.url, **options) as consortium:
        found = await consortium.datasets()
    assert [item.id for item in found] == ["cardio@north"] and dict(found.unavailable) == {"south": "asleep"}
    assert "key broker south did not answer" in str(found)


@pytest.mark.parametrize("how", ["owner", "card digest", "licence", "signature"])
async def test_an_offer_that_does_not_hold_together_is_refused(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, how: str
) -> None:
    card, licence = card_of("north"), licence_of("north")
    forged = sign(licence, brokers.w.members["north"].signing).model_copy(update={"signature": bytes(64)})
    brokers.offers["north"] = {
        "owner": brokers.offer(card_of("south"), licence_of("south")),
        "card digest": brokers.offer(card, licence, card_digest=bytes(32)),
        "licence": brokers.offer(card, licence_of("south")),
        "signature": brokers.offer(card, licence, licence=forged),
    }[how]
    expected = {
        "owner": ManifestError,
        "card digest": DatasetError,
        "licence": LicenceError,
        "signature": CasemateError,
    }
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(expected[how]):
            await consortium.datasets()


async def test_a_refusal_is_raised_as_its_own_class_with_words_safe_to_show(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        assert (await consortium.budget("cardio@north")).epsilon_spent == 2.5
        with pytest.raises(NotFoundError, match="lab: no such dataset \\[31m"):
            await consortium.budget("cardio@lab")


async def test_an_answer_to_another_question_is_refused(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    real = brokers.answer

    def swapped(name: str, request: PersonRequest) -> Any:
        object.__setattr__(request, "id", bytes(16))
        return real(name, request)

    gateway.answer = swapped
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(CasemateError, match="another question"):
            await consortium.budget("cardio@north")


async def test_push_seals_card_and_columns_to_the_owners_key_broker(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, w: World
) -> None:
    columns = {
        "age": np.array([40, 50], np.float32),
        "pulse": np.array([60, 70], np.float32),
        "outcome": np.array([0, 1], np.int64),
    }
    card, licence = card_of("north"), licence_of("north")
    async with cm.connect(gateway.url, **options) as consortium:
        registered = await consortium.push(columns, _public(cm.DatasetCard, card), licence=_public(cm.Licence, licence))
    assert registered.dataset == "cardio@north"
    name, request = brokers.asked[-1]
    assert name == "north" and isinstance(request.body, RegisterDataset)
    assert request.body.licence.verify(Licence, w.clara.keys.signing.public) == licence
    head = open_head(request.body.head, kind="dataset", sender=w.clara.keys.signing.public)
    _, ciphertext = split_envelope(gateway.envelopes[head.header.digest.hex()], max_bytes=1 << 20)
    content_key = unseal_content_key(head, brokers.prepared)
    sections = unpack_sections(open_ciphertext(head.header, content_key, ciphertext), ("card", "columns"))
    assert decode(DatasetCard, bytes(sections["card"])) == card
    opened = read_tensors(bytes(sections["columns"]), max_bytes=1 << 20, max_tensors=3)
    np.testing.assert_array_equal(opened["age"], columns["age"])


async def test_push_refuses_what_does_not_fit_before_anything_is_sent(
    gateway: FakeGateway, options: dict[str, Any]
) -> None:
    good = {
        "age": np.zeros(2, np.float32),
        "pulse": np.zeros(2, np.float32),
        "outcome": np.zeros(2, np.int64),
    }
    bad: list[dict[str, Any]] = [
        {"age": np.zeros(2, np.float64)},
        {"age": np.zeros((2, 2), np.float32)},
        {"age": np.zeros(3, np.float32)},
        {"extra": np.zeros(2, np.float32)},
        {name: np.zeros(201, array.dtype) for name, array in good.items()},
    ]
    card, licence = _public(cm.DatasetCard, card_of("north")), _public(cm.Licence, licence_of("north"))
    async with cm.connect(gateway.url, **options) as consortium:
        for changes in bad:
            with pytest.raises(DatasetError):
                await consortium.push(good | changes, card, licence=licence)
        with pytest.raises(LicenceError):
            await consortium.push(good, card, licence=_public(cm.Licence, licence_of("south")))
    assert not gateway.envelopes


async def test_transient_problems_are_tried_again_each_time_signed_anew(
    gateway: FakeGateway, options: dict[str, Any]
) -> None:
    gateway.fail = [UnavailableError("busy"), StorageFullError("full")]
    async with cm.connect(gateway.url, **options):
        assert gateway.requests == ["GET /v1/consortium"] * 3
    assert len(gateway.nonces) == 3
    gateway.fail = [UnavailableError("busy")] * 9
    with pytest.raises(UnavailableError):
        async with cm.connect(gateway.url, **options):
            pass


@pytest.mark.parametrize(
    "error", [ConflictError("other"), NotFoundError("none"), TooLargeError("big"), LicenceError("no")]
)
async def test_problems_are_raised_as_the_class_of_their_reason(
    gateway: FakeGateway, options: dict[str, Any], error: CasemateError
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        gateway.fail = [error]
        with pytest.raises(type(error), match=str(error)):
            await consortium.jobs()
        assert not gateway.fail


async def test_an_unreachable_gateway_is_unavailable(options: dict[str, Any], gateway: FakeGateway) -> None:
    with pytest.raises(UnavailableError, match="no answer from"):
        async with cm.connect("http://127.0.0.1:1", **options):
            pass


def test_key_files_are_private_and_never_overwritten(tmp_path: Any, w: World) -> None:
    path = tmp_path / "clara.key"
    save_keys(path, w.clara.keys)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.of(path).name == "clara@lab"
    with pytest.raises(SetupError):
        save_keys(path, KeyRing.generate())
    path.chmod(0o640)
    with pytest.raises(SetupError, match="chmod 600"):
        load_keys(path)
    with pytest.raises(SetupError):
        load_keys(tmp_path / "missing.key")
    broken = tmp_path / "broken.key"
    broken.write_text("nothing\n")
    broken.chmod(0o600)
    with pytest.raises(MalformedError):
        load_keys(broken)


def test_keys_without_or_with_anothers_delegation_are_no_identity(w: World) -> None:
    keys = KeyRing.generate()
    with pytest.raises(AuthenticationError):
        Identity.of(keys)
    with pytest.raises(AuthenticationError):
        Identity.of(KeyRing(keys.signing, keys.sealing, w.clara.signed_delegation))
    with pytest.raises(ParameterError):
        new_person(keys, consortium=bytes(32), member="lab", person="x", roles=("scientist",), lasts_ms=1 << 40)


def _public(cls: Any, message: Any) -> Any:
    """The same under its public class."""
    return cls(**dict(message))
