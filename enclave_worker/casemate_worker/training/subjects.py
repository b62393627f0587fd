"""Whose records are whose: the table of subjects, at most so many records of each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ABSENT = -1
"""Stands in a table where a subject has fewer records than others may have."""


def subject_table(ids: NDArray[Any], max_records: int, bound: int) -> NDArray[np.int64]:
    """Positions of each subject's first ``max_records`` records, int64 ``[subjects, max_records]``.

    ``ids`` holds a whole number for each record, and equal ones belong to one subject. A row of the table depends on that
    subject's records alone, so whoever takes a subject out of the data changes no other row. Rows are in the order of ids,
    of which the first ``bound`` are kept: whoever declares a bound below their number (the SDK lets nobody) protects
    subjects less, as with rows.
    """
    order = np.argsort(ids, kind="stable")
    found = ids[order]
    is_first = np.ones(len(ids), dtype=np.bool_)
    is_first[1:] = found[1:] != found[:-1]
    subject = np.cumsum(is_first) - 1
    starts = np.flatnonzero(is_first)
    rank = np.arange(len(ids)) - starts[subject] if len(ids) else subject
    kept = (rank < max_records) & (subject < bound)
    table = np.full((min(len(starts), bound), max_records), ABSENT, dtype=np.int64)
    table[subject[kept], rank[kept]] = order[kept]
    return table
