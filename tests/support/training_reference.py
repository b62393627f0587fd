"""DP-SGD a second time, in NumPy, from the documents alone: nothing here comes from the engine.

HKDF is spelled out with HMAC, counter mode with single AES blocks, the sampler and Box–Muller in Python's own numbers,
per-sample gradients by hand in float64. Slow, and meant to be.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

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
    drawn = words(seed, "noise", step, count + count % 2)
    values = []
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((float(first) + 1) / 2**64))
        angle = 2 * math.pi * ((second >> 11) / 2**53)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(values[:count])


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
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 16)
    for step in range(steps):
        total = np.zeros(sum(w.size for w in weights))
        for owner in sorted(owners, key=lambda o: o.name):
            for i in sampled(seed, owner, step):
                pieces = gradient(weights, owner.features[i], owner.targets[i])
                row = np.concatenate([piece.ravel() for piece in pieces])
                total += row * min(1.0, clipping_norm / max(float(np.linalg.norm(row)), 1e-300))
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
