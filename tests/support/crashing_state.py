"""A key broker's state that dies at a chosen write point, as its program would by ``kill -9``."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from casemate_key_broker.database import State, Transaction


class Crash(BaseException):
    """Nothing in the program runs after this: it is no error that anyone could handle."""


class CrashingState:
    """Write points are: before each statement that changes something, before each COMMIT, and after each one that changed
    something.
    """

    def __init__(self, inner: State, die: Callable[[], None] | None = None) -> None:
        self.inner = inner
        self._die = die or _crash
        self.points_left: int | None = None
        """Write points to pass before it dies; ``None`` for never."""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self.inner.transaction() as tx:
            watched = _Watched(tx, self)
            yield watched
            if watched.changed:
                self.pass_point()
        if watched.changed:
            self.pass_point()

    def scrub(self) -> None:
        self.inner.scrub()
        self.pass_point()

    def close(self) -> None:
        self.inner.close()

    def pass_point(self) -> None:
        if self.points_left is not None:
            if self.points_left == 0:
                self._die()
            self.points_left -= 1


def _crash() -> None:
    raise Crash


class _Watched:
    def __init__(self, tx: Transaction, state: CrashingState) -> None:
        self._tx = tx
        self._state = state
        self.changed = False

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> sqlite3.Cursor:
        self._note(sql)
        return self._tx.execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> sqlite3.Cursor:
        self._note(sql)
        return self._tx.executemany(sql, parameters)

    def _note(self, sql: str) -> None:
        if not sql.startswith(("SELECT", "PRAGMA")):
            self.changed = True
            self._state.pass_point()
