"""What an approver is shown and signs: the submitter's own terms, whatever a key broker says."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from casemate import sync
from casemate.cli.approvals import _facts
from casemate.client import connect
from casemate.identity import Identity, new_person
from casemate.progress import Progress
from casemate_schemas import api
from casemate_schemas.approval import Approval
from casemate_schemas.codec import digest_of
from casemate_schemas.errors import AuthorisationError, CasemateError, NotFoundError, ParameterError, UnavailableError
from casemate_schemas.identity import Role
from casemate_schemas.job import (
    Audit,
    Averaging,
    Metrics,
    NoisePhase,
    Plan,
    Privacy,
    SubjectUse,
    Training,
)
from casemate_schemas.licence import Approvals, Licence, MemberIs, Permission, RoleIs
from casemate_schemas.requests import (
    ApprovalGiven,
    ApprovalListing,
    ApprovalShown,
    ApprovalUse,
    AwaitedApprovals,
    GiveApproval,
    ListApprovals,
    PendingApproval,
    PersonRequest,
    Refusal,
)
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms
from rich.console import Console
from support.command_line import casemate, signed_in
from support.fake_gateway import FakeGateway, serving
from support.results import JOB_ID, World

from .conftest import licence_of

HOUR_MS = 3_600_000
ALONE = "ε 0.05 if they were all"
"""A Gaussian release of noise 30 at δ 1e-3: the root of Balle and Wang's (2018) equation 6 is 0.05002."""


def asking(owner: str, by: str = "north", valid_s: int = 3600) -> Licence:
    usual = licence_of(owner)
    asked = Approvals(count=2, by=MemberIs(principal="approver", member=by), valid_s=valid_s)
    rule = RoleIs(principal="submitter", role="scientist")
    train = Permission(action="train", rule=rule, approvals=asked)
    kept = tuple(item for item in usual.permissions if item.action != "train")
    return licence_of(owner, permissions=(*kept, train))


@dataclass
class Waiting:
    """North's key broker and a job that waits there; tests change what it shows."""

    w: World
    licence: Licence = field(default_factory=lambda: asking("north"))
    change: Callable[[ApprovalShown], ApprovalShown] = lambda shown: shown
    more: tuple[PendingApproval, ...] = ()
    given: list[Approval] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    subjects: SubjectUse | None = None

    @property
    def terms(self) -> Signed:
        def edit(terms: Terms) -> Terms:
            uses = tuple(
                use.model_copy(
                    update={"subjects": self.subjects}
                    | ({"licence": digest_of(self.licence)} if use.owner == "north" else {})
                )
                for use in terms.plan.datasets
            )
            fields = {**dict(terms.plan), "datasets": uses} | self.plan
            return terms.model_copy(update={"plan": Plan.model_validate(fields)})

        return self.w.terms(edit)

    def pending(self, **changed: Any) -> PendingApproval:
        fields: dict[str, Any] = {
            "job_id": JOB_ID,
            "terms": self.terms.digest,
            "submitter": "clara@lab",
            "purpose": "research",
            "datasets": ("cardio@north",),
            "created": self.w.now,
            "deadline": self.w.now + HOUR_MS,
        }
        return PendingApproval(**(fields | changed))

    def shown(self) -> ApprovalShown:
        use = ApprovalUse(
            dataset="cardio@north",
            licence=sign(self.licence, self.w.members["north"].signing),
            epsilon=0.75,
            epsilon_spent=1.25,
            awaited=(AwaitedApprovals(action="train", count=2, missing=1),),
        )
        nils = ApprovalGiven(
            dataset="cardio@north",
            person="nils@north\x1b[2J",
            decision="approve",
            at=self.w.now,
            expires=self.w.now + HOUR_MS,
            counts=True,
        )
        return self.change(ApprovalShown(terms=self.terms, uses=(use,), given=(nils,), state="awaiting"))

    def answer(self, name: str, request: PersonRequest) -> Any:
        if name == "lab":
            raise UnavailableError("away")
        if isinstance(request.body, ListApprovals):
            mine = (self.pending(), *self.more) if name == "north" else ()
            return ApprovalListing(pending=mine, n_pending=len(mine))
        if name != "north":
            return Refusal(reason=NotFoundError.reason, message="none")
        if isinstance(request.body, GiveApproval):
            signer = request.delegation.peek(type(self.w.clara.delegation)).signing_key
            self.given += (item.verify(Approval, signer) for item in request.body.approvals)
        return self.shown()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_pause(self: object, _: float) -> None:
        return None

    monkeypatch.setattr("casemate._http.Gateway.wait", no_pause)


