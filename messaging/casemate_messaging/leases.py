"""What only one program may do at a time, and what it is about to remove: one record in a KV bucket, by compare-and-set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Final, Literal

from casemate_schemas import subjects
from casemate_schemas.codec import Digest, Name, UnixMs, WireModel, decode, encode
from casemate_schemas.errors import ConflictError, IntegrityError, MalformedError, NotFoundError
from nats.aio.client import Client
from nats.js.kv import KeyValue
from pydantic import Field

from .connection import REQUEST_TIMEOUT_S, repeated, translated

MAX_CONDEMNED: Final = 1024
_MAX_LEASE_BYTES: Final = 64 << 10


class Lease(WireModel):
    """Who has it, until when, and the digests of what is being removed: nobody may begin to rely on those."""

    KIND: ClassVar[str] = "lease"

    version: Literal[1] = 1
    holder: Name
    until: UnixMs
    condemned: Annotated[tuple[Digest, ...], Field(max_length=MAX_CONDEMNED)] = ()


class LeaseStore:
    """The lease of that ``name``. For gateways: workers have no permission."""

    def __init__(self, client: Client, name: str, holder: str, *, clock: Callable[[], int], lasts_s: float) -> None:
        self._name = name
        self._holder = holder
        self._clock = clock
        self._lasts_ms = int(1000 * lasts_s)
        self._revision: int | None = None
        self._held = Lease(holder=holder, until=0)
        self._kv = KeyValue(
            name=subjects.LEASE_BUCKET,
            stream=subjects.LEASE_STREAM,
            pre=f"$KV.{subjects.LEASE_BUCKET}.",
            js=client.jetstream(timeout=REQUEST_TIMEOUT_S),
            direct=True,
        )

    async def take(self) -> bool:
        """Takes the lease if nobody has it; whether that succeeded. Raises :class:`UnavailableError`."""
        lease, revision = await self._read()
        if lease is not None and lease.until > self._clock() and lease.holder != self._holder:
            return False
        self._revision = revision
        try:
            await self.hold()
        except ConflictError:
            return False
        return True

    async def hold(self, condemned: tuple[bytes, ...] = ()) -> None:
        """Prolongs the lease, and says what is being removed. Raises :class:`ConflictError` if somebody else has it now."""
        await self._write(self._clock() + self._lasts_ms, condemned)

    async def keep(self) -> None:
        """Makes sure that the lease, with what it condemns, was held all along. Raises as :meth:`hold` if it lapsed."""
        left_ms = self._held.until - self._clock()
        if left_ms <= 0:
            raise ConflictError("the lease has lapsed")
        if left_ms < self._lasts_ms // 2:
            await self.hold(self._held.condemned)

    async def give_back(self) -> None:
        """Ends the lease. Raises as :meth:`hold`."""
        await self._write(0, ())

    async def condemned(self) -> frozenset[bytes]:
        """What is being removed now, by whoever has the lease. Raises :class:`UnavailableError`."""
        lease, _ = await self._read()
        return frozenset(lease.condemned) if lease is not None and lease.until > self._clock() else frozenset()

    async def _write(self, until: int, condemned: tuple[bytes, ...]) -> None:
        if self._revision is None:
            raise ConflictError("a lease that was never taken cannot be held")
        lease = Lease(holder=self._holder, until=until, condemned=condemned)
        with translated("holding a lease"):
            self._revision = await self._kv.update(self._name, encode(lease), last=self._revision)
        self._held = lease

    async def _read(self) -> tuple[Lease | None, int]:
        try:
            with translated("reading a lease"):
                entry = await repeated(lambda: self._kv.get(self._name))
            return decode(Lease, entry.value or b"", max_bytes=_MAX_LEASE_BYTES), entry.revision or 0
        except NotFoundError:
            return None, 0
        except MalformedError as error:
            raise IntegrityError("a stored lease is broken") from error
