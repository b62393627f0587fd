"""Planning, submitting, following, opening: against a gateway that checks every signature."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import casemate as cm
import pytest
import torch
from casemate_models.building import build
from casemate_privacy import hardened, rounding
from casemate_privacy.accounting import epsilon
from casemate_privacy.statement import job_event, privacy_statement
from casemate_schemas.admission import PrecheckAnswer, Routing
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import (
    BatchDependenceError,
    BudgetError,
    CasemateError,
    ConflictError,
    DatasetError,
    LicenceError,
    MalformedError,
    ModelError,
    ParameterError,
    ReleaseError,
    StateError,
    UnavailableError,
)
from casemate_schemas.job import JOB_SECTIONS, JobSpec
from casemate_schemas.job_state import JobEvent, JobState
from casemate_schemas.requests import Refusal
from casemate_schemas.sealing import open_ciphertext, open_envelope, seal_envelope, unseal_content_key
from casemate_schemas.sections import unpack_sections
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms, verify_terms, weights_commitment
from rich.console import Console
from support.fake_gateway import FakeGateway, job_status
from support.results import JOB_ID, World
from torch import nn

from .conftest import KeyBrokers, card_of, licence_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def request_of(**changes: Any) -> dict[str, Any]:
    """A good request; tests break one thing."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(2, 1)),
        "datasets": ["cardio@south", "cardio@north"],
        "target": "outcome",
        "privacy": cm.Privacy(epsilon=3.0, delta=1e-3),
        "optimizer": cm.SGD(lr=0.5),
        "batch_size": 100,
        "steps": 100,
    }
    return {**fields, **changes}


def opened_job(gateway: FakeGateway, w: World) -> tuple[Terms, JobSpec, bytes]:
    """What the key broker and then a worker would open of the last submission."""
    submission = gateway.submissions[-1]
    routing = submission.routing.verify(Routing, w.clara.keys.signing.public)
    _, plaintext = open_envelope(
        submission.terms_envelope,
        w.brokers["south"].sealing,
        kind="terms",
        consortium=w.consortium.id,
        sender=w.clara.keys.signing.public,
        max_bytes=1 << 20,
    )
    signed_terms = decode(Signed, plaintext)
    assert routing.terms == signed_terms.digest
    signed_head, ciphertext = split_envelope(gateway.envelopes[routing.job_envelope.hex()], max_bytes=1 << 22)
    head = open_head(signed_head, kind="job")
    content_key = unseal_content_key(head, w.brokers["lab"].sealing)
    sections = unpack_sections(open_ciphertext(head.header, content_key, ciphertext), JOB_SECTIONS)
    assert decode(Signed, bytes(sections["terms"])) == signed_terms
    terms = verify_terms(signed_terms, w.consortium).terms
    return terms, decode(JobSpec, bytes(sections["spec"])), bytes(sections["weights"])


