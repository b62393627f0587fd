"""What an enclave-hosted key broker claims about itself, and the chip's report that vouches for it.

The claims name the two keys that owners seal to, which were made inside of that enclave and never leave it. Their digest
in REPORT_DATA has a domain of its own, so no evidence of a worker is ever one of a key broker, nor the other way round.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from .codec import Digest, Name, UnixMs, WireModel, encode
from .evidence import NONCE_BYTES, SevSnp
from .keys import PublicSigningKey, SealingPublicKey
from .signatures import Signed

KEY_BROKER_REPORT_DATA_DOMAIN: Final = b"casemate/v1/key-broker-report-data\x00"

Nonce = Annotated[bytes, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class EvidenceRequest(WireModel):
    """A person asks a hosted key broker for evidence. Anyone may: there is nothing secret in it."""

    KIND: ClassVar[str] = "key-broker-evidence-request"

    nonce: Nonce


class KeyBrokerClaims(WireModel):
    """What the report vouches for: which key broker of which consortium, at which manifest, with which keys."""

    KIND: ClassVar[str] = "key-broker-claims"

    version: Literal[1] = 1
    consortium: Digest
    """Its state is bound to this consortium from the moment its keys are made."""
    manifest: Digest
    """The newest that it has accepted. Its keys may not stand in that one yet."""
    manifest_number: Annotated[int, Field(ge=1, lt=1 << 32)]
    key_broker: Name
    sealing_key: SealingPublicKey
    signing_key: PublicSigningKey
    nonce: Nonce

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that stand in the report: SHA-512 of domain and canonical claims."""
        return hashlib.sha512(KEY_BROKER_REPORT_DATA_DOMAIN + encode(self)).digest()


class KeyBrokerEvidence(WireModel):
    """Claims and the report over them.

    A plain SEV-SNP report only: where a paravisor stands between guest and chip, the launch measurement is the
    paravisor's, and the chip derives no key for the guest to seal its state with.
    """

    KIND: ClassVar[str] = "key-broker-evidence"

    claims: KeyBrokerClaims
    component: SevSnp


class HandOver(WireModel):
    """An owner's word that a hosted key broker's state may move to another enclave. Signed by a steward or admin.

    ``successor`` is that enclave's evidence, as the person verified it: of the same key broker, with keys of its own.
    """

    KIND: ClassVar[str] = "key-broker-hand-over"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    successor: KeyBrokerEvidence
    at: UnixMs


class HandOverOrder(WireModel):
    """The signed word, and the delegation of whoever signed it."""

    KIND: ClassVar[str] = "key-broker-hand-over-order"

    hand_over: Signed
    delegation: Signed
