"""Real clinical records that ship with scikit-learn, as three hospitals would declare and seal them.

Wisconsin Diagnostic Breast Cancer (Street, Wolberg and Mangasarian 1993; UCI Machine Learning Repository): 569 fine
needle aspirates, thirty measurements of cell nuclei each, benign or malignant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from casemate_schemas.errors import MissingExtraError

from casemate.parameters import Column, DatasetCard

Array = np.ndarray[Any, np.dtype[Any]]

HOSPITALS: Final = ("north", "south", "east")
DATASET: Final = "cells"
TARGET: Final = "benign"
ROW_BOUND: Final = 160
HELD_OUT: Final = 0.2

# What a laboratory would declare before it looks at a single record: round limits of the instrument for the mean of a
# measurement, its standard error, and its worst value. Values outside are clamped.
BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "mean radius": (5, 30),
    "mean texture": (5, 40),
    "mean perimeter": (40, 200),
    "mean area": (0, 2500),
    "mean smoothness": (0.05, 0.2),
    "mean compactness": (0, 0.4),
    "mean concavity": (0, 0.5),
    "mean concave points": (0, 0.25),
    "mean symmetry": (0.1, 0.4),
    "mean fractal dimension": (0.04, 0.1),
    "radius error": (0, 3),
    "texture error": (0, 5),
    "perimeter error": (0, 25),
    "area error": (0, 500),
    "smoothness error": (0, 0.04),
    "compactness error": (0, 0.15),
    "concavity error": (0, 0.4),
    "concave points error": (0, 0.06),
    "symmetry error": (0, 0.08),
    "fractal dimension error": (0, 0.03),
    "worst radius": (5, 40),
    "worst texture": (5, 50),
    "worst perimeter": (40, 250),
    "worst area": (0, 4000),
    "worst smoothness": (0.05, 0.25),
    "worst compactness": (0, 1.2),
    "worst concavity": (0, 1.5),
    "worst concave points": (0, 0.3),
    "worst symmetry": (0.1, 0.7),
    "worst fractal dimension": (0.04, 0.2),
}


@dataclass(frozen=True)
class Records:
    """Features ``[n, 30]`` in the order of :data:`BOUNDS`, and 1 for benign, 0 for malignant."""

    features: Array
    benign: Array

    def columns(self) -> dict[str, Array]:
        """As a hospital pushes them: one array a column."""
        named = {name: self.features[:, index] for index, name in enumerate(BOUNDS)}
        return {**named, TARGET: self.benign.astype(np.float64)}

    def scaled(self) -> Array:
        """Features in [-1, 1] by the declared bounds, as the pipeline makes them: float32 ``[n, 30]``."""
        lower, upper = np.array(list(BOUNDS.values())).T
        clamped = np.clip(self.features, lower, upper)
        scaled: Array = (2 * (clamped - lower) / (upper - lower) - 1).astype(np.float32)
        return scaled


def load(seed: int) -> tuple[dict[str, Records], Records]:
    """Each hospital's records, and the fifth that is held out, by a permutation that ``seed`` alone decides.

    Raises :class:`MissingExtraError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise MissingExtraError("the demo needs scikit-learn: pip install 'casemate[demo]'") from error
    data = load_breast_cancer()
    order = np.random.default_rng(seed).permutation(len(data.target))
    columns = [list(data.feature_names).index(name) for name in BOUNDS]
    features, benign = data.data[order][:, columns], data.target[order]
    held_out = round(len(order) * HELD_OUT)
    test = Records(features[:held_out], benign[:held_out])
    parts = np.array_split(np.arange(held_out, len(order)), len(HOSPITALS))
    return {name: Records(features[p], benign[p]) for name, p in zip(HOSPITALS, parts, strict=True)}, test


def card(owner: str) -> DatasetCard:
    """What a hospital declares about its records."""
    measured = [
        Column(name=name, dtype="float64", lower=float(lower), upper=float(upper))
        for name, (lower, upper) in BOUNDS.items()
    ]
    outcome = Column(name=TARGET, dtype="float64", lower=0.0, upper=1.0, description="1 benign, 0 malignant")
    return DatasetCard(
        name=DATASET,
        owner=owner,
        columns=(*measured, outcome),
        row_bound=ROW_BOUND,
        description="cell nuclei in fine needle aspirates of breast masses",
    )