async def test_a_submitted_job_opens_and_every_part_agrees(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    request = request_of()
    async with cm.connect(gateway.url, **options) as consortium:
        job = await consortium.train(**request)
    terms, spec, weights = opened_job(gateway, w)
    assert terms.job_id == spec.job_id == job.id
    assert terms.plan == spec.plan
    assert terms.key_brokers == ("lab", "north", "south")
    assert terms.job_spec_commitment == digest_of(spec)
    assert terms.initial_weights_commitment == weights_commitment(spec, weights)
    rebuilt = build(spec.model, weights)
    x = torch.tensor([[0.25, -1.0]])
    assert torch.equal(rebuilt(x), request["model"](x))
    assert spec.plan.pipeline.features == ("age", "pulse")
    assert (spec.plan.pipeline.target_kind, spec.plan.training.loss) == ("binary", "binary_cross_entropy")


async def test_owners_learn_which_model_it_is_only_where_a_licence_asks(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, w: World
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of())
        untold, spec, _ = opened_job(gateway, w)
        permissions = [cm.Permission(action="train", rule=cm.rules.with_model(digest_of(spec.model).hex()))]
        asking = licence_of("north", permissions=tuple(permissions))
        brokers.offers["north"] = brokers.offer(card_of("north"), asking)
        await consortium.train(**request_of())
    told, spec, _ = opened_job(gateway, w)
    assert (untold.plan.model, told.plan.model) == (None, digest_of(spec.model))


async def test_priority_and_the_earliest_start_are_in_the_routing_and_part_of_the_job(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    begins = datetime.now(timezone(timedelta(hours=1))) + timedelta(hours=2)
    request = request_of(job_id="ab" * 16, priority="high", not_before=begins)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request)
        await consortium.train(**request)
        for change in ({"priority": "low"}, {"not_before": None}, {"not_before": begins + timedelta(seconds=1)}):
            with pytest.raises(ConflictError):
                await consortium.train(**{**request, **change})
    routings = [submission.routing.peek(Routing) for submission in gateway.submissions]
    assert len(routings) == 2 and routings[0] == routings[1]
    assert (routings[0].priority, routings[0].not_before) == ("high", math.ceil(begins.timestamp() * 1000))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"not_before": datetime(2100, 1, 1)}, "time zone"),
        ({"not_before": 4_102_444_800_000}, "time zone"),
        ({"not_before": datetime.now(UTC) + timedelta(hours=25)}, "give a longer deadline_s"),
        ({"not_before": datetime(1960, 1, 1, tzinfo=UTC)}, "since 1970"),
        ({"priority": "urgent"}, "low, normal, high"),
    ],
)
async def test_a_start_or_priority_that_cannot_be_is_refused_here(
    gateway: FakeGateway, options: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(ParameterError, match=told):
            await consortium.train(**request_of(**change))
    assert gateway.submissions == []


async def test_planned_rates_and_noise_give_an_epsilon_just_within_the_target(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of())
    plan = opened_job(gateway, w)[0].plan
    for use in plan.datasets:
        assert 2.99 < epsilon(job_event(plan, use), 1e-3) <= 3.0
    assert float(plan.expected_batch) == pytest.approx(100, rel=0.01)


async def test_an_owner_with_a_stricter_cap_is_sampled_less_and_the_others_keep_their_target(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, w: World
) -> None:
    strict = licence_of("north", epsilon_per_job=1.0, delta=1e-4)
    brokers.offers["north"] = brokers.offer(card_of("north"), strict)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of())
    plan = opened_job(gateway, w)[0].plan
    north, south = plan.datasets
    assert north.sample_rate.fraction < south.sample_rate.fraction
    assert 0.99 < epsilon(job_event(plan, north), 1e-4) <= 1.0
    assert 2.99 < epsilon(job_event(plan, south), 1e-3) <= 3.0


async def test_exact_noise_is_in_the_terms_and_costs_the_same(
    gateway: FakeGateway, options: dict[str, Any], w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of())
        hardened = opened_job(gateway, w)[0].plan
        await consortium.train(**request_of(mechanism="exact"))
        exact = opened_job(gateway, w)[0].plan
        assert (hardened.training.mechanism, exact.training.mechanism) == ("hardened", "exact")
        assert exact == hardened.model_copy(update={"training": exact.training})
        first, second = privacy_statement(hardened), privacy_statement(exact)
        assert second == first.model_copy(update={"mechanism": "exact"}) != first
        monkeypatch.setattr(rounding, "MAX_RESERVE", 1e-9)
        with pytest.raises(ParameterError, match="use hardened noise"):
            await consortium.train(**request_of(mechanism="exact"))


async def test_hardened_noise_that_would_add_to_epsilon_is_refused_before_anything_is_sent(
    gateway: FakeGateway, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardened, "MAX_SHARE", 1e-9)
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(ParameterError, match="use mechanism='exact'"):
            await consortium.train(**request_of())
        await consortium.train(**request_of(mechanism="exact"))


async def test_epochs_are_expected_passes_over_the_declared_rows(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of(steps=None, epochs=2.5))
    assert opened_job(gateway, w)[0].plan.training.steps == 10


