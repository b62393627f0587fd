"""A convolutional network that nobody trains: the scattering transform, whose filters are known beforehand.

Oriented wavelets, the modulus, and averages over places, twice (Bruna and Mallat, "Invariant Scattering Convolution
Networks", 2013). It is a function of one image and of nothing else, so it costs no privacy; that it serves training under
differential privacy well is due to Tramèr and Boneh (2021), "Differentially Private Learning Needs Better Features".
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

SCALES: Final = 2
ORIENTATIONS: Final = 8
SIZE: Final = 32
STRIDE: Final = 1 << SCALES
CHANNELS: Final = 1 + SCALES * ORIENTATIONS + SCALES * (SCALES - 1) // 2 * ORIENTATIONS**2


def scattering(images: Tensor) -> Tensor:
    """Of images ``[n, 1, 28, 28]``, in [0, 1]: ``[n, 81, 8, 8]``, all at least zero."""
    wavelets = _wavelets()
    return torch.cat([_scattered(batch, wavelets) for batch in images.split(64)])


def _scattered(images: Tensor, wavelets: list[Tensor]) -> Tensor:
    """``wavelets`` holds, for each scale, the Fourier transforms of its filters, ``[orientations, SIZE, SIZE]``.

    What a filter of scale ``j`` leaves has no frequency that every ``2^j``-th place would not show.
    """
    padded = torch.nn.functional.pad(images, [2, 2, 2, 2])
    spectra, found = torch.fft.fft2(padded), [_blurred(padded)]
    for scale, filters in enumerate(wavelets):
        first = _moduli(spectra, filters, 2**scale)
        found.append(_blurred(first))
        for further, coarser in enumerate(wavelets[scale + 1 :], start=scale + 1):
            second = _moduli(torch.fft.fft2(first)[:, :, None], coarser, 2 ** (further - scale))
            found.append(_blurred(second.flatten(1, 2)))
    return torch.cat(found, dim=1)


def _moduli(spectra: Tensor, filters: Tensor, stride: int) -> Tensor:
    """Absolute values of what the filters leave, at every ``stride``-th place: frequencies fold onto each other."""
    passed = spectra * filters
    if stride > 1:
        kept = SIZE // stride
        passed = passed.unflatten(-1, (stride, kept)).unflatten(-3, (stride, kept)).mean(dim=(-4, -2))
    return torch.fft.ifft2(passed).abs()


def _blurred(places: Tensor) -> Tensor:
    """Gaussian averages about every ``STRIDE``-th place of the image, at whatever stride ``places`` have."""
    size = places.shape[-1]
    stride, width = SIZE // size, 0.8 * STRIDE
    offsets = torch.arange(SIZE // STRIDE)[:, None] * STRIDE - torch.arange(size) * stride
    offsets = (offsets + SIZE // 2) % SIZE - SIZE // 2
    weights = torch.exp(-(offsets**2) / (2 * width**2))
    weights /= weights.sum(dim=1, keepdim=True)
    return weights @ places @ weights.T


def _wavelets() -> list[Tensor]:
    """Morlet wavelets: at scale ``j`` of width ``0.8·2^j`` and frequency ``3π/4·2^-j``, half as wide across as along."""
    return [
        torch.stack(
            [_morlet(0.8 * 2**j, 0.75 * math.pi / 2**j, math.pi * k / ORIENTATIONS) for k in range(ORIENTATIONS)]
        )
        for j in range(SCALES)
    ]


def _morlet(width: float, frequency: float, angle: float) -> Tensor:
    """A wave under a Gaussian, less as much of the Gaussian as makes its sum zero."""
    y, x = _grid()
    along = x * math.cos(angle) + y * math.sin(angle)
    across = (y * math.cos(angle) - x * math.sin(angle)) * 4 / ORIENTATIONS
    envelope = torch.exp(-(along**2 + across**2) / (2 * width**2)).to(torch.complex128)
    wave = envelope * torch.exp(1j * frequency * along)
    wave = wave - envelope * (wave.sum() / envelope.sum())
    return _spectrum(wave / (2 * math.pi * width**2 * ORIENTATIONS / 4))


def _spectrum(filter_: Tensor) -> Tensor:
    return torch.fft.fft2(torch.fft.ifftshift(filter_)).to(torch.complex64)


def _grid() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
    return axis[:, None], axis[None, :]
