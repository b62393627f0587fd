"""The road of a person's request, from sealed bytes to sealed bytes: registration, amendment, approvals, budget, custody.

Who a person is comes from their delegation alone; what they may ask for is judged by the function that does it, before
anything else of the question. What changes something is one transaction with its audit entry, on the disk before the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from casemate_schemas.custody import (
    AmendLicence,
    BackUpState,
    DatasetErased,
    EraseDataset,
    LicenceAmended,
    PrepareDataset,
    RotateSeeds,
    SeedsRotated,
    ShowDataset,
    StateBackedUp,
)
from casemate_schemas.errors import CasemateError, RolledBackError, SetupError
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Licence
from casemate_schemas.requests import (
    ApprovalShown,
    Budget,
    DatasetRegistered,
    EndorseState,
    GiveApproval,
    ListApprovals,
    ListDatasets,
    PersonRequest,
    PersonResponse,
    RegisterDataset,
    RenewBudget,
    ShowApproval,
    ShowBudget,
    ShowState,
    ShowWorkers,
    TellTime,
    TimeTold,
)
from casemate_schemas.signatures import Signed, sign

from . import anchor, approvals, audit_log, custody, licences, prechecks, requests, standings
from .database import State, Transaction, get_meta, set_meta
from .party import Party, full_name
from .seed_shares import SeedSecrets

STANDINGS_A_BUDGET: Final = 48
"""How many charges' standings are computed, at most, while an owner waits for a budget."""

_AtOnce = (
    ListDatasets | RenewBudget | ListApprovals | ShowWorkers | ShowState | EndorseState | ShowDataset | PrepareDataset
)
"""What one transaction answers."""