async def test_a_spent_budget_is_said_before_anything_is_sent(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    brokers.offers["north"] = brokers.offer(card_of("north"), licence_of("north"), epsilon_remaining=0.5)
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(BudgetError, match=r"cardio@north: .* 0\.5 is left"):
            await consortium.train(**request_of())
    assert not gateway.envelopes and not gateway.submissions


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": NAN},
        {"batch_size": 401},
        {"steps": None},
        {"epochs": 1.0},
        {"steps": 0},
        {"steps": 10**9},
        {"steps": None, "epochs": NAN},
        {"steps": None, "epochs": INF},
        {"steps": None, "epochs": -1},
        {"deadline_s": NAN},
        {"deadline_s": 0},
        {"deadline_s": 1e12},
        {"datasets": []},
        {"datasets": ["cardio@north", "cardio@north"]},
        {"loss": "hinge"},
        {"scaling": "zscore"},
        {"purpose": "Any Purpose"},
        {"job_id": "short"},
        {"optimizer": "sgd"},
        {"mechanism": "float32"},
        {"privacy": 3.0},
        {"max_physical_batch": 0},
    ],
    ids=str,
)
async def test_absurd_parameters_are_refused_and_nothing_is_sent(
    gateway: FakeGateway, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(ParameterError):
            await consortium.train(**request_of(**changes))
    assert not gateway.envelopes and not gateway.submissions


@pytest.mark.parametrize(
    "make",
    [
        lambda: cm.Privacy(NAN, 1e-5),
        lambda: cm.Privacy(-1.0, 1e-5),
        lambda: cm.Privacy(0.0, 1e-5),
        lambda: cm.Privacy(INF, 1e-5),
        lambda: cm.Privacy(1.0, 0.0),
        lambda: cm.Privacy(1.0, 1.0),
        lambda: cm.Privacy(1.0, NAN),
        lambda: cm.Privacy(1.0, 1e-5, clipping_norm=NAN),
        lambda: cm.Privacy(1.0, 1e-5, clipping_norm=0.0),
        lambda: cm.SGD(lr=NAN),
        lambda: cm.SGD(lr=-0.1),
        lambda: cm.SGD(lr=0.1, momentum=1.0),
        lambda: cm.Adam(lr=INF),
        lambda: cm.Column(name="a", dtype="float32", lower=1.0, upper=NAN),
        lambda: licence_of("north") and cm.Licence(**(dict(licence_of("north")) | {"epsilon": -1.0})),
    ],
)
def test_absurd_values_are_refused_where_they_are_typed(make: Any) -> None:
    with pytest.raises(ParameterError):
        make()


def test_lists_are_taken_where_the_wire_has_tuples() -> None:
    column = cm.Column(name="scan", dtype="uint8", shape=[8, 8], lower=0, upper=255)
    card = cm.DatasetCard(name="scans", owner="north", columns=[column], row_bound=10)
    assert card.columns == (column,) and column.shape == (8, 8)


class MixesExamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) - self.layer(x).mean(0)


async def test_a_model_is_refused_with_the_users_own_line(gateway: FakeGateway, options: dict[str, Any]) -> None:
    line = inspect.getsourcelines(MixesExamples.forward)[1] + 1
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(ModelError, match=rf"test_jobs\.py:{line}"):
            await consortium.train(**request_of(model=MixesExamples()))
        with pytest.raises(BatchDependenceError):
            await consortium.train(
                **request_of(model=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))
            )
        with pytest.raises(ModelError, match="no loss fits"):
            await consortium.train(**request_of(model=nn.Sequential(nn.Linear(2, 7))))
    assert not gateway.envelopes


