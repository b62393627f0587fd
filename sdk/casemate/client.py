"""A connection to one consortium: what a scientist or a steward starts from."""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from casemate_schemas import api
from casemate_schemas.codec import decode
from casemate_schemas.consortium import ConsortiumManifest, ManifestChain, verify_delegation
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import ManifestError, ParameterError
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import Licence
from casemate_schemas.pipeline import Loss, Scaling
from casemate_schemas.requests import Budget, DatasetRegistered
from casemate_schemas.signatures import Signed

from . import datasets as _datasets
from . import jobs as _jobs
from . import planning as _planning
from ._http import MAX_CHAIN_BYTES, MAX_LIST_BYTES, Gateway, read_json
from ._session import Session
from .identity import Identity, now_ms
from .parameters import SGD, Adam, Privacy
from .state import State, default_state_dir


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
        gateway = Gateway(url, me, http)
        answer = await gateway.get(api.CONSORTIUM_PATH, max_bytes=MAX_CHAIN_BYTES)
        chain = decode(ManifestChain, answer.body, max_bytes=MAX_CHAIN_BYTES)
        verified, first_contact = state.accept_chain(chain, expected)
        verify_delegation(me.signed_delegation, verified, at=clock())
        if first_contact and consortium is None:
            warnings.warn(_first_contact(verified.manifest, expected), FirstContactWarning, stacklevel=3)
        yield Consortium(Session(gateway, me, verified, chain, state, clock))


class Consortium:
    """What one person can do in one consortium. Made by :func:`connect`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def id(self) -> str:
        """The consortium's id, 64 hexadecimal digits."""
        return self._session.consortium.id.hex()

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

    async def budget(self, dataset: str) -> Budget:
        """The ledger of a dataset (``name@owner``), every charge in it. For stewards of the owner."""
        return await _datasets.show_budget(self._session, dataset)

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
    ) -> _jobs.Job:
        """Plan, seal and submit one training job. The model stays as it was; its weights are the initial ones.

        Args:
            model: a ``torch.nn.Module`` whose operations are on the allow-list and keep examples apart.
            datasets: ``name@owner`` each.
            target: the column to predict.
            privacy: epsilon, delta and clipping norm, for each owner's records.
            optimizer: ``SGD(lr=...)`` or ``Adam(lr=...)``.
            batch_size: expected records in a batch, over all datasets, at their declared row bounds.
            epochs, steps: one of them: expected passes over the declared rows, or the number of steps.
            features: columns that go in, in this order; all but the target if not given.
            input_shape: one example's; inferred from the features if not given.
            loss: ``cross_entropy``, ``binary_cross_entropy`` or ``mean_squared_error``; inferred from target and model.
            scaling: of features, by declared bounds: ``minus_one_one``, ``unit`` or ``none``.
            purpose: as licences name it.
            recipients: signed delegations of those who may open the result; this person if not given.
            deadline_s: seconds within which the key brokers must have agreed.
            job_id: 32 hexadecimal digits. Submitting the same job again under its id is the same job.

        Raises :class:`ParameterError`, :class:`~casemate_schemas.errors.ModelError` with the user's line,
        :class:`~casemate_schemas.errors.DatasetError`, :class:`~casemate_schemas.errors.BudgetError`,
        :class:`~casemate_schemas.errors.ConflictError`, or the gateway's problem. Nothing is charged by submitting.
        """
        request = _planning.TrainingRequest(
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
        )
        return await _jobs.train(self._session, request)

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