class People:
    """What people ask of one key broker. Thread-safe, as its state is."""

    def __init__(
        self,
        party: Party,
        database: State,
        seeds: SeedSecrets,
        *,
        clock: Callable[[], int],
        hear_time: Callable[[int], None],
        back_up: Callable[[int], tuple[str, int]] | None,
    ) -> None:
        """``clock`` tells Unix ms; ``hear_time`` and ``back_up`` as :class:`.service.KeyBroker` takes them."""
        self._party = party
        self._database = database
        self._seeds = seeds
        self._clock = clock
        self._hear_time = hear_time
        self._back_up_to = back_up

    def message(self, payload: bytes) -> bytes:
        """A ``response`` envelope to a person's ``request`` envelope. Refusals are told to that person alone.

        1. The request is authentic, of now and for this key broker. What fails before here is answered by an error.
        2. It is heard once, if it changes anything, and by a state that is current.
        3. It is answered, or refused in words; an error that decided nothing is neither.
        4. The answer is sealed to that person, with the head of the state after it.
        """
        now = self._clock()
        request, person = requests.open_request(payload, self._party, now)  # 1
        try:
            self._hear(request, person, now)  # 2
            body = requests.check_size(self._answer(request, person, now))  # 3
        except RolledBackError as error:
            body = requests.refusal_of(error)
        except audit_log.NO_DECISION:
            raise
        except CasemateError as error:
            body = requests.refusal_of(error)
        response = PersonResponse(id=request.id, head=self._head(now), body=body)  # 4
        return requests.seal_response(self._party, person, response, now)

    def _hear(self, request: PersonRequest, person: Delegation, now: int) -> None:
        """What has to hold of any request before it is judged; each of the three stands, whatever the next one says.

        1. One that changes anything is used up, also if it is refused: whoever carries it cannot try again later.
        2. The head that the person has seen is noted. 3. Only what mends a state that was set back goes on in it.
        """
        changes = not isinstance(request.body, requests.READING)
        if changes:  # 1
            with self._database.transaction() as tx:
                requests.use_once(tx, request, person, now)
        if request.seen is not None:  # 2
            with self._database.transaction() as tx:
                anchor.observe(tx, self._party, request.seen)
        if changes and not isinstance(request.body, requests.MENDING):  # 3
            with self._database.transaction() as tx:
                anchor.check_current(tx)

    def _answer(self, request: PersonRequest, person: Delegation, now: int) -> requests.Answer:
        match body := request.body:
            case ShowBudget():
                return self._show_budget(body, person, now)
            case ShowApproval():
                return self._show_approval(body.terms, person, now)
            case GiveApproval():
                return self._give_approval(body, person, request.delegation, now)
            case TellTime():
                return self._take_time(request.created, person)
            case RegisterDataset():
                return self._register(body, person, now)
            case AmendLicence():
                return self._amend(body, person, now)
            case EraseDataset():
                return self._erase(body, person, now)
            case RotateSeeds():
                return self._rotate_seeds(person, now)
            case BackUpState():
                return self._back_up(person, now)
            case _:
                with self._database.transaction() as tx:
                    return self._at_once(tx, body, person, now)

    def _at_once(self, tx: Transaction, body: _AtOnce, person: Delegation, now: int) -> requests.Answer:
        match body:
            case ListDatasets():
                return requests.list_datasets(tx, self._party, person, now)
            case RenewBudget():
                return licences.renew_budget(tx, self._party, person, body, now)
            case ListApprovals():
                return approvals.find_all(tx, self._party, person, now)
            case ShowWorkers():
                return requests.show_workers(tx, self._party, person)
            case ShowState():
                anchor.check_officer(self._party, person)
                return anchor.show(tx, self._party, now)
            case EndorseState():
                anchor.check_officer(self._party, person)
                return anchor.endorse(tx, self._party, person, body.ahead, now)
            case ShowDataset():
                return custody.show(tx, self._party, person, body)
            case PrepareDataset():
                return custody.prepare(tx, self._party, person, body, now)

    # --- budgets and approvals ----------------------------------------------------------------------------------------

    def _show_budget(self, request: ShowBudget, person: Delegation, now: int) -> Budget:
        with self._database.transaction() as tx:
            lineage = requests.lineage_of(tx, self._party, person, request.dataset)
        standings.catch_up(self._database, lineage, STANDINGS_A_BUDGET)
        with self._database.transaction() as tx:
            return requests.show_budget(tx, self._party, person, request, now)

    def _show_approval(self, terms: bytes, person: Delegation, now: int) -> ApprovalShown:
        """The job is priced, up to a second for each dataset, outside of any transaction."""
        with self._database.transaction() as tx:
            job = approvals.find(tx, terms, self._party, person)
        return self._shown(job, now)

    def _shown(self, job: approvals.Case, now: int) -> ApprovalShown:
        charges = prechecks.price(job.uses, job.terms.terms.plan)
        with self._database.transaction() as tx:
            return approvals.show(tx, job, charges, self._party, now)

    def _give_approval(self, request: GiveApproval, person: Delegation, delegation: Signed, now: int) -> ApprovalShown:
        with self._database.transaction() as tx:
            job = approvals.find(tx, request.terms, self._party, person)
            approvals.give(tx, request, job, self._party, person, delegation, now)
        return self._shown(job, now)  # not found anew: a word that ends the job may have ended it by now

    # --- datasets -----------------------------------------------------------------------------------------------------

    def _register(self, registration: RegisterDataset, person: Delegation, now: int) -> DatasetRegistered:
        try:
            with self._database.transaction() as tx:
                licence = licences.check_registration(tx, self._party, registration, person, now)
            with self._database.transaction() as tx:
                registered = licences.register(tx, registration, licence, person, now)
                about = {"envelope": registered.envelope, "licence": registered.licence}
                custody.record(tx, self._party, person, now, event="registered", subject=registered.dataset, **about)
                return registered
        except CasemateError as refusal:
            self._record_refusal(refusal, registration.card.id, person, now)
            raise

    def _amend(self, request: AmendLicence, person: Delegation, now: int) -> LicenceAmended:
        """A licence is judged, which takes its time, only for who may amend it."""
        dataset = request.licence.peek(Licence).dataset
        try:
            licences.check_steward(self._party, person, dataset.partition("@")[2])
            licence = licences.check_licence(request.licence, person, now)
            with self._database.transaction() as tx:
                return custody.amend(tx, self._party, person, request, licence, now)
        except CasemateError as refusal:
            self._record_refusal(refusal, dataset, person, now)
            raise

    def _erase(self, request: EraseDataset, person: Delegation, now: int) -> DatasetErased:
        with self._database.transaction() as tx:
            erased = custody.erase(tx, self._party, person, request, now)
        self._database.scrub()
        return erased

    def _record_refusal(self, refusal: CasemateError, dataset: str, person: Delegation, now: int) -> None:
        about = {"key_broker": self._party.id, "at": now, "subject": dataset, "person": full_name(person)}
        audit_log.record_refusal(self._database, refusal, **about)

    # --- the key broker itself ----------------------------------------------------------------------------------------

    def _take_time(self, told: int, person: Delegation) -> TimeTold:
        """A sealed state keeps the clock's time with whatever is written: so something is."""
        anchor.check_officer(self._party, person)
        self._hear_time(told)
        with self._database.transaction() as tx:
            set_meta(tx, "time-told", max(told, get_meta(tx, "time-told") or 0))
        return TimeTold(at=self._clock())

    def _rotate_seeds(self, person: Delegation, now: int) -> SeedsRotated:
        """The new secret is on the disk before anything is reserved under it; it is used even if its entry is lost."""
        anchor.check_officer(self._party, person)
        epoch = self._seeds.rotate()
        with self._database.transaction() as tx:
            custody.record(tx, self._party, person, now, event="seeds_rotated", subject=f"epoch {epoch}")
        return SeedsRotated(epoch=epoch)

    def _back_up(self, person: Delegation, now: int) -> StateBackedUp:
        anchor.check_officer(self._party, person)
        if self._back_up_to is None:
            raise SetupError("this key broker has no backup_dir: set one, or copy what docs/key-broker.md names")
        name, size = self._back_up_to(now)
        with self._database.transaction() as tx:
            custody.record(tx, self._party, person, now, event="backed_up", subject=name)
        return StateBackedUp(name=name, audit_size=size)

    def _head(self, now: int) -> Signed:
        """Signed also of a state that was set back: whoever holds a newer one can tell by it."""
        with self._database.transaction() as tx:
            return sign(anchor.head(tx, self._party, now), self._party.keys.signing)