async def test_datasets_must_be_there_and_declared_alike(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(DatasetError, match=r"no dataset 'lungs@north'.*cardio@north"):
            await consortium.train(**request_of(datasets=["lungs@north"]))
        with pytest.raises(DatasetError, match="no column 'weight'"):
            await consortium.train(**request_of(features=["age", "weight"]))
        columns = card_of("north").columns
        other = columns[0].model_copy(update={"upper": 100.0})
        brokers.offers["north"] = brokers.offer(card_of("north", columns=(other, *columns[1:])), licence_of("north"))
        with pytest.raises(DatasetError, match=r"column 'age' is declared .* \[0, 100\] .* \[0, 120\]"):
            await consortium.train(**request_of())


async def test_the_same_submit_again_is_the_same_job_and_another_is_a_conflict(
    gateway: FakeGateway, options: dict[str, Any]
) -> None:
    request = request_of(job_id="ab" * 16)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request)
        first, second = gateway.submissions
        assert encode(first) == encode(second) and len(gateway.envelopes) == 1
        with pytest.raises(ConflictError, match="another job"):
            await consortium.train(**(request | {"steps": 101}))
        other = nn.Sequential(nn.Linear(2, 1))
        nn.init.zeros_(other.get_parameter("0.weight"))
        with pytest.raises(ConflictError):
            await consortium.train(**(request | {"model": other}))


