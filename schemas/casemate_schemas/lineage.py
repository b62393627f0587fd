"""Where a result comes from: every dataset and licensed model behind it, however long the chain.

The key brokers of a job that uses a result find here whose licences speak; each judges by the licence of its own that is
in force then, so an amendment reaches what was derived before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from .codec import Digest, Name, WireModel
from .dataset import DatasetId
from .errors import LicenceError
from .job import Plan
from .licence import MAX_INHERITED


class Inherited(WireModel):
    """One dataset or licensed model, the licence under which it was used, and the key broker that answers for it."""

    subject: DatasetId
    licence: Digest
    key_broker: Name


Lineage = Annotated[tuple[Inherited, ...], Field(max_length=MAX_INHERITED)]
"""Sorted by subject and licence, each once."""


def lineage_of(plan: Plan, inputs: Iterable[tuple[Inherited, ...]] = ()) -> tuple[Inherited, ...]:
    """The lineage of what a plan makes: its own datasets and the lineage of each result among its ``inputs``.

    Raises :class:`LicenceError` for more than 256 entries.
    """
    own = [Inherited(subject=use.dataset, licence=use.licence, key_broker=use.key_broker) for use in plan.datasets]
    found = {
        (item.subject, item.licence, item.key_broker): item for item in [*own, *(i for given in inputs for i in given)]
    }
    if len(found) > MAX_INHERITED:
        raise LicenceError(f"a result inherits at most {MAX_INHERITED} licences, not {len(found)}")
    return tuple(found[key] for key in sorted(found))
