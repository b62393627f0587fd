"""Bad input is refused with a typed error that names the reason, wherever it is found out, and changes nothing."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import casemate as cm
import msgpack
import pytest
import pytest_asyncio
import torch
from casemate.client import Consortium
from casemate.identity import load_keys, now_ms
from casemate.jobs import Job, seal_job, sign_terms, submit
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.admission import Routing
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import decode, domain_digest, encode
from casemate_schemas.envelope import MAGIC, MAX_HEAD_BYTES, EnvelopeHead, frame_head, open_head, split_envelope
from casemate_schemas.errors import (
    BatchDependenceError,
    BudgetError,
    CasemateError,
    DatasetError,
    NotFoundError,
    ParameterError,
    UnsupportedOperationError,
)
from casemate_schemas.job import Plan, Rational
from casemate_schemas.model import ModelSpec, Node
from casemate_schemas.sealing import seal_envelope
from casemate_schemas.signatures import Signed, SigningKey, sign
from casemate_schemas.terms import Terms
from support.http import signed_request
from support.road import (
    COLLEAGUE,
    SCIENTIST,
    Planned,
    Road,
    ask,
    card,
    ended,
    licence,
    patients,
    planned,
    request,
    send,
    submit_spec,
    until,
)
from torch import nn

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def datasets(road: Road) -> list[str]:
    return await road.push("refusals", "north", "south")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def plan(road: Road, datasets: list[str]) -> Planned:
    """What an honest SDK would submit."""
    async with road.connected(SCIENTIST) as consortium:
        return await planned(consortium._session, datasets)


async def refused(road: Road, job: Job, reason: str, words: str, datasets: list[str]) -> None:
    """The job ended as refused for that reason, in those words, and nobody was charged."""
    status = await ended(job)
    assert (status.state, status.reason) == ("refused", reason)
    with pytest.raises(CasemateError, match=words) as raised:
        await job.result()
    assert raised.value.reason == reason
    assert not any(job.id in charged for charged in await road.charged(datasets))


# --- found out by the SDK -------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"batch_size": 0}, ParameterError, "batch_size"),
        ({"batch_size": 10_000}, ParameterError, "declared rows"),
        ({"batch_size": NAN}, ParameterError, "batch_size"),
        ({"steps": 0}, ParameterError, "steps"),
        ({"steps": None, "epochs": NAN}, ParameterError, "epochs"),
        ({"steps": None, "epochs": -1.0}, ParameterError, "epochs"),
        ({"deadline_s": NAN}, ParameterError, "deadline_s"),
        ({"target": "outcome"}, DatasetError, "'outcome'"),
        ({"features": ("age", "weight")}, DatasetError, "'weight'"),
        ({"datasets": ("unheard-of@north",)}, DatasetError, "unheard-of@north"),
        ({"loss": "cross_entropy", "target": "age", "features": ("dose", "sick")}, CasemateError, "class"),
        ({"model": nn.Sequential(nn.Linear(2, 1), nn.Dropout())}, UnsupportedOperationError, "(?i)dropout"),
        ({"model": nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))}, CasemateError, "(?i)batch"),
    ],
)
async def test_the_sdk_refuses(
    road: Road, datasets: list[str], changed: dict[str, Any], error: type[CasemateError], words: str
) -> None:
    async with road.connected(SCIENTIST) as consortium:
        before = len(await consortium.jobs())
        with pytest.raises(error, match=words):
            await consortium.train(**request(changed.pop("datasets", datasets), **changed))
        assert len(await consortium.jobs()) == before


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y - y.mean(0)


async def test_a_model_that_mixes_records_is_refused_by_its_line(road: Road, datasets: list[str]) -> None:
    async with road.connected(SCIENTIST) as consortium:
        with pytest.raises(BatchDependenceError, match=r"test_refusals\.py"):
            await consortium.train(**request(datasets, model=Mixing()))


# --- found out by key brokers -----------------------------------------------------------------------------------------


def _training(**changed: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan.model_copy(update={"training": plan.training.model_copy(update=changed)})


def _pipeline(**changed: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan.model_copy(update={"pipeline": plan.pipeline.model_copy(update=changed)})


def _uses(**changed: Any) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        return plan.model_copy(update={"datasets": tuple(use.model_copy(update=changed) for use in plan.datasets)})

    return change


FORBIDDEN: dict[str, tuple[Callable[[Plan], Plan], str, str]] = {
    "another purpose": (lambda plan: plan.model_copy(update={"purpose": "marketing"}), "licence_forbids", "train"),
    "too little noise for one job": (_training(noise_multiplier=0.3), "budget_exceeded", "4 for one job"),
    "too many steps for one job": (_training(steps=1_000_000), "budget_exceeded", "4 for one job"),
    "every record in every step": (
        _uses(sample_rate=Rational.of(Fraction(1))),
        "budget_exceeded",
        "4 for one job",
    ),
    "a missing target": (_pipeline(target="outcome"), "dataset_mismatch", "'outcome'"),
    "a missing feature": (_pipeline(features=("age", "weight")), "dataset_mismatch", "'weight'"),
    "another kind of target": (_pipeline(target_kind="value"), "invalid_parameter", "kind binary"),
    "a target that is not binary": (
        lambda plan: _training(loss="cross_entropy")(_pipeline(target_kind="class", n_classes=9)(plan)),
        "dataset_mismatch",
        "'sick'",
    ),
    "more rows than declared": (_uses(row_bound=1 << 30), "dataset_mismatch", "at most 64 rows"),
    "another licence": (_uses(licence=b"\7" * 32), "licence_forbids", "another licence"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
async def test_a_key_broker_refuses(road: Road, datasets: list[str], plan: Planned, case: str) -> None:
    change, reason, words = FORBIDDEN[case]
    async with road.connected(SCIENTIST) as consortium:
        job = await submit_spec(consortium._session, plan.spec(change(plan.plan)), plan.weights)
        await refused(road, job, reason, words, datasets)


UNTYPED: dict[str, tuple[tuple[str, ...], Any]] = {
    "sigma is NaN": (("plan", "training", "noise_multiplier"), NAN),
    "sigma is negative": (("plan", "training", "noise_multiplier"), -1.0),
    "sigma is zero": (("plan", "training", "noise_multiplier"), 0.0),
    "lr is infinite": (("plan", "training", "optimizer", "lr"), INF),
    "lr is negative": (("plan", "training", "optimizer", "lr"), -0.5),
    "epsilon is negative": (("plan", "privacy", "epsilon"), -3.0),
    "delta is NaN": (("plan", "privacy", "delta"), NAN),
    "q is negative": (("plan", "datasets", 0, "sample_rate", "numerator"), -1),
    "q is above one": (("plan", "datasets", 0, "sample_rate"), {"denominator": 1, "numerator": 2}),
    "an unknown field": (("bypass",), True),
    "an unknown version": (("version",), 2),
}


@pytest.mark.parametrize("case", UNTYPED)
async def test_terms_that_no_honest_sdk_can_write(road: Road, datasets: list[str], plan: Planned, case: str) -> None:
    """Signed by the scientist and sealed to the key brokers all the same."""
    path, value = UNTYPED[case]
    async with road.connected(SCIENTIST) as consortium:
        job = await _submit_forged(consortium, plan, path, value)
        await refused(road, job, "malformed", "not a valid Terms|must be finite", datasets)


async def _submit_forged(consortium: Consortium, plan: Planned, path: tuple[Any, ...], value: Any) -> Job:
    session, key = consortium._session, consortium._session.identity.keys.signing
    spec = plan.spec()
    honest = sign_terms(session, spec, plan.weights, deadline_s=600.0)
    submission = await seal_job(session, spec, honest, plan.weights)
    forged = _signed_again(honest, path, value, key)
    manifest, terms = session.consortium.manifest, honest.peek(Terms)
    envelope = seal_envelope(
        "terms",
        encode(forged),
        [manifest.key_broker(name).sealing_key for name in terms.key_brokers],
        consortium=session.consortium.id,
        key=key,
        created=now_ms(),
    )
    routing = submission.routing.peek(Routing).model_copy(update={"terms": forged.digest})
    changed = {"routing": sign(routing, key), "terms_envelope": envelope}
    return await submit(session, submission.model_copy(update=changed), spec.job_id)


def _signed_again(signed: Signed, path: tuple[Any, ...], value: Any, key: SigningKey) -> Signed:
    """The message with one value replaced, whatever the codec thinks of it, under a valid signature."""
    whole = msgpack.unpackb(signed.payload, raw=False)
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    payload = msgpack.packb(_sorted(whole), use_bin_type=True)
    to_sign = b"casemate-signature-v1\x00" + domain_digest(signed.kind, payload)
    return Signed(kind=signed.kind, payload=payload, signer=key.public, signature=key.sign_bytes(to_sign))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


async def test_a_licence_for_another_member(road: Road) -> None:
    north = cm.MemberIs(principal="submitter", member="north")
    rules = {permission.action: permission.rule for permission in licence("x@north").permissions}
    closed = tuple(cm.Permission(action=action, rule=rule) for action, rule in {**rules, "train": north}.items())
    datasets = await road.push("closed", "north", permissions=closed)
    async with road.connected(SCIENTIST) as consortium:
        made = await planned(consortium._session, datasets)
        job = await submit_spec(consortium._session, made.spec(), made.weights)
        await refused(road, job, "licence_forbids", "does not let this party train", datasets)


async def test_a_recipient_whom_the_licence_does_not_name(road: Road, datasets: list[str]) -> None:
    stranger = load_keys(road.layout.person_keys("erin@east")).delegation
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.train(**request(datasets, recipients=[stranger]))
        await refused(road, job, "licence_forbids", "does not let this party read_result", datasets)


async def test_an_expired_licence(road: Road) -> None:
    """Planned while it was good, submitted when it no longer is."""
    expires = now_ms() + 3000
    datasets = await road.push("expiring", "north", expires=expires)
    async with road.connected(SCIENTIST) as consortium:
        made = await planned(consortium._session, datasets)
        await until(lambda: now_ms() >= expires, "the licence to expire")
        job = await submit_spec(consortium._session, made.spec(), made.weights)
        await refused(road, job, "licence_forbids", "has expired", datasets)
        assert not set(datasets) & {dataset.id for dataset in await consortium.datasets()}
    with pytest.raises(ParameterError, match="expired"):
        await road.push("expired", "north", expires=expires)


async def test_a_spent_budget(road: Road, trained: Any) -> None:
    """The owner of a dataset that was charged once lowers its lifetime's budget for a while."""
    dataset = trained.datasets[0]
    spent = (await road.budget(dataset)).epsilon_spent
    async with road.connected(SCIENTIST) as consortium:
        made = await planned(consortium._session, [dataset])
    async with road.connected("sam@north") as consortium:
        lower = licence(dataset, number=2, epsilon=spent * 1.2, epsilon_per_job=spent * 1.2)
        changed = await consortium.push(patients("north"), card("shared", "north"), licence=lower)
    before = await road.budget(dataset)
    assert before.epsilon_spent == spent and before.epsilon_remaining < spent
    async with road.connected(SCIENTIST) as consortium:
        with pytest.raises(BudgetError, match="is left"):
            await consortium.train(**request([dataset]))
        plan = _uses(licence=changed.licence, envelope=changed.envelope)(made.plan)
        job = await submit_spec(consortium._session, made.spec(plan), made.weights)
        await refused(road, job, "budget_exceeded", "lifetime budget", [dataset])
    assert await road.budget(dataset) == before
    async with road.connected("sam@north") as consortium:
        await consortium.push(patients("north"), card("shared", "north"), licence=licence(dataset, number=3))