async def test_two_submits_at_once_under_one_id_are_one_job(
    gateway: FakeGateway, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither finds what the other one is about to remember."""
    request = request_of(job_id="cd" * 16)
    monkeypatch.setattr("casemate.state.State.job", lambda *_: None)
    async with cm.connect(gateway.url, **options) as consortium:
        await asyncio.gather(consortium.train(**request), consortium.train(**request))
        first, second = gateway.submissions
        assert encode(first) == encode(second)
        with pytest.raises(ConflictError, match="another job"):
            await consortium.train(**(request | {"steps": 101}))
        assert len(gateway.submissions) == 2


def events_of(job_id: str, *states: JobState) -> list[JobEvent]:
    return [
        JobEvent(job_id=job_id, state=state, step=step, steps=9, epsilon=0.5, reason=None, at=step)
        for step, state in enumerate(states)
    ]


async def test_events_resume_after_a_lost_connection_and_none_comes_twice(
    gateway: FakeGateway, options: dict[str, Any]
) -> None:
    gateway.status = job_status(JOB_ID, "sealed")
    gateway.events = events_of(JOB_ID, "queued", "claimed", "running", "committing", "sealed")
    gateway.drop_after = 2
    async with cm.connect(gateway.url, **options) as consortium:
        job = await consortium.job(JOB_ID)
        assert [event.state async for event in job.events()] == [e.state for e in gateway.events]
    assert gateway.event_starts == ["0", "2"]


async def test_without_a_stream_events_are_polled(gateway: FakeGateway, options: dict[str, Any]) -> None:
    gateway.status = job_status(JOB_ID, "running", step=3, steps=9, epsilon=0.5)
    async with cm.connect(gateway.url, **options) as consortium:
        job = await consortium.job(JOB_ID)
        seen = []
        async for event in job.events():
            seen.append((event.state, event.step))
            gateway.status = job_status(JOB_ID, "failed", reason="training_failed")
        assert seen == [("running", 3), ("failed", None)]


async def test_watch_shows_step_epsilon_and_that_it_is_simulated(gateway: FakeGateway, options: dict[str, Any]) -> None:
    gateway.status = job_status(JOB_ID, "sealed")
    gateway.events = events_of(JOB_ID, "queued", "running", "sealed")
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    async with cm.connect(gateway.url, **options) as consortium:
        status = await (await consortium.job(JOB_ID)).watch(console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert status.state == "sealed"
    assert "SIMULATED" in text and "step 2/9" in text and "ε 0.5" in text


async def test_a_refusal_is_told_in_the_key_brokers_words(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    def answer(job_id: str, signer: str) -> str:
        detail = seal_envelope(
            "response",
            encode(Refusal(reason="licence_forbids", message="only for research on the heart")),
            [w.clara.keys.sealing.public],
            consortium=w.consortium.id,
            key=w.brokers[signer].signing,
            created=w.now,
        )
        refused = PrecheckAnswer(
            consortium=w.consortium.id,
            key_broker="north",
            job_id=job_id,
            terms=bytes(32),
            decision="refused",
            reason="licence_forbids",
            detail=detail,
            at=w.now,
        )
        return base64.b64encode(encode(sign(refused, w.brokers[signer].signing))).decode()

    def refused_by(signed: str) -> dict[str, Any]:
        approval = {"key_broker": "north", "verdict": "refused", "answer": signed}
        return job_status(JOB_ID, "refused", reason="licence_forbids", approvals=[approval])

    async with cm.connect(gateway.url, **options) as consortium:
        gateway.status = refused_by(answer(JOB_ID, "north"))
        job = await consortium.job(JOB_ID)
        with pytest.raises(LicenceError, match="north: only for research on the heart"):
            await job.result()
        for forged in (answer(JOB_ID, "south"), answer("f" * 32, "north"), "!"):
            gateway.status = refused_by(forged)
            assert "cannot be read" in job.refusals(await job.status())["north"]


async def test_a_result_is_verified_opened_and_held_against_what_was_submitted(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    bundle = w.result()
    gateway.release, gateway.result = encode(bundle.release), bundle.envelope
    gateway.status = job_status(JOB_ID, "sealed")
    async with cm.connect(gateway.url, **options) as consortium:
        result = await (await consortium.job(JOB_ID)).result()
        net = nn.Sequential(nn.Linear(2, 1))
        net.load_state_dict(result.weights)
        await consortium.train(**request_of(job_id=JOB_ID))
        gateway.status = job_status(JOB_ID, "sealed")
        with pytest.raises(ReleaseError, match=r"step 9 \(terms\): the digest of those submitted from here"):
            await (await consortium.job(JOB_ID)).result()


async def test_a_result_that_is_not_there_says_why(gateway: FakeGateway, options: dict[str, Any]) -> None:
    gateway.status = job_status(JOB_ID, "running")
    async with cm.connect(gateway.url, **options) as consortium:
        job = await consortium.job(JOB_ID)
        with pytest.raises(StateError, match="is running"):
            await job.result()
        gateway.status = job_status(JOB_ID, "cancelled")
        with pytest.raises(StateError, match="ended as cancelled"):
            await job.result()
        gateway.status = job_status("f" * 32, "sealed")
        with pytest.raises(MalformedError, match="another job"):
            await job.result()
        with pytest.raises(ParameterError):
            await consortium.job("../jobs")


async def test_a_lost_submit_is_tried_again(gateway: FakeGateway, options: dict[str, Any]) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        real = consortium._session.gateway.post

        async def post(path: str, *args: Any, **kwargs: Any) -> Any:
            if path == "/v1/jobs":
                gateway.fail = [UnavailableError("busy")]
            return await real(path, *args, **kwargs)

        consortium._session.gateway.post = post  # type: ignore[method-assign]
        await consortium.train(**request_of())
    assert len(gateway.submissions) == 1 and gateway.requests.count("POST /v1/jobs") == 2


def test_every_call_has_a_blocking_form_with_the_same_parameters() -> None:
    for blocking, original in ((cm.sync.Consortium, cm.Consortium), (cm.sync.Job, cm.Job)):
        for name, method in vars(original).items():
            if not name.startswith("_") and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)):
                ours = list(inspect.signature(getattr(blocking, name)).parameters)[1:]
                assert ours == list(inspect.signature(method).parameters)[1:], name


async def test_the_blocking_form_works_where_a_loop_is_running(gateway: FakeGateway, options: dict[str, Any]) -> None:
    gateway.status = job_status(JOB_ID, "sealed")
    gateway.events = events_of(JOB_ID, "queued", "sealed")

    def script() -> list[str]:
        with cm.sync.connect(gateway.url, **options) as consortium:
            job = consortium.job(JOB_ID)
            return [item.id for item in consortium.datasets()] + [event.state for event in job.events()]

    assert await asyncio.to_thread(script) == ["cardio@north", "cardio@south", "queued", "sealed"]


def test_an_error_of_the_tree_is_what_users_catch() -> None:
    assert cm.errors.CasemateError is CasemateError
