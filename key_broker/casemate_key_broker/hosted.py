"""What is another's where the key broker runs in an enclave: the machine, the disk and the clock.

Its keys and seed secrets are made inside, at its first start, and live in its sealed state only. Nobody else ever has
them, so an owner can trust what the chip's report over them says, and needs to trust nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from casemate_attestation.guest import KeyedGuest, SimulatedGuest
from casemate_attestation.guest_sev import SevGuest
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import MalformedError, SetupError
from casemate_schemas.evidence import SevSnp
from casemate_schemas.key_broker_evidence import EvidenceRequest, KeyBrokerClaims, KeyBrokerEvidence
from casemate_schemas.keyring import KeyRing

from .clock import MonotoneClock
from .database import State, get_meta, set_meta
from .sealed_database import SealedDatabase
from .settings import Settings

STATE_KEY_CONTEXT: Final = b"key-broker-state"
_KEYS: Final = "own-keys"


def guest_of(settings: Settings) -> KeyedGuest | None:
    """The enclave's way to its chip; ``None`` where a member runs the key broker on a machine of its own."""
    if settings.simulated_chip_socket is not None:
        return SimulatedGuest(settings.simulated_chip_socket)
    return None if settings.guest is None else SevGuest()


def open_state(settings: Settings, guest: KeyedGuest, wall: Callable[[], int]) -> tuple[SealedDatabase, MonotoneClock]:
    """The sealed state, and time as it goes on from the newest in it. Raises as :class:`SealedDatabase`."""
    clock = MonotoneClock(wall)
    return SealedDatabase(settings.state_dir, guest.derive_key(STATE_KEY_CONTEXT), clock), clock


def own_keys(database: State) -> KeyRing:
    """Signing and sealing key, made here if there are none.

    The state must be bound to its consortium before: so there is none of the same keys in another consortium.
    """
    with database.transaction() as tx:
        if get_meta(tx, "key-broker") is None:
            raise SetupError("a hosted key broker makes its keys for one consortium, which must be known before")
        if (text := get_meta(tx, _KEYS)) is None:
            set_meta(tx, _KEYS, text := KeyRing.generate().to_text())
    return KeyRing.from_text(text)


def check_guest(settings: Settings, consortium: Consortium) -> None:
    """Raises :class:`SetupError` if one of manifest and guest is simulated, and not the other."""
    if settings.guest is not None and (settings.guest == "simulated") != consortium.manifest.simulation:
        raise SetupError("the manifest and the setting 'guest' disagree on whether this is a simulation")


def lists(consortium: Consortium, key_broker: str, keys: KeyRing) -> bool:
    """Whether the manifest lists these very keys for that key broker."""
    public = keys.signing.public, keys.sealing.public
    listed = consortium.manifest.key_brokers
    return any(broker.id == key_broker and (broker.signing_key, broker.sealing_key) == public for broker in listed)


class Attester:
    """Evidence of this key broker, for whoever asks: whether any manifest lists its keys yet or not."""

    def __init__(self, guest: KeyedGuest, key_broker: str, keys: KeyRing, consortium: Callable[[], Consortium]) -> None:
        """``consortium`` gives it at the newest manifest accepted."""
        self._guest = guest
        self._key_broker = key_broker
        self._keys = keys
        self._consortium = consortium

    def evidence(self, payload: bytes) -> bytes:
        """:class:`KeyBrokerEvidence` to an :class:`EvidenceRequest`, with a fresh report over its nonce and both keys.

        Raises :class:`MalformedError`, or what the chip refuses with.
        """
        nonce = decode(EvidenceRequest, payload).nonce
        consortium = self._consortium()
        claims = KeyBrokerClaims(
            consortium=consortium.id,
            manifest=consortium.digest,
            manifest_number=consortium.manifest.number,
            key_broker=self._key_broker,
            sealing_key=self._keys.sealing.public,
            signing_key=self._keys.signing.public,
            nonce=nonce,
        )
        component = self._guest.attest(claims.report_data)
        if not isinstance(component, SevSnp):
            raise MalformedError("the chip gave another kind of evidence than a report")
        return encode(KeyBrokerEvidence(claims=claims, component=component))
