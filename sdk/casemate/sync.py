"""Every call in a blocking form, for scripts and notebooks without ``await``.

A connection runs its own event loop in a thread of its own, so it works where a loop is running already (Jupyter).

>>> import casemate as cm
>>> with cm.sync.connect("https://consortium.example", identity="clara.key") as consortium:  # doctest: +SKIP
...     print(consortium.datasets())
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from casemate_privacy.owners import Choice
from casemate_schemas.api import JobStatus, ManifestPublished, PresentWorker, RevocationPublished
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.consortium import ConsortiumManifest, SignedManifest
from casemate_schemas.custody import DatasetShown, LicenceAmended, StateBackedUp
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.job_state import JobEvent
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import Licence
from casemate_schemas.requests import Budget, BudgetRenewed, DatasetRegistered, StateShown, WorkerList

from . import client as _client
from . import jobs as _jobs
from ._http import MAX_WAIT_S
from .approvals import ApprovalRequest, PendingApprovals
from .custody import Amendment, Erased
from .datasets import Array, Datasets
from .hosting import AttestedKeyBroker
from .identity import Identity, now_ms
from .parameters import Privacy
from .results import Result

if TYPE_CHECKING:
    from rich.console import Console

_T = TypeVar("_T")
_P = ParamSpec("_P")


class _Loop:
    """An event loop in a daemon thread. A blocking call that is interrupted cancels what it waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="casemate", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            concurrent.futures.wait([future], timeout=5)
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def connect(
    url: str,
    *,
    identity: Identity | KeyRing | str | os.PathLike[str],
    consortium: str | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    clock: Callable[[], int] = now_ms,
    max_wait_s: float = MAX_WAIT_S,
) -> Iterator[Consortium]:
    """As :func:`casemate.connect`, for a ``with`` block."""
    loop = _Loop()
    try:
        connection = _client.connect(
            url, identity=identity, consortium=consortium, state_dir=state_dir, clock=clock, max_wait_s=max_wait_s
        )
        entered = loop.run(_entered(connection))
        try:
            yield Consortium(loop, entered)
        finally:
            loop.run(_left(connection))
    finally:
        loop.close()


def _blocking_train(
    method: Callable[Concatenate[_client.Consortium, _P], Coroutine[Any, Any, _jobs.Job]],
) -> Callable[Concatenate[Consortium, _P], Job]:
    """``train`` with the very parameters of the original."""

    @wraps(method)
    def train(consortium: Consortium, /, *args: _P.args, **kwargs: _P.kwargs) -> Job:
        return consortium.wrap_job(method(consortium.inner, *args, **kwargs))

    return train


