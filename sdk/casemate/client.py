"""A connection to one consortium: what a scientist or a steward starts from."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import aiohttp
from casemate_privacy.owners import Choice
from casemate_schemas import api
from casemate_schemas import consortium as _consortium
from casemate_schemas.admission import Priority
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.codec import Name, encode
from casemate_schemas.consortium import ConsortiumManifest, verify_delegation
from casemate_schemas.custody import (
    BackUpState,
    DatasetShown,
    LicenceAmended,
    RotateSeeds,
    SeedsRotated,
    StateBackedUp,
)
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import ManifestError, ParameterError
from casemate_schemas.identity import Revocation
from casemate_schemas.job import Mechanism
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import Licence
from casemate_schemas.pipeline import Loss, Scaling
from casemate_schemas.requests import (
    Budget,
    BudgetRenewed,
    DatasetRegistered,
    EndorseState,
    ShowState,
    ShowWorkers,
    StateShown,
    TellTime,
    TimeTold,
    WorkerList,
)
from casemate_schemas.signatures import Signed, sign
from pydantic import TypeAdapter

from . import approvals as _approvals
from . import custody as _custody
from . import datasets as _datasets
from . import hosting as _hosting
from . import jobs as _jobs
from . import planning as _planning
from ._http import MAX_LIST_BYTES, MAX_WAIT_S, BytesBody, Gateway, read_json
from ._session import Session, fetch_chain
from .identity import Identity, now_ms
from .parameters import (
    SGD,
    Adam,
    Audit,
    Augmentation,
    Averaging,
    LrSchedule,
    Metrics,
    NoisePhase,
    Privacy,
    parameter_errors,
)
from .state import State, default_state_dir
from .training_request import TrainingRequest


class FirstContactWarning(UserWarning):
    """A consortium is met for the first time: its newest manifest is taken on trust, and pinned from now on."""


@asynccontextmanager
async def connect(
    url: str,
    *,
    identity: Identity | KeyRing | str | os.PathLike[str],
    consortium: str | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    clock: Callable[[], int] = now_ms,
    max_wait_s: float = MAX_WAIT_S,
) -> AsyncIterator[Consortium]:
    """A connection to a consortium through its gateway, for as long as the ``async with`` block lasts.

    The manifest is verified from its first version on and must be the consortium that the identity's delegation names.
    The newest version seen is pinned in ``state_dir``; an older one or a fork is refused ever after. Meeting a
    consortium for the first time is said with a :class:`FirstContactWarning`, unless its id was given.

    Args:
        url: the gateway's, ``https://consortium.example``.
        identity: a private key file with a delegation, or the keys themselves.
        consortium: the consortium's id, 64 hexadecimal digits, got from someone trusted.
        state_dir: where to remember; ``~/.local/state/casemate`` if not given.
        max_wait_s: how long one call waits, in all, for a gateway that is busy, full or away, before it raises
            :class:`~casemate_schemas.errors.UnavailableError` or what it is of it; 90 s if not given.

    Raises :class:`~casemate_schemas.errors.SetupError`, :class:`~casemate_schemas.errors.AuthenticationError`,
    :class:`ManifestError` or :class:`~casemate_schemas.errors.UnavailableError`.
    """
    me = Identity.of(identity)
    expected = me.delegation.consortium
    if consortium is not None and _consortium_id(consortium) != expected:
        raise ManifestError("the identity's delegation is for another consortium than the id given")
    state = State(default_state_dir() if state_dir is None else Path(state_dir), expected)
    async with aiohttp.ClientSession(
        trust_env=True, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as http:
        gateway = Gateway(url, me, http, max_wait_s=max_wait_s)
        chain = await fetch_chain(gateway)
        verified, first_contact = state.accept_chain(chain, expected)
        verify_delegation(me.signed_delegation, verified, at=clock())
        if first_contact and consortium is None:
            warnings.warn(_first_contact(verified.manifest, expected), FirstContactWarning, stacklevel=3)
        yield Consortium(Session(gateway, me, verified, state, clock))


class Consortium:
    """What one person can do in one consortium. Made by :func:`connect`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def id(self) -> str:
        """The consortium's id, 64 hexadecimal digits."""
        return self._session.consortium.id.hex()

    @property
    def verified(self) -> _consortium.Consortium:
        """The consortium as it was verified and pinned when this connection was made: its id, newest digest and manifest."""
        return self._session.consortium

    @property
    def manifest(self) -> ConsortiumManifest:
        """The newest manifest, verified."""
        return self._session.consortium.manifest

    @property
    def simulation(self) -> bool:
        """Whether its chips are simulated, by its own manifest."""
        return self._session.simulation

    @property
    def person(self) -> str:
        """``person@member`` who is connected."""
        return self._session.identity.name

    async def datasets(self) -> _datasets.Datasets:
        """The datasets that this person may list, with what is left of their budgets. All key brokers are asked at once;
        those that do not answer are named in ``.unavailable``."""
        return await _datasets.list_datasets(self._session)

    async def push(
        self, columns: Mapping[str, _datasets.Array], card: DatasetCard, *, licence: Licence
    ) -> DatasetRegistered:
        """Seal a dataset to its owner's key broker, upload and register it. For stewards of the owner.

        Args:
            columns: by name, ``[rows, *shape]`` each, with the dtypes, shapes and at most the rows of the card.
            card: the public declaration.
            licence: what is allowed; signed here with the steward's key.

        Raises :class:`~casemate_schemas.errors.DatasetError`, :class:`~casemate_schemas.errors.LicenceError`, or what
        the key broker refuses with.
        """
        return await _datasets.push(self._session, columns, card, licence)

    async def dataset_history(self, dataset: str) -> DatasetShown:
        """Which version and licence of a dataset were in force when, and what was erased. For stewards of the owner."""
        return await _custody.show_dataset(self._session, dataset)

    async def compare_licence(self, licence: Licence) -> _custody.Amendment:
        """A licence beside the one in force: whether it allows less, or more. Nothing is changed."""
        return await _custody.compare_licence(self._session, licence)

    async def revocation_of(self, dataset: str) -> _custody.Amendment:
        """The licence under which nobody may do anything with a dataset, to be put in force with :meth:`amend`."""
        return await _custody.revocation_of(self._session, dataset)

    async def amend(self, licence: Licence) -> LicenceAmended:
        """Put another licence in force, signed with this steward's key; its number is above that of the one before.

        It acts at the next request for keys, also for jobs that were accepted before. Workers that hold their keys may
        commit, and what is committed stays committed.
        """
        return await _custody.amend(self._session, licence)

    async def erase(self, dataset: str, *, envelope: bytes, keep_current: bool = False) -> _custody.Erased:
        """Destroy the keys of a dataset for good, or of the versions before the one in force. For stewards of the owner.

        Args:
            dataset: ``name@owner``.
            envelope: the version in force, as :meth:`dataset_history` shows it.
            keep_current: whether to keep that one, and erase those that it superseded.

        Licences, ledger and audit log stay, and so does the budget that was spent. Workers that hold a key have it until
        their attempt ends. Raises :class:`~casemate_schemas.errors.ConflictError` if there is a newer version by now.
        """
        return await _custody.erase(self._session, dataset, envelope=envelope, keep_current=keep_current)

    async def rotate_seeds(self) -> int:
        """Have this person's own key broker use a new seed secret from now on; its epoch. For stewards and admins."""
        broker = self.manifest.key_broker_of(self._session.identity.delegation.member)
        return (await self._session.ask(broker, RotateSeeds(), SeedsRotated)).epoch

    async def back_up_key_broker(self) -> StateBackedUp:
        """Have this person's own key broker copy its state into its backup folder. For stewards and admins."""
        broker = self.manifest.key_broker_of(self._session.identity.delegation.member)
        return await self._session.ask(broker, BackUpState(), StateBackedUp)

    async def budget(self, dataset: str) -> Budget:
        """The ledger of a dataset (``name@owner``), every charge in it. For stewards of the owner."""
        return await _datasets.show_budget(self._session, dataset)

    async def weigh_budgets(
        self,
        datasets: Sequence[str],
        *,
        privacy: Privacy,
        batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> tuple[Choice, ...]:
        """What each owner's own budget is worth to a job: expected samples a step by owner, and the noise left over.

        Nothing is submitted or spent. Arguments and errors as for :meth:`train`.
        """
        if (epochs is None) == (steps is None):
            raise ParameterError("expected either epochs or steps")
        found = await _datasets.find_datasets(self._session, datasets)
        return await asyncio.to_thread(_planning.weigh_budgets, privacy, found, batch_size, epochs, steps)

    async def renew_budget(self, dataset: str, *, lineage: bytes) -> BudgetRenewed:
        """Give a dataset a fresh budget. For stewards and admins of the owner; ledger and audit log say who did it.

        Args:
            dataset: ``name@owner``.
            lineage: the one whose budget ends, as :meth:`budget` shows it.

        What was promised to the people in the data before *adds* to what the licence promises from now on. Raises
        :class:`~casemate_schemas.errors.ConflictError` if the budget was renewed since.
        """
        return await _datasets.renew_budget(self._session, dataset, lineage)

    async def approvals(self) -> _approvals.PendingApprovals:
        """The jobs that wait for this person's approval, or that use data of their member which waits for others'.

        All key brokers are asked at once; those that do not answer are named in ``.unavailable``.
        """
        return await _approvals.list_approvals(self._session)

    async def approval(self, job: str) -> tuple[_approvals.ApprovalRequest, ...]:
        """What there is to approve about a job, one request for each key broker that asks: print it before approving.

        Args:
            job: its id, 32 hexadecimal digits; or its terms' digest, 64, also if it waits no more.

        Raises :class:`~casemate_schemas.errors.NotFoundError` if nothing about it concerns this person.
        """
        return await _approvals.find_approvals(self._session, job)

    async def approve(self, request: _approvals.ApprovalRequest) -> _approvals.ApprovalRequest:
        """Sign the very terms in ``request``; where it stands then. It counts for as long as the licence says.

        Raises :class:`~casemate_schemas.errors.AuthorisationError` if no licence counts this person.
        """
        return await _approvals.decide(self._session, request, "approve")

    async def deny(self, request: _approvals.ApprovalRequest) -> _approvals.ApprovalRequest:
        """End the job for ever, unless a worker has its keys already. Raises as :meth:`approve`."""
        return await _approvals.decide(self._session, request, "deny")

    async def revoke(self, person: str, *, member_keys: KeyRing, before: int | None = None) -> api.RevocationPublished:
        """End the delegations of a person of this person's member, whatever keys they have. It cannot be taken back.

        Key brokers and gateways refuse them within seconds: to sign in, to submit, to be given keys for, to approve. What
        is committed stays committed.

        Args:
            person: the name, without the member.
            member_keys: the member's own.
            before: those delegations end that begin before this time, Unix ms; now if not given.

        Raises :class:`~casemate_schemas.errors.AuthenticationError` for other keys than the member's.
        """
        session = self._session
        now = session.clock()
        with parameter_errors("revocation"):
            revocation = Revocation(
                consortium=session.consortium.id,
                member=session.identity.delegation.member,
                person=person,
                before=now if before is None else before,
                created=now,
            )
        body = BytesBody(encode(sign(revocation, member_keys.signing)))
        answer = await session.gateway.post(api.REVOCATIONS_PATH, body, max_bytes=MAX_LIST_BYTES)
        return read_json(api.RevocationPublished, answer.body)

    async def key_broker_state(self) -> StateShown:
        """Where the state of this person's own key broker stands, and the newer one that was seen, if it was set back."""
        broker = self.manifest.key_broker_of(self._session.identity.delegation.member)
        return await self._session.ask(broker, ShowState(), StateShown)

    async def endorse_key_broker(self, ahead: bytes) -> StateShown:
        """Let this person's own key broker go on from the state that it has, although it is older than one that was seen.

        Charges, commits and licences that only the newer state knew are forgotten by it. For stewards and admins; ``ahead``
        is the digest of the newer head that :meth:`key_broker_state` showed.
        """
        broker = self.manifest.key_broker_of(self._session.identity.delegation.member)
        return await self._session.ask(broker, EndorseState(ahead=ahead), StateShown)

    async def workers(self) -> WorkerList:
        """What the key broker of this person's member made of workers' evidence, newest first. For stewards and admins."""
        member = self._session.identity.delegation.member
        broker = self.manifest.key_broker_of(member)
        return await self._session.ask(broker, ShowWorkers(), WorkerList)

    async def present_workers(self) -> tuple[api.PresentWorker, ...]:
        """The workers that announced themselves within a day: what they say of themselves, by the gateway's word."""
        answer = await self._session.gateway.get(api.WORKERS_PATH, max_bytes=MAX_LIST_BYTES)
        return read_json(api.PresentWorkers, answer.body).workers

    async def drain_worker(self, worker: str) -> api.PresentWorker:
        """Has a worker end its job, take no other, and end itself. For admins; it hears of it within ten seconds.

        Raises :class:`ParameterError` for what is no name, :class:`~casemate_schemas.errors.NotFoundError` for a worker
        that did not announce itself within a day.
        """
        with parameter_errors("worker"):
            name = TypeAdapter(Name).validate_python(worker)
        answer = await self._session.gateway.post(f"{api.WORKERS_PATH}/{name}/drain", max_bytes=MAX_LIST_BYTES)
        return read_json(api.PresentWorker, answer.body)

    async def attest_key_broker(
        self, key_broker: str, *, policy: AttestationPolicy | None = None
    ) -> _hosting.AttestedKeyBroker:
        """Fresh evidence of an enclave-hosted key broker, verified against the manifest's policy, or one that is to be.

        Also of one whose keys no manifest lists yet: its claims are what the members then sign. Whether the keys are those
        that the manifest lists is checked by :meth:`push` and everything else that seals. Raises
        :class:`~casemate_schemas.errors.AttestationError` with each failed check, or
        :class:`~casemate_schemas.errors.UnavailableError`.
        """
        session = self._session
        return await _hosting.attest(
            session.gateway, session.consortium, key_broker, now=session.clock(), policy=policy
        )

    async def order_hand_over(self, key_broker: str) -> bytes:
        """An order to a hosted key broker to hand its state over to the enclave that answers in its name now.

        That one is attested first, and must have keys of its own. For stewards and admins of the members it serves; the
        order is good for a day. Raises as :meth:`attest_key_broker`.
        """
        session = self._session
        found = await self.attest_key_broker(key_broker)
        return _hosting.hand_over_order(session.consortium, session.identity, found, at=session.clock())

    async def tell_time(self, key_broker: str) -> int:
        """Tell a key broker what time it is, and get its own (Unix ms). For stewards and admins of the members it serves.

        An enclave's clock is its host's; it never goes back behind what it was told.
        """
        told = await self._session.ask(self.manifest.key_broker(key_broker), TellTime(), TimeTold)
        return told.at

    async def publish_manifest(self, signed: _consortium.SignedManifest) -> api.ManifestPublished:
        """Publish the next manifest, which a quorum of the present members signed. For admins.

        Programs take it up within seconds, without a restart. Raises :class:`ManifestError` if it does not follow the
        newest one, or another one was published first.
        """
        answer = await self._session.gateway.post(
            api.MANIFEST_PATH, BytesBody(encode(signed)), max_bytes=MAX_LIST_BYTES
        )
        await self._session.newest_chain()
        return read_json(api.ManifestPublished, answer.body)

    async def train(
        self,
        *,
        model: Any,
        datasets: Sequence[str],
        target: str,
        privacy: Privacy,
        optimizer: SGD | Adam,
        batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
        features: Sequence[str] | None = None,
        input_shape: Sequence[int] | None = None,
        loss: Loss | None = None,
        scaling: Scaling = "minus_one_one",
        purpose: str = "research",
        recipients: Sequence[Signed] | None = None,
        deadline_s: float = 24 * 3600,
        max_physical_batch: int = 1024,
        checkpoint_every_steps: int = 100,
        job_id: str | None = None,
        mechanism: Mechanism = "hardened",
        lr_schedule: LrSchedule | None = None,
        noise_schedule: Sequence[NoisePhase] = (),
        averaging: Averaging | None = None,
        augmentation: Augmentation | None = None,
        metrics: Metrics | None = None,
        padded_batch: int | Literal["auto"] | None = None,
        audit: Audit | None = None,
        priority: Priority = "normal",
        not_before: datetime | None = None,
    ) -> _jobs.Job:
        """Plan, seal and submit one training job. The model stays as it was; its weights are the initial ones.

        Args:
            model: a ``torch.nn.Module`` whose operations are on the allow-list and keep examples apart.
            datasets: ``name@owner`` each.
            target: the column to predict.
            privacy: epsilon, delta, clipping norm and unit, for each owner's data.
            optimizer: ``SGD(lr=...)`` or ``Adam(lr=...)``.
            batch_size: expected privacy units (records or subjects) in a batch, over all datasets, at their declared bounds.
            epochs, steps: one of them: expected passes over the declared rows, or the number of steps.
            features: columns that go in, in this order; all but the target if not given.
            input_shape: one example's; inferred from the features if not given.
            loss: ``cross_entropy``, ``binary_cross_entropy`` or ``mean_squared_error``; inferred from target and model.
            scaling: of features, by declared bounds: ``minus_one_one``, ``unit`` or ``none``.
            purpose: as licences name it.
            recipients: signed delegations of those who may open the result; this person if not given.
            deadline_s: seconds from now; a job that has not begun to commit its result by then expires. At most 30 days.
            job_id: 32 hexadecimal digits. Submitting the same job again under its id is the same job.
            mechanism: ``hardened`` noise, or ``exact``, whose guarantee holds for the bits released: docs/dp-engine.md.
            lr_schedule: multiples of the learning rate by step; always one if not given.
            noise_schedule: phases of other noise, ascending. The noise at the start is solved for so that all of them
                together meet ``privacy``.
            averaging: release an average of the weights along the way.
            augmentation: average each image's gradient over several views of it.
            metrics: release accuracy and mean loss on the training records beside the weights; charged with them.
            padded_batch: let every step compute on so many privacy units, dummies among them, so that its duration does not
                tell how many were drawn; a step that draws more uses none. ``auto`` is enough for all but one in 10^9.
            audit: put canaries in, and release a report in place of weights: see :meth:`audit`.
            priority: ``low``, ``normal`` or ``high``, beside this member's other jobs that wait; others' are not overtaken.
            not_before: a time with its zone, before the deadline. Key brokers are asked at once; no worker begins before it.

        Raises :class:`ParameterError`, :class:`~casemate_schemas.errors.ModelError` with the user's line,
        :class:`~casemate_schemas.errors.DatasetError`, :class:`~casemate_schemas.errors.BudgetError`,
        :class:`~casemate_schemas.errors.ConflictError`, or the gateway's problem. Nothing is charged by submitting.
        """
        request = TrainingRequest(
            model=model,
            datasets=tuple(datasets),
            target=target,
            privacy=privacy,
            optimizer=optimizer,
            batch_size=batch_size,
            epochs=epochs,
            steps=steps,
            features=None if features is None else tuple(features),
            input_shape=None if input_shape is None else tuple(input_shape),
            loss=loss,
            scaling=scaling,
            purpose=purpose,
            recipients=None if recipients is None else tuple(recipients),
            deadline_s=deadline_s,
            max_physical_batch=max_physical_batch,
            checkpoint_every_steps=checkpoint_every_steps,
            job_id=job_id,
            mechanism=mechanism,
            lr_schedule=lr_schedule,
            noise_schedule=tuple(noise_schedule),
            averaging=averaging,
            augmentation=augmentation,
            metrics=metrics,
            padded_batch=padded_batch,
            audit=audit,
            priority=priority,
            not_before=not_before,
        )
        return await _jobs.train(self._session, request)

    async def audit(self, /, *, canaries: int = 1000, confidence: float = 0.95, **training: Any) -> _jobs.Job:
        """Audit the engine: the training that :meth:`train` would make, with canaries in it, for a report in place of weights.

        The report compares a lower bound on epsilon, from how well the canaries are found in what the training releases, with
        the epsilon that is guaranteed. It costs every owner what the training costs; licences judge it as training.

        Args:
            canaries: 16 to 10,000.
            confidence: with which the bounds hold.
            training: as for :meth:`train`, without ``metrics``, ``augmentation`` and ``padded_batch``.

        Raises as :meth:`train`.
        """
        return await self.train(**training, audit=Audit(canaries=canaries, confidence=confidence))

    async def job(self, job_id: str, *, submitter: str | None = None) -> _jobs.Job:
        """A job submitted earlier, from here or elsewhere.

        Args:
            submitter: ``person@member`` whose job it must be, for recipients who did not submit it themselves.

        Raises :class:`~casemate_schemas.errors.NotFoundError` if there is none, or none for this person.
        """
        job = _jobs.Job(self._session, job_id, submitter=submitter)
        await job.status()
        return job

    async def jobs(self) -> tuple[api.JobStatus, ...]:
        """The jobs that this person's member submitted, newest first."""
        answer = await self._session.gateway.get(api.JOBS_PATH, max_bytes=MAX_LIST_BYTES)
        return read_json(api.JobList, answer.body).jobs

    def __repr__(self) -> str:
        simulated = " SIMULATED" if self.simulation else ""
        return f"<Consortium {self.manifest.name!r} {self.id[:16]}… manifest {self.manifest.number}{simulated}>"


def _consortium_id(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError as error:
        raise ParameterError("expected a consortium id of 64 hexadecimal digits") from error
    if len(value) != 32:
        raise ParameterError("expected a consortium id of 64 hexadecimal digits")
    return value


def _first_contact(manifest: ConsortiumManifest, consortium: bytes) -> str:
    simulated = " Its attestation is SIMULATED." if manifest.simulation else ""
    return (
        f"first contact with consortium {consortium.hex()} (named by your delegation): manifest {manifest.number} is taken "
        f"on trust as the newest, and pinned.{simulated} Compare the id with your member's."
    )
