"""Who this key broker is: its id, its keys, and the consortium it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from casemate_schemas.codec import WireModel, encode
from casemate_schemas.consortium import Consortium, ManifestChain, verify_chain
from casemate_schemas.errors import SetupError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import SealingKey
from casemate_schemas.signatures import sign

from . import audit_log
from .database import Database, get_meta, set_meta


@dataclass(frozen=True)
class Party:
    """One key broker, able to sign and to open what is sealed to it."""

    id: str
    keys: KeyRing
    consortium: Consortium

    def __post_init__(self) -> None:
        listed = self.consortium.manifest.key_broker(self.id)
        if (listed.signing_key, listed.sealing_key) != (self.keys.signing.public, self.keys.sealing.public):
            raise SetupError(f"the manifest lists other keys for key broker {self.id} than those in the keys file")

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
    database: Database, key_broker: str, consortium_id: bytes, chain: ManifestChain, now: int
) -> Consortium:
    """The consortium of ``chain``, which this state from now on never goes back behind.

    Raises :class:`ManifestError` for a chain that is not valid or lacks the newest manifest seen before, and
    :class:`SetupError` if the state belongs to another key broker or consortium.
    """
    with database.transaction() as tx:
        owner = get_meta(tx, "key-broker")
        if owner not in (None, (key_broker, consortium_id)):
            raise SetupError("this state belongs to another key broker or another consortium")
        pinned = get_meta(tx, "manifest")
        consortium = verify_chain(chain, consortium=consortium_id, pinned=pinned)
        newest = (consortium.manifest.number, consortium.digest)
        if newest != pinned:
            set_meta(tx, "key-broker", (key_broker, consortium_id))
            set_meta(tx, "manifest", newest)
            subject = f"manifest {newest[0]}"
            audit_log.append(tx, AuditEntry(key_broker=key_broker, event="manifest", at=now, subject=subject))
    return consortium
