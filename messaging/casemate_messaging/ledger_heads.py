"""The newest signed head of each key broker's ledger: where a key broker that starts from an older copy meets a newer head.

NATS and its host may withhold a head or bring back an older one; they cannot make one. So what is read here proves a
rollback where there is one, and never proves that there is none.
"""

from __future__ import annotations

from typing import Final

from casemate_schemas import subjects
from casemate_schemas.errors import ConflictError, NotFoundError
from nats.aio.client import Client

from .connection import REQUEST_TIMEOUT_S, repeated, translated
from .direct import Stored, read_last

_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"


class LedgerHeadStore:
    """Heads over one connection. What is read is as untrusted as NATS."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def put(self, key_broker_id: str, signed_head: bytes, *, after: int) -> int:
        """Stores the newest head durably, in the place of the one at sequence ``after`` (0 for none). The key broker only.

        Returns its sequence. Raises :class:`ConflictError` if another one was stored since: by a copy of this key broker,
        or by NATS itself; :class:`~casemate_schemas.errors.StorageFullError`,
        :class:`~casemate_schemas.errors.UnavailableError`.
        """
        subject, expected = subjects.ledger_head(key_broker_id), {_EXPECTED: str(after)}
        try:
            with translated("anchoring a ledger head"):
                ack = await repeated(lambda: self._js.publish(subject, signed_head, headers=expected))
            return ack.seq
        except ConflictError:
            stored = await self.stored(key_broker_id)
            if stored is None or stored.data != signed_head:
                raise
            return stored.sequence  # this very call's, whose answer was lost

    async def newest(self, key_broker_id: str) -> bytes | None:
        """The head stored last, if there is one. Raises :class:`~casemate_schemas.errors.UnavailableError`."""
        stored = await self.stored(key_broker_id)
        return None if stored is None else stored.data

    async def stored(self, key_broker_id: str) -> Stored | None:
        """The head stored last and its sequence. Raises as :meth:`newest`."""
        try:
            return await read_last(self._client, subjects.LEDGER_HEAD_STREAM, subjects.ledger_head(key_broker_id))
        except NotFoundError:
            return None