# --- found out by workers, before any owner is asked for a key -------------------------------------------------------


def _nodes(model: ModelSpec, operation: str, **options: Any) -> ModelSpec:
    """The model with one more function before its output."""
    *nodes, last = model.nodes
    node = Node(name="more#7", kind="function", operation=operation, options=options, inputs=last.inputs)
    return model.model_copy(update={"nodes": (*nodes, node, last.model_copy(update={"inputs": (node.name,)}))})


async def test_a_worker_refuses_what_key_brokers_cannot_see(road: Road, datasets: list[str], plan: Planned) -> None:
    """A forbidden and a batch-mixing operation, weights that are cut short, and another plan than the owners were told."""
    async with road.connected(SCIENTIST) as consortium:
        session = consortium._session
        told = plan.spec()
        meant = told.model_copy(update={"plan": _training(noise_multiplier=0.3)(told.plan)})
        forbidden = plan.spec(model=_nodes(plan.model, "load_library"))
        mixing = plan.spec(model=_nodes(plan.model, "softmax", axis=0))
        jobs = {
            "operation_not_allowed": await submit_spec(session, forbidden, plan.weights),
            "batch_dependence": await submit_spec(session, mixing, plan.weights),
            "malformed": await submit_spec(session, plan.spec(), plan.weights[:-1]),
            "provenance_broken": await submit_spec(session, told, plan.weights, meant=meant),
        }
        statuses = dict(zip(jobs, await asyncio.gather(*map(ended, jobs.values())), strict=True))
        assert {reason: status.reason for reason, status in statuses.items()} == {reason: reason for reason in jobs}
        assert {status.state for status in statuses.values()} == {"refused", "failed"}
        for job in jobs.values():
            with pytest.raises(CasemateError):
                await job.result()
    assert not {job.id for job in jobs.values()} & {
        charged for each in await road.charged(datasets) for charged in each
    }