@pytest.fixture
def waiting(w: World) -> Waiting:
    return Waiting(w)


@pytest.fixture
def person(w: World, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """How a new person of a member connects."""

    def options(member: str, *roles: Role, lasts_ms: int = 24 * HOUR_MS) -> dict[str, Any]:
        keys = new_person(
            w.members[member],
            consortium=w.consortium.id,
            member=member,
            person="nora",
            roles=roles or ("steward",),
            not_before=w.now - 1000,
            lasts_ms=lasts_ms,
        )
        return {"identity": Identity.of(keys), "state_dir": tmp_path / member, "consortium": w.consortium.id.hex()}

    return options


async def test_who_approves_reads_all_and_signs_the_very_terms(
    waiting: Waiting, person: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hints: list[str | None] = []
    message = FakeGateway._message

    async def noting(self: FakeGateway, request: Any) -> Any:
        hints.append(request.headers.get(api.JOB_HEADER))
        return await message(self, request)

    monkeypatch.setattr(FakeGateway, "_message", noting)
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("north")) as consortium,
    ):
        listed = await consortium.approvals()
        assert [(name, item.job_id) for name, item in listed] == [("north", JOB_ID)]
        assert list(listed.unavailable) == ["lab"]
        (request,) = await consortium.approval(JOB_ID)
        text = str(request)
        for words in (
            f"north: job {JOB_ID} is awaiting",
            "clara@lab asks to train, for research",
            "on cardio@north, cardio@south",
            "released: weights, to clara@lab",
            "cardio@north: ε 0.75 for this job alone, at δ 0.001",
            "ε 1.25 of 10 were spent before it",
            "lets scientists list cardio@north",
            "any two of the people of north",
            "to train: 1 of 2 approvals",
            "nils@north [2J approved it at",
        ):
            assert words in text, words
        assert "\x1b" not in text and set(hints) == {None}
        await consortium.approve(request)
        assert hints[-1] == JOB_ID
        (given,) = waiting.given
        assert (given.decision, given.job_id, given.terms) == ("approve", JOB_ID, waiting.terms.digest)
        assert (given.licence, given.key_broker) == (digest_of(waiting.licence), "north")
        assert given.expires - given.at == HOUR_MS
        (again,) = await consortium.approval(waiting.terms.digest.hex())
        assert again == request
        await consortium.deny(again)
        assert waiting.given[-1].decision == "deny"


async def test_who_approves_an_audit_is_told_that_it_is_one(
    waiting: Waiting, person: Callable[..., dict[str, Any]]
) -> None:
    waiting.plan = {"kind": "privacy_audit", "release": ("audit",), "audit": Audit(canaries=300)}
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("north")) as consortium,
    ):
        (request,) = await consortium.approval(JOB_ID)
    assert "clara@lab asks to audit training, with 300 canaries, for research" in str(request)
    assert "released: audit, to clara@lab" in str(request)


