"""DP-SGD a second time, in NumPy, from the documents alone: nothing here comes from the engine.

HKDF is spelled out with HMAC, counter mode with single AES blocks, the sampler and Box–Muller in Python's own numbers,
per-sample gradients by hand in float64. Slow, and meant to be.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import mpmath
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Weights = list[np.ndarray]
Gradient = Callable[[Weights, np.ndarray, float], Weights]
"""Weights, one record's features and its target to that record's gradient."""


@dataclass
class Owner:
    name: str
    features: np.ndarray
    targets: np.ndarray
    rate: Fraction


def hkdf_sha256(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with no salt, one block of output."""
    pseudorandom_key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(pseudorandom_key, info + b"\x01", hashlib.sha256).digest()


def words(seed: bytes, label: str, step: int, count: int) -> list[int]:
    """``count`` 64-bit words of the keystream ``label`` at ``step``."""
    key = hkdf_sha256(seed, b"casemate/v1/training/" + label.encode())
    block_cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - counter mode is built from it
    blocks = (step.to_bytes(8, "big") + counter.to_bytes(8, "big") for counter in range((count + 1) // 2))
    stream = b"".join(block_cipher.update(block) for block in blocks)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def sampled(seed: bytes, owner: Owner, step: int) -> list[int]:
    """Indices of the owner's records in the step's batch."""
    threshold = math.floor(owner.rate * 2**64)
    drawn = words(seed, f"sampling/{owner.name}", step, len(owner.features))
    return [i for i, word in enumerate(drawn) if word < threshold]


def normals(seed: bytes, step: int, count: int) -> np.ndarray:
    """Standard normals of the step's noise."""
    even = count + count % 2
    drawn = words(seed, "noise", step, even + 64)
    return np.array(normals_of(drawn[:even], drawn[even:])[:count])


def normals_of(drawn: list[int], further: list[int]) -> list[float]:
    """Those of ``drawn`` words, a pair each; whose first is near an end takes the next of the ``further`` ones as well."""
    left = iter(further)
    values = []
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        uniform = (float(first) + 1) / 2**64
        rare = first < 2**44 or first >= 2**64 - 2**44
        whole = (first << 64) + next(left) + 1 if rare else 0
        with mpmath.workprec(300):
            logarithm = float(mpmath.log(mpmath.mpf(whole) / 2**128)) if rare else math.log(uniform)
        radius = math.sqrt(-2 * logarithm)
        angle = 2 * math.pi * ((second >> 11) / 2**53)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values


def discrete_normals(seed: bytes, step: int, count: int, strip_bits: int = 26) -> list[int]:
    """The integers of the step's exact noise, of deviation ``2**(strip_bits + 5)``, for up to 2^16 coordinates."""
    stream = iter(words(seed, "noise", step, 16 * count + 1000))

    def uniform_is_below(bound: Fraction) -> bool:
        drawn = Fraction(next(stream), 2**64)
        if math.floor(bound * 2**64) != drawn * 2**64:
            return drawn < bound
        rest = (bound - drawn) * 2**64
        return rest > 0 and uniform_is_below(rest)

    found: dict[int, int] = {}
    while len(found) < count:
        missing = [place for place in range(count) if place not in found]
        strips = [_strip(next(stream), stream) for _ in missing]
        placed = [next(stream) for _ in missing]
        exponents = []
        for strip, word in zip(strips, placed, strict=True):
            value, start = (strip << strip_bits) + word % (1 << strip_bits), strip << strip_bits
            exponents.append(Fraction(value**2 - start**2, 2 ** (2 * strip_bits + 11)))
        turn, undecided, stays = 1, list(range(len(missing))), set()
        while undecided:
            below = [i for i in undecided if uniform_is_below(exponents[i] / turn)]
            stays |= (set(undecided) - set(below)) if turn % 2 else set()
            undecided, turn = below, turn + 1
        for i in sorted(stays):
            magnitude = (strips[i] << strip_bits) + placed[i] % (1 << strip_bits)
            if magnitude or placed[i] < 2**63:
                found[missing[i]] = -magnitude if placed[i] >= 2**63 else magnitude
    return [found[place] for place in range(count)]


def _strip(word: int, stream: Iterator[int]) -> int:
    thresholds = _thresholds()
    if all(threshold >> 448 != word for threshold in thresholds):
        return sum(threshold >> 448 < word for threshold in thresholds)
    for _ in range(7):
        word = (word << 64) + next(stream)
    return sum(threshold <= word for threshold in thresholds)


@cache
def _thresholds() -> list[int]:
    """Between strips, as 512-bit numbers."""
    with mpmath.workprec(2000):
        weights = [mpmath.exp(-(mpmath.mpf(i) ** 2) / 2048) for i in range(1024)]
        total = mpmath.fsum(weights)
        return [int(mpmath.floor(mpmath.fsum(weights[: i + 1]) / total * 2**512)) for i in range(1023)]


def norm_left_by_float32_sums(clipping_norm: float, expected_batch: float) -> float:
    """What records are clipped to where the engine sums in float32: docs/dp-engine.md, "What is certified"."""
    most = math.ceil(expected_batch + 6 * math.sqrt(expected_batch)) + 16
    shares = [2 * (size + 18) * most / 2**24 * (1 + 2**-10) for size in (64, 32, 16, 8)]
    return clipping_norm * (1 - next((share for share in shares if share <= 2**-8), 0.0))


def train(
    weights: Weights,
    gradient: Gradient,
    owners: list[Owner],
    seed: bytes,
    *,
    steps: int,
    clipping_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    lr: float,
    momentum: float,
) -> Weights:
    """The weights after ``steps`` steps of DP-SGD from ``weights``."""
    weights = [w.astype(np.float64) for w in weights]
    velocity = [np.zeros_like(w) for w in weights]
    deviation = noise_multiplier * clipping_norm
    left = norm_left_by_float32_sums(clipping_norm, expected_batch)
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 12)
    for step in range(steps):
        total = np.zeros(sum(w.size for w in weights))
        for owner in sorted(owners, key=lambda o: o.name):
            for i in sampled(seed, owner, step):
                pieces = gradient(weights, owner.features[i], owner.targets[i])
                row = np.concatenate([piece.ravel() for piece in pieces])
                total += row * min(1.0, left / max(float(np.linalg.norm(row)), 1e-300))
        noisy = np.rint((total + deviation * normals(seed, step, total.size)) / grid) * grid / expected_batch
        start = 0
        for w, v in zip(weights, velocity, strict=True):
            v *= momentum
            v += noisy[start : start + w.size].reshape(w.shape)
            w -= lr * v
            start += w.size
    return weights


def _softmax_error(logits: np.ndarray, target: float) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    error: np.ndarray = exponentials / exponentials.sum()
    error[int(target)] -= 1.0
    return error


def softmax_gradient(weights: Weights, x: np.ndarray, target: float) -> Weights:
    """Cross entropy of a linear model: weight ``[k, d]``, bias ``[k]``."""
    error = _softmax_error(weights[0] @ x + weights[1], target)
    return [np.outer(error, x), error]


def logistic_gradient(weights: Weights, x: np.ndarray, target: float) -> Weights:
    """Binary cross entropy of a linear model: weight ``[1, d]``, bias ``[1]``."""
    error = 1.0 / (1.0 + np.exp(-(weights[0] @ x + weights[1]))) - target
    return [np.outer(error, x), error]


def mlp_gradient(weights: Weights, x: np.ndarray, target: float) -> Weights:
    """Mean squared error of tanh network: weight and bias of a hidden layer, then of one output."""
    hidden = np.tanh(weights[0] @ x + weights[1])
    error = 2.0 * (weights[2] @ hidden + weights[3] - target)
    back = (weights[2].T @ error) * (1.0 - hidden**2)
    return [np.outer(back, x), back, np.outer(error, hidden), error]