class Consortium:
    """As :class:`casemate.Consortium`, blocking."""

    def __init__(self, loop: _Loop, inner: _client.Consortium) -> None:
        self._loop, self.inner = loop, inner
        self.id: str = inner.id
        self.manifest: ConsortiumManifest = inner.manifest
        self.simulation: bool = inner.simulation
        self.person: str = inner.person

    def datasets(self) -> Datasets:
        """See :meth:`casemate.Consortium.datasets`."""
        return self._loop.run(self.inner.datasets())

    def push(self, columns: Mapping[str, Array], card: DatasetCard, *, licence: Licence) -> DatasetRegistered:
        """See :meth:`casemate.Consortium.push`."""
        return self._loop.run(self.inner.push(columns, card, licence=licence))

    def budget(self, dataset: str) -> Budget:
        """See :meth:`casemate.Consortium.budget`."""
        return self._loop.run(self.inner.budget(dataset))

    def weigh_budgets(
        self,
        datasets: Sequence[str],
        *,
        privacy: Privacy,
        batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> tuple[Choice, ...]:
        """See :meth:`casemate.Consortium.weigh_budgets`."""
        return self._loop.run(
            self.inner.weigh_budgets(datasets, privacy=privacy, batch_size=batch_size, epochs=epochs, steps=steps)
        )

    def dataset_history(self, dataset: str) -> DatasetShown:
        """See :meth:`casemate.Consortium.dataset_history`."""
        return self._loop.run(self.inner.dataset_history(dataset))

    def compare_licence(self, licence: Licence) -> Amendment:
        """See :meth:`casemate.Consortium.compare_licence`."""
        return self._loop.run(self.inner.compare_licence(licence))

    def revocation_of(self, dataset: str) -> Amendment:
        """See :meth:`casemate.Consortium.revocation_of`."""
        return self._loop.run(self.inner.revocation_of(dataset))

    def amend(self, licence: Licence) -> LicenceAmended:
        """See :meth:`casemate.Consortium.amend`."""
        return self._loop.run(self.inner.amend(licence))

    def erase(self, dataset: str, *, envelope: bytes, keep_current: bool = False) -> Erased:
        """See :meth:`casemate.Consortium.erase`."""
        return self._loop.run(self.inner.erase(dataset, envelope=envelope, keep_current=keep_current))

    def rotate_seeds(self) -> int:
        """See :meth:`casemate.Consortium.rotate_seeds`."""
        return self._loop.run(self.inner.rotate_seeds())

    def back_up_key_broker(self) -> StateBackedUp:
        """See :meth:`casemate.Consortium.back_up_key_broker`."""
        return self._loop.run(self.inner.back_up_key_broker())

    def renew_budget(self, dataset: str, *, lineage: bytes) -> BudgetRenewed:
        """See :meth:`casemate.Consortium.renew_budget`."""
        return self._loop.run(self.inner.renew_budget(dataset, lineage=lineage))

    def approvals(self) -> PendingApprovals:
        """See :meth:`casemate.Consortium.approvals`."""
        return self._loop.run(self.inner.approvals())

    def approval(self, job: str) -> tuple[ApprovalRequest, ...]:
        """See :meth:`casemate.Consortium.approval`."""
        return self._loop.run(self.inner.approval(job))

    def approve(self, request: ApprovalRequest) -> ApprovalRequest:
        """See :meth:`casemate.Consortium.approve`."""
        return self._loop.run(self.inner.approve(request))

    def deny(self, request: ApprovalRequest) -> ApprovalRequest:
        """See :meth:`casemate.Consortium.deny`."""
        return self._loop.run(self.inner.deny(request))

    def revoke(self, person: str, *, member_keys: KeyRing, before: int | None = None) -> RevocationPublished:
        """See :meth:`casemate.Consortium.revoke`."""
        return self._loop.run(self.inner.revoke(person, member_keys=member_keys, before=before))

    def key_broker_state(self) -> StateShown:
        """See :meth:`casemate.Consortium.key_broker_state`."""
        return self._loop.run(self.inner.key_broker_state())

    def endorse_key_broker(self, ahead: bytes) -> StateShown:
        """See :meth:`casemate.Consortium.endorse_key_broker`."""
        return self._loop.run(self.inner.endorse_key_broker(ahead))

    def workers(self) -> WorkerList:
        """See :meth:`casemate.Consortium.workers`."""
        return self._loop.run(self.inner.workers())

    def present_workers(self) -> tuple[PresentWorker, ...]:
        """See :meth:`casemate.Consortium.present_workers`."""
        return self._loop.run(self.inner.present_workers())

    def drain_worker(self, worker: str) -> PresentWorker:
        """See :meth:`casemate.Consortium.drain_worker`."""
        return self._loop.run(self.inner.drain_worker(worker))

    def attest_key_broker(self, key_broker: str, *, policy: AttestationPolicy | None = None) -> AttestedKeyBroker:
        """See :meth:`casemate.Consortium.attest_key_broker`."""
        return self._loop.run(self.inner.attest_key_broker(key_broker, policy=policy))

    def order_hand_over(self, key_broker: str) -> bytes:
        """See :meth:`casemate.Consortium.order_hand_over`."""
        return self._loop.run(self.inner.order_hand_over(key_broker))

    def tell_time(self, key_broker: str) -> int:
        """See :meth:`casemate.Consortium.tell_time`."""
        return self._loop.run(self.inner.tell_time(key_broker))

    def publish_manifest(self, signed: SignedManifest) -> ManifestPublished:
        """See :meth:`casemate.Consortium.publish_manifest`."""
        return self._loop.run(self.inner.publish_manifest(signed))

    def job(self, job_id: str, *, submitter: str | None = None) -> Job:
        """See :meth:`casemate.Consortium.job`."""
        return self.wrap_job(self.inner.job(job_id, submitter=submitter))

    def jobs(self) -> tuple[JobStatus, ...]:
        """See :meth:`casemate.Consortium.jobs`."""
        return self._loop.run(self.inner.jobs())

    train = _blocking_train(_client.Consortium.train)
    audit = _blocking_train(_client.Consortium.audit)

    def wrap_job(self, coroutine: Coroutine[Any, Any, _jobs.Job]) -> Job:
        """Wait for a job and give it its blocking form."""
        return Job(self._loop, self._loop.run(coroutine))

    def __repr__(self) -> str:
        return repr(self.inner)


class Job:
    """As :class:`casemate.Job`, blocking."""

    def __init__(self, loop: _Loop, inner: _jobs.Job) -> None:
        self._loop, self._inner = loop, inner
        self.id: str = inner.id

    def status(self) -> JobStatus:
        """See :meth:`casemate.Job.status`."""
        return self._loop.run(self._inner.status())

    def events(self) -> Iterator[JobEvent]:
        """See :meth:`casemate.Job.events`."""
        events = self._inner.events()
        while (event := self._loop.run(_following(events))) is not None:
            yield event

    def watch(self, *, console: Console | None = None) -> JobStatus:
        """See :meth:`casemate.Job.watch`."""
        return self._loop.run(self._inner.watch(console=console))

    def cancel(self) -> JobStatus:
        """See :meth:`casemate.Job.cancel`."""
        return self._loop.run(self._inner.cancel())

    def result(self) -> Result:
        """See :meth:`casemate.Job.result`."""
        return self._loop.run(self._inner.result())

    def __repr__(self) -> str:
        return repr(self._inner)


async def _entered(connection: Any) -> _client.Consortium:
    entered: _client.Consortium = await connection.__aenter__()
    return entered


async def _left(connection: Any) -> None:
    await connection.__aexit__(None, None, None)


async def _following(events: AsyncIterator[JobEvent]) -> JobEvent | None:
    return await anext(events, None)
