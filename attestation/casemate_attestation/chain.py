"""Who signed whom: what the bytes of three certificates decide by themselves, and a memory for it.

Parsing, AMD's profiles, names, issuers and signatures depend on the certificates' bytes and on nothing else, so what was
found once holds for ever and may be remembered. Whether the root is one that a policy pins, whether the certificates are in
date, whether they were revoked and everything about a report depend on more, and are judged anew each time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from casemate_schemas.errors import ParameterError

from .certificates import (
    INTERMEDIATE_PREFIX,
    Certificate,
    VekFacts,
    authority_profile,
    parse_certificate,
    signed_by,
    vek_profile,
)
from .products import AMD_ROOTS, PRODUCTS, Product

CHAIN_LENGTH: Final = 3


@dataclass(frozen=True, slots=True)
class Chain:
    """The certificates of one report, leaf first: VEK (VCEK or VLEK), intermediate (ASK or ASVK), ARK."""

    vek: Certificate
    intermediate: Certificate
    ark: Certificate


@dataclass(frozen=True, slots=True)
class JudgedChain:
    """Three certificates of AMD's profiles, and what their bytes decide.

    ``product`` is the intermediate's, by its name; ``problem`` says what is wrong with names, issuers or signatures, and is
    None for a chain that holds. Nothing here says that the root is trusted.
    """

    chain: Chain
    vek: VekFacts
    ark_sha256: bytes
    product: Product | None
    problem: str | None


def parse_chain(certificates: Sequence[bytes]) -> Chain:
    """The three certificates. Raises :class:`MalformedError` for whatever is not DER of one X.509 certificate each."""
    vek, intermediate, ark = map(parse_certificate, certificates)
    return Chain(vek, intermediate, ark)


def judge_chain(chain: Chain) -> JudgedChain:
    """What ``chain`` decides by itself.

    Raises :class:`VerificationError` where a certificate departs from AMD's profile for its place.
    """
    vek = vek_profile(chain.vek)
    authority_profile(chain.intermediate, may_issue_crls=False)
    authority_profile(chain.ark, may_issue_crls=True)
    product = next((p for p in PRODUCTS if chain.intermediate.common_name == INTERMEDIATE_PREFIX[vek.kind] + p), None)
    digest = hashlib.sha256(chain.ark.der).digest()
    return JudgedChain(chain, vek, digest, product, _problem(chain, vek, product, is_amds=digest in AMD_ROOTS))


def _problem(chain: Chain, vek: VekFacts, product: Product | None, *, is_amds: bool) -> str | None:
    """What is wrong with names, issuers or signatures of the chain.

    The signature on an ARK of AMD's by itself is a fact about bytes that this program knows by heart: it was verified when
    their SHA-256 was written down, and a test verifies it again.
    """
    if product is None:
        return f"a {vek.kind} under {chain.intermediate.common_name!r}"
    if chain.ark.common_name != f"ARK-{product}":
        return f"root {chain.ark.common_name!r} over {chain.intermediate.common_name!r}"
    links = [(chain.vek, chain.intermediate), (chain.intermediate, chain.ark)]
    for subject, authority in links if is_amds else [*links, (chain.ark, chain.ark)]:
        if subject.issuer != authority.subject:
            return f"another issuer of {subject.common_name!r} than {authority.common_name!r}"
        if not signed_by(subject.tbs, subject.signature, authority):
            return f"a signature on {subject.common_name!r} that is not by {authority.common_name!r}"
    return None


class ChainCache:
    """Remembers chains that hold, by the SHA-256 of each certificate's exact bytes, so that they need not be judged again.

    Only evidence that passed every check of :func:`~casemate_attestation.verify.verify` puts its chain in: a failure is
    never remembered, and whoever has no genuine chip under a pinned root can neither fill it nor push others out. Bounded
    (the chain used longest ago goes first) and thread-safe.
    """

    def __init__(self, max_entries: int = 1024) -> None:
        if max_entries < 1:
            raise ParameterError(f"expected room for at least one chain, got {max_entries}")
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._chains: OrderedDict[tuple[bytes, ...], JudgedChain] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chains)

    def find(self, certificates: Sequence[bytes]) -> JudgedChain | None:
        """The chain of exactly these bytes, if it is remembered. It is then the one used last."""
        key = _digests(certificates)
        with self._lock:
            judged = self._chains.get(key)
            if judged is not None:
                self._chains.move_to_end(key)
        return judged

    def remember(self, judged: JudgedChain) -> None:
        """Keep ``judged``, as the one used last. Raises :class:`ParameterError` for a chain that does not hold."""
        if judged.problem is not None:
            raise ParameterError("expected a chain that holds: others are not remembered")
        chain = judged.chain
        key = _digests((chain.vek.der, chain.intermediate.der, chain.ark.der))
        with self._lock:
            self._chains[key] = judged
            while len(self._chains) > self._max_entries:
                self._chains.popitem(last=False)


def _digests(certificates: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(der).digest() for der in certificates)