# --- found out by the gateway -----------------------------------------------------------------------------------------


async def _job_envelope(road: Road, person: str) -> bytes:
    async with road.connected(person) as consortium:
        session = consortium._session
        return seal_envelope(
            "job",
            secrets.token_bytes(5000),
            [session.consortium.manifest.key_broker("university").sealing_key],
            consortium=session.consortium.id,
            key=session.identity.keys.signing,
            created=now_ms(),
        )


def _head(envelope: bytes) -> EnvelopeHead:
    return open_head(split_envelope(envelope, max_bytes=1 << 20)[0])


def _reframed(envelope: bytes, signed: Signed) -> bytes:
    body = encode(signed)
    return MAGIC + len(body).to_bytes(4, "big") + body + bytes(split_envelope(envelope, max_bytes=1 << 20)[1])


def _of_version(envelope: bytes, key: SigningKey) -> bytes:
    signed = decode(Signed, split_envelope(envelope, max_bytes=1 << 20)[0])
    return _reframed(envelope, _signed_again(signed, ("header", "preamble", "version"), 9, key))


def _signed_by_another(envelope: bytes, _: SigningKey) -> bytes:
    ciphertext = bytes(split_envelope(envelope, max_bytes=1 << 20)[1])
    return frame_head(_head(envelope), SigningKey.generate()) + ciphertext


