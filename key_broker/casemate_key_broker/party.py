"""Who this key broker is: its id, its keys, and the consortium it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.consortium import Consortium, ManifestChain, verify_chain
from casemate_schemas.errors import SetupError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation, Revocation
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import SealingKey
from casemate_schemas.signatures import Signed, sign

from . import audit_log
from .database import State, get_meta, set_meta


@dataclass(frozen=True)
class Party:
    """One key broker, able to sign and to open what is sealed to it."""

    id: str
    keys: KeyRing
    consortium: Consortium

    def __post_init__(self) -> None:
        listed = self.consortium.manifest.key_broker(self.id)
        if (listed.signing_key, listed.sealing_key) != (self.keys.signing.public, self.keys.sealing.public):
            raise SetupError(f"the manifest lists other keys for key broker {self.id} than its own")

    def check_hosted(self, *, hosted: bool) -> None:
        """Raises :class:`SetupError` unless the manifest says of this key broker that it is ``hosted``, or that it is not."""
        if (self.consortium.manifest.key_broker(self.id).hosted == "enclave") != hosted:
            raise SetupError("manifest and settings disagree on whether this key broker runs in an enclave")

    @property
    def sealing(self) -> SealingKey:
        """What owners and submitters seal content keys to."""
        return self.keys.sealing

    @property
    def serves(self) -> tuple[str, ...]:
        """The members whose datasets, or whose people's jobs, this key broker looks after."""
        return self.consortium.manifest.key_broker(self.id).serves

    def signed(self, message: WireModel) -> bytes:
        """Canonical bytes of ``message`` signed by this key broker."""
        return encode(sign(message, self.keys.signing))


def full_name(person: Delegation) -> str:
    """``person@member``."""
    return f"{person.person}@{person.member}"


def pin_consortium(
    database: State, key_broker: str, consortium_id: bytes, chain: ManifestChain, now: int
) -> Consortium:
    """The consortium of ``chain``, which this state from now on never goes back behind.

    Raises :class:`ManifestError` for a chain that is not valid or lacks the newest manifest seen before, and
    :class:`SetupError` if the state belongs to another key broker or consortium.
    """
    with database.transaction() as tx:
        if get_meta(tx, "key-broker") not in (None, (key_broker, consortium_id)):
            raise SetupError("this state belongs to another key broker or another consortium")
        pinned = get_meta(tx, "manifest")
    consortium = verify_chain(chain, consortium=consortium_id, pinned=pinned)
    pin(database, key_broker, consortium, now)
    return consortium


def pin(database: State, key_broker: str, consortium: Consortium, now: int) -> None:
    """Keeps the version of ``consortium``, verified and not older than the one kept, with its audit entry."""
    newest = (consortium.manifest.number, consortium.digest)
    with database.transaction() as tx:
        if get_meta(tx, "manifest") != newest:
            set_meta(tx, "key-broker", (key_broker, consortium.id))
            set_meta(tx, "manifest", newest)
            subject = f"manifest {newest[0]}"
            audit_log.append(tx, AuditEntry(key_broker=key_broker, event="manifest", at=now, subject=subject))


def known_revocations(database: State) -> tuple[Signed, ...]:
    """The revocations of people that were accepted before, the widest of each person."""
    with database.transaction() as tx:
        return tuple(decode(Signed, row) for (row,) in tx.execute("SELECT signed FROM revocations"))


def keep_revocation(database: State, key_broker: str, revocation: Revocation, signed: Signed, now: int) -> None:
    """Keeps a verified revocation that is wider than the one kept of that person, with its audit entry."""
    who = (revocation.member, revocation.person)
    entry = AuditEntry(
        key_broker=key_broker, event="person_revoked", at=now, subject=f"{revocation.person}@{revocation.member}"
    )
    with database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO revocations VALUES (?, ?, ?)", (*who, encode(signed)))
        audit_log.append(tx, entry)