PLANS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two phases, metrics, padding, an average": (
        {
            "release": ("weights", "metrics"),
            "metrics": Metrics(noise_multiplier=30.0, loss_bound=4.0),
            "training": {
                "noise_multiplier": 4.0,
                "steps": 40,
                "noise_schedule": (NoisePhase(first_step=30, factor=0.5),),
                "mechanism": "exact",
                "padded_batch": 64,
                "averaging": Averaging(decay=0.95),
                "clipping_norm": 0.5,
            },
        },
        [
            "protects one record, whether it is there or not; who asks claims ε 3 at δ 0.001 or less",
            "40 steps, each clipped to norm 0.5; "
            "exact noise of 4 in steps 1 to 30, then 2 in steps 31 to 40 times that norm",
            "every step is padded to 64 records: how long it takes does not tell how many were drawn",
            "the weights released are an average over the steps (decay 0.95), noised as each step is",
            "the metrics released are accuracy and mean loss on all training records, losses counted up to 4; "
            "noise of 30 times what one record can change",
            "the model itself stays sealed",
            "released: weights, metrics, to clara@lab",
        ],
    ),
    "subjects": (
        {
            "privacy": Privacy(epsilon=1.5, delta=1e-4, unit="subject"),
            "training": {"noise_multiplier": 4.0, "steps": 7},
        },
        [
            "protects all records of one subject, whether it is there or not; who asks claims ε 1.5 at δ 0.0001 or less",
            "7 steps, each clipped to norm 1; hardened noise of 4 times that norm",
            "the model itself stays sealed",
            "released: weights, to clara@lab",
        ],
    ),
    "an audit": (
        {
            "kind": "privacy_audit",
            "release": ("audit",),
            "audit": Audit(canaries=300, confidence=0.995),
            "training": {"noise_multiplier": 4.0, "steps": 7},
        },
        [
            "protects one record, whether it is there or not; who asks claims ε 3 at δ 0.001 or less",
            "7 steps, each clipped to norm 1; hardened noise of 4 times that norm",
            "released is what 300 canaries prove about ε, with 99.50% confidence, and no weights",
            "the model itself stays sealed",
            "released: audit, to clara@lab",
        ],
    ),
}


@pytest.mark.parametrize("name", PLANS)
async def test_who_approves_reads_all_that_changes_the_cost_or_what_leaves(
    waiting: Waiting, person: Callable[..., dict[str, Any]], name: str
) -> None:
    changes, told = PLANS[name]
    plan = waiting.terms.peek(Terms).plan
    training = Training.model_validate({**dict(plan.training), "clipping_norm": 1.0} | changes["training"])
    waiting.plan = {"privacy": Privacy(epsilon=3.0, delta=1e-3), **changes, "training": training}
    if name == "subjects":
        waiting.subjects = SubjectUse(max_records=3, bound=80)
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("north")) as consortium,
    ):
        (request,) = await consortium.approval(JOB_ID)
    lines = [line.strip() for line in str(request).splitlines()]
    assert lines[3 : 3 + len(told)] == told
    drawn = {
        "subjects": ["every step draws each subject with probability 0.25, with at most 3 records each"],
        "an audit": ["every step draws each record with probability 0.25"],
    }.get(name, ["every step draws each record with probability 0.25", f"metrics look at all records once: {ALONE}"])
    spent = lines.index("ε 1.25 of 10 were spent before it")
    assert lines[spent + 1 : spent + 1 + len(drawn)] == drawn
    facts = _facts(request)["plan"]
    assert facts["noise"] == [{"steps": steps, "noise_multiplier": sigma} for steps, sigma in training.noise_phases]
    assert (facts["padded_batch"], facts["privacy"]["unit"]) == (
        training.padded_batch,
        "subject" if name == "subjects" else "record",
    )


async def test_an_approval_ends_with_the_delegation(waiting: Waiting, person: Callable[..., dict[str, Any]]) -> None:
    options = person("north", lasts_ms=HOUR_MS // 2)
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **options) as consortium,
    ):
        await consortium.approve((await consortium.approval(JOB_ID))[0])
    assert waiting.given[0].expires == options["identity"].delegation.expires


