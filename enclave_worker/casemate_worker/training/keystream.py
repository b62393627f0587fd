"""Where randomness comes from: one AES-256-CTR keystream for each use, reachable at any step.

Byte for byte, so that another program can draw the same:

1. ``key = HKDF-SHA256(ikm = attempt seed (32 bytes), salt = none, info, length = 32)`` (RFC 5869), where ``info`` is

   - ``casemate/v1/training/sampling/<owner id>`` for one owner's sampling (the id in UTF-8),
   - ``casemate/v1/training/noise`` for the noise,
   - ``casemate/v1/training/augmentation`` for views of records (:mod:`.augmentation`),
   - ``casemate/v1/training/metrics`` for the seed of final metrics (:mod:`.metrics`), which takes the attempt seed's place in
     the derivation of their noise's key,
   - ``casemate/v1/training/audit`` for an audit's coins (:mod:`casemate_worker.privacy_audit`),
   - ``casemate/v1/training/initialisation`` and ``casemate/v1/training/dropout``, reserved.

2. The keystream of step ``t`` (from 0) is AES-256 in counter mode (NIST SP 800-38A) under ``key``, over zeros, its
   first counter block being ``t`` as 8 bytes, big-endian, followed by 8 zero bytes. A step has 2^64 blocks to itself,
   so no two steps overlap.
3. The words of a step are the keystream cut into 8-byte pieces, each read as an unsigned little-endian integer.

A step's draws depend on nothing drawn before, so a checkpoint's generator position is its step number. Nothing here
touches the generators of Python, NumPy or PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from casemate_schemas.errors import ParameterError
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from casemate_worker.key_schedule import KEY_BYTES, derive_key

NOISE: Final = "noise"
"""The label of the noise's keystream."""

AUGMENTATION: Final = "augmentation"
"""The label of the keystream that moves and mirrors views of records."""


def sampling_label(owner: str) -> str:
    """The label of the keystream that samples the records of ``owner``."""
    return f"sampling/{owner}"


class Keystream:
    """Uniform 64-bit words for one use, by step. Its repr tells nothing of the key."""

    def __init__(self, seed: bytes, label: str) -> None:
        """Derive the keystream for ``label`` from the attempt's 32-byte ``seed``; else :class:`ParameterError`."""
        if len(seed) != KEY_BYTES:
            raise ParameterError(f"expected a seed of {KEY_BYTES} bytes, got {len(seed)}")
        self._algorithm = AES256(derive_key(seed, f"casemate/v1/training/{label}".encode()))

    def words(self, step: int, count: int) -> NDArray[np.uint64]:
        """The first ``count`` words of ``step``, uniform on 0 … 2^64 - 1 and independent of each other."""
        return self.at(step).take(count)

    def at(self, step: int) -> Words:
        """The words of ``step`` from the first on, to be taken piece by piece."""
        first_block = step.to_bytes(8, "big") + bytes(8)
        return Words(Cipher(self._algorithm, CTR(first_block)).encryptor().update)


class Words:
    """Words of one step in their order."""

    def __init__(self, encrypt: Callable[[bytes], bytes]) -> None:
        """``encrypt`` goes on in the step's keystream."""
        self._encrypt = encrypt

    def take(self, count: int) -> NDArray[np.uint64]:
        """The next ``count``."""
        return np.frombuffer(self._encrypt(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)
