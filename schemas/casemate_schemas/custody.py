"""What a steward asks about a dataset's keys, versions and licences, and an officer about the key broker's own secrets."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from .codec import Digest, Name, UnixMs, WireModel
from .dataset import DatasetCard, DatasetId
from .keys import SealingPublicKey
from .signatures import Signed

MAX_VERSIONS: Final = 1024
"""Of one dataset, whose keys a key broker holds."""

MAX_HISTORY: Final = 1024

_Person = Annotated[str, StringConstraints(max_length=140)]


class PrepareDataset(WireModel):
    """A sealing key for one dataset version that is about to be sealed: made now, for it alone."""

    op: Literal["prepare_dataset"] = "prepare_dataset"
    owner: Name


class DatasetPrepared(WireModel):
    """Answer to :class:`PrepareDataset`. The private half never leaves the key broker, and ends with the version."""

    answer: Literal["dataset_prepared"] = "dataset_prepared"
    sealing_key: SealingPublicKey


class ShowDataset(WireModel):
    """A dataset as its owner sees it: the licence in force, and which version and licence were in force when."""

    op: Literal["show_dataset"] = "show_dataset"
    dataset: DatasetId


class VersionLine(WireModel):
    """One version: in force from ``at`` until the next one's."""

    envelope: Digest
    at: UnixMs
    person: _Person
    row_bound: Annotated[int, Field(ge=1)]
    erased: bool
    """Its key is destroyed: nobody can open it any more."""


class LicenceLine(WireModel):
    """One licence: in force from ``at`` until the next one's."""

    licence: Digest
    number: Annotated[int, Field(ge=1)]
    at: UnixMs
    person: _Person


class DatasetShown(WireModel):
    """Answer to :class:`ShowDataset`. The newest 1024 versions and licences, oldest of them first."""

    answer: Literal["dataset"] = "dataset"
    card: DatasetCard
    lineage: Digest
    licence: Signed
    envelope: Digest
    erased: bool
    versions: Annotated[tuple[VersionLine, ...], Field(max_length=MAX_HISTORY)]
    licences: Annotated[tuple[LicenceLine, ...], Field(max_length=MAX_HISTORY)]


class AmendLicence(WireModel):
    """Another licence for a dataset that is there: signed by the steward who asks, its number above the newest one's."""

    op: Literal["amend_licence"] = "amend_licence"
    licence: Signed


class LicenceAmended(WireModel):
    """Answer to :class:`AmendLicence`: the licence is in force."""

    answer: Literal["licence_amended"] = "licence_amended"
    dataset: DatasetId
    licence: Digest


class EraseDataset(WireModel):
    """Destroy the keys of a dataset, for good: of all its versions, or of those that are superseded.

    ``envelope`` is the version in force as the steward saw it, so that nobody destroys what came in between.
    """

    op: Literal["erase_dataset"] = "erase_dataset"
    dataset: DatasetId
    envelope: Digest
    keep_current: bool


class DatasetErased(WireModel):
    """Answer to :class:`EraseDataset`: the versions whose keys this request destroyed."""

    answer: Literal["dataset_erased"] = "dataset_erased"
    dataset: DatasetId
    envelopes: Annotated[tuple[Digest, ...], Field(max_length=MAX_VERSIONS)]


class RotateSeeds(WireModel):
    """Draw the seed shares of jobs that are reserved from now on from a new secret. Nothing changes for those before."""

    op: Literal["rotate_seeds"] = "rotate_seeds"


class SeedsRotated(WireModel):
    """Answer to :class:`RotateSeeds`: the epoch of new reservations."""

    answer: Literal["seeds_rotated"] = "seeds_rotated"
    epoch: Annotated[int, Field(ge=1)]


class BackUpState(WireModel):
    """Copy the state as it is now into the key broker's backup folder."""

    op: Literal["back_up_state"] = "back_up_state"


class StateBackedUp(WireModel):
    """Answer to :class:`BackUpState`: the folder's name, and how far the copy reaches."""

    answer: Literal["state_backed_up"] = "state_backed_up"
    name: Name
    audit_size: Annotated[int, Field(ge=0)]
