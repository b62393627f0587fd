"""Which keys come out of the key brokers' seed shares: the attempt's seed, and the key of everything that is resumed.

No single party knows either: each key broker gives one share, bound to the terms, only to a worker whose evidence it
accepted. Torch-free, since the worker's parent process derives both and only hands the seed to the training child.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from casemate_schemas.errors import ParameterError
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
"""Length of every share, digest, seed and key here."""

MAX_SHARES: Final = 1024
"""Bound on the key brokers of one job."""


def derive_key(secret: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) from ``secret``, with no salt, for the one use that ``info`` names."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def attempt_seed(shares: Sequence[bytes], terms_digest: bytes, attempt: int, entropy: bytes) -> bytes:
    """The 32-byte seed of all randomness of one attempt (design section 5, "fork-safe privacy").

    ``HKDF(share_1 ‖ … ‖ share_n ‖ terms digest ‖ attempt as 8 bytes, big-endian ‖ entropy)``, info
    ``casemate/v1/attempt-seed``. All parts have fixed widths, so no two inputs give the same bytes. Fresh ``entropy``
    makes two attempts at the same terms draw different noise whatever the host replays.

    Args:
        shares: one 32-byte share of each key broker concerned, in the order of the key brokers' ids.
        terms_digest: the digest of the signed terms.
        attempt: number of the attempt, from 0 to 2^63 - 1.
        entropy: 32 bytes drawn in the enclave for this attempt alone.

    Raises:
        ParameterError: a part has the wrong length or range.
    """
    if not 0 <= attempt < 1 << 63:
        raise ParameterError("expected an attempt number from 0 to 2^63 - 1")
    secret = _joined(shares, terms_digest) + attempt.to_bytes(8, "big") + _exact(entropy, "enclave entropy")
    return derive_key(secret, b"casemate/v1/attempt-seed")


def resume_key(shares: Sequence[bytes], terms_digest: bytes) -> bytes:
    """The 32-byte key under which any attempt at the same terms seals what its successors may open.

    ``HKDF(share_1 ‖ … ‖ share_n ‖ terms digest)``, info ``casemate/v1/resume``: the same for every attempt.
    Arguments and errors are those of :func:`attempt_seed`.
    """
    return derive_key(_joined(shares, terms_digest), b"casemate/v1/resume")


def fresh_entropy() -> bytes:
    """32 bytes from the enclave's own random source, for one attempt."""
    return os.urandom(KEY_BYTES)


def _joined(shares: Sequence[bytes], terms_digest: bytes) -> bytes:
    if not 0 < len(shares) <= MAX_SHARES:
        raise ParameterError(f"expected 1 to {MAX_SHARES} seed shares, got {len(shares)}")
    return b"".join(_exact(share, "seed share") for share in shares) + _exact(terms_digest, "terms digest")


def _exact(part: bytes, name: str) -> bytes:
    if len(part) != KEY_BYTES:
        raise ParameterError(f"expected a {name} of {KEY_BYTES} bytes, got {len(part)}")
    return part