HOSTILE: dict[str, tuple[Callable[[bytes, SigningKey], bytes], int, str]] = {
    "no envelope at all": (lambda envelope, _: b"\0" * len(envelope), 400, "malformed"),
    "a head beyond its bound": (
        lambda envelope, _: MAGIC + (MAX_HEAD_BYTES + 1).to_bytes(4, "big") + envelope,
        413,
        "too_large",
    ),
    "a head of four gigabytes": (lambda envelope, _: MAGIC + b"\xff" * 4 + envelope, 413, "too_large"),
    "an unknown version": (_of_version, 400, "unsupported_version"),
    "signed by another key": (_signed_by_another, 401, "bad_signature"),
    "cut short": (lambda envelope, _: envelope[:-1], 400, "malformed"),
    "longer than it says": (lambda envelope, _: envelope + b"\0", 400, "malformed"),
    "changed on its way": (lambda envelope, _: envelope[:-1] + bytes([envelope[-1] ^ 1]), 400, "seal_does_not_open"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_envelope_is_not_stored(road: Road, case: str) -> None:
    change, status, reason = HOSTILE[case]
    keys = load_keys(road.layout.person_keys(SCIENTIST))
    envelope = await _job_envelope(road, SCIENTIST)
    code, problem, _ = await ask(road, keys, "POST", ENVELOPES_PATH, change(envelope, keys.signing))
    assert (code, problem["status"], problem["reason"]) == (status, status, reason)
    assert problem["type"].endswith(reason) and problem["detail"]
    async with road.nats("gateway") as client:
        with pytest.raises(NotFoundError):
            await EnvelopeStore(client, BlobStore(client)).head(_head(envelope).header.digest)


async def test_somebody_elses_envelope_is_not_taken(road: Road) -> None:
    envelope, mallory = await _job_envelope(road, SCIENTIST), load_keys(road.layout.person_keys(COLLEAGUE))
    code, problem, _ = await ask(road, mallory, "POST", ENVELOPES_PATH, envelope)
    assert (code, problem["reason"]) == (403, "not_allowed")


async def test_a_recorded_request_is_good_once(road: Road) -> None:
    keys, envelope = load_keys(road.layout.person_keys(SCIENTIST)), await _job_envelope(road, SCIENTIST)
    assert keys.delegation is not None
    url = road.layout.read_facts().url + ENVELOPES_PATH
    recorded = signed_request(keys.signing, keys.delegation, "POST", url, envelope)
    assert (await send(recorded, envelope))[0] == 201
    code, problem, _ = await send(recorded, envelope)
    assert (code, problem["reason"]) == (401, "not_authenticated")
    code, problem, _ = await send(signed_request(keys.signing, keys.delegation, "POST", url, b"other"), envelope)
    assert code == 401


async def test_a_submission_is_its_signers_alone(road: Road, trained: Any) -> None:
    clara, mallory = (load_keys(road.layout.person_keys(person)) for person in (SCIENTIST, COLLEAGUE))
    body = encode(trained.submission)
    code, problem, _ = await ask(road, mallory, "POST", JOBS_PATH, body)
    assert (code, problem["reason"]) == (401, "bad_signature")
    code, problem, _ = await ask(road, clara, "POST", JOBS_PATH, body[:-1])
    assert (code, problem["reason"]) == (400, "malformed")
    code, problem, _ = await ask(road, clara, "POST", JOBS_PATH, b"\0" * (1 << 20))
    assert (code, problem["reason"]) == (413, "too_large")
    routing = trained.submission.routing.peek(Routing)
    stolen = routing.model_copy(update={"recipients": (mallory.signing.public,)})
    for key, status, reason in ((mallory.signing, 401, "bad_signature"), (clara.signing, 422, "key_reused")):
        changed = trained.submission.model_copy(update={"routing": sign(stolen, key)})
        code, problem, _ = await ask(road, clara, "POST", JOBS_PATH, encode(changed))
        assert (code, problem["reason"]) == (status, reason)