LIES: dict[str, Callable[[Waiting], Any]] = {
    "other terms": lambda it: (
        lambda shown: shown.model_copy(
            update={
                "terms": sign(
                    shown.terms.peek(Terms).model_copy(update={"job_spec_commitment": b"\x6a" * 32}),
                    it.w.clara.keys.signing,
                )
            }
        )
    ),
    "terms changed on the way": lambda it: (
        lambda shown: shown.model_copy(update={"terms": sign(shown.terms.peek(Terms), it.w.members["north"].signing)})
    ),
    "another licence": lambda it: (
        lambda shown: shown.model_copy(
            update={
                "uses": (
                    shown.uses[0].model_copy(
                        update={"licence": sign(licence_of("north"), it.w.members["north"].signing)}
                    ),
                )
            }
        )
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_key_broker_cannot_have_something_else_approved(
    waiting: Waiting, person: Callable[..., dict[str, Any]], lie: str
) -> None:
    waiting.change = LIES[lie](waiting)
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("north")) as consortium,
    ):
        with pytest.raises(CasemateError) as refused:
            await consortium.approval(JOB_ID)
        assert refused.value.reason in ("seal_does_not_open", "bad_signature")


async def test_whom_no_licence_counts_signs_nothing(waiting: Waiting, person: Callable[..., dict[str, Any]]) -> None:
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("south")) as consortium,
    ):
        (request,) = await consortium.approval(JOB_ID)
        with pytest.raises(AuthorisationError, match="no licence counts your word"):
            await consortium.approve(request)
    assert waiting.given == []


async def test_two_jobs_of_one_id_are_told_apart(waiting: Waiting, person: Callable[..., dict[str, Any]]) -> None:
    waiting.more = (waiting.pending(terms=bytes(32)),)
    async with (
        serving(FakeGateway(waiting.w, waiting.answer)) as gateway,
        connect(gateway.url, **person("north")) as consortium,
    ):
        with pytest.raises(ParameterError, match="several jobs"):
            await consortium.approval(JOB_ID)
        with pytest.raises(UnavailableError, match="lab"):
            await consortium.approval("0" * 32)
        with pytest.raises(ParameterError):
            await consortium.approval("x" * 64)


async def test_the_command_signs_nothing_unless_told_to(
    waiting: Waiting,
    person: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = person("north")
    async with serving(FakeGateway(waiting.w, waiting.answer)) as gateway:
        signed_in(monkeypatch, gateway.url, options["identity"].keys, tmp_path)
        monkeypatch.setattr("click.confirm", lambda *_, **__: False)
        assert await asyncio.to_thread(casemate, "approvals", "approve", JOB_ID) == 1
        assert waiting.given == [] and "clara@lab asks" in capsys.readouterr().out
        assert await asyncio.to_thread(casemate, "approvals", "deny", JOB_ID, "--yes") == 0
        assert [item.decision for item in waiting.given] == ["deny"]
        assert await asyncio.to_thread(casemate, "approvals", "list") == 0
        shown = capsys.readouterr().out
        assert "no answer from key broker lab" in shown and "SIMULATED" in shown


async def test_it_blocks_too(waiting: Waiting, person: Callable[..., dict[str, Any]]) -> None:
    options = person("north")

    def blocking(url: str) -> str:
        with sync.connect(url, **options) as consortium:
            (request,) = consortium.approval(JOB_ID)
            assert len(consortium.approvals()) == 1
            return consortium.approve(consortium.deny(request)).state

    async with serving(FakeGateway(waiting.w, waiting.answer)) as gateway:
        assert await asyncio.to_thread(blocking, gateway.url) == "awaiting"
    assert [item.decision for item in waiting.given] == ["deny", "approve"]


def test_what_is_awaited_is_said_once() -> None:
    console = Console(file=io.StringIO(), width=100)
    progress = Progress(JOB_ID, simulation=False, console=console)
    for words in ("0 of 2", "0 of 2", "1 of 2", "1 of 2"):
        progress.wait({"north": f"[bold]{words}"})
    assert console.file.getvalue().splitlines() == ["north: [bold]0 of 2", "north: [bold]1 of 2"]  # type: ignore[attr-defined]
