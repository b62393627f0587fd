"""Casemate's client: train one model on the data of parties who do not trust each other, nor the machine.

``import casemate`` is light: neither torch nor NATS, and each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "casemate.client": ("Consortium", "FirstContactWarning", "connect"),
    "casemate.datasets": ("Dataset", "Datasets"),
    "casemate.identity": ("Identity", "load_keys", "new_person", "save_keys"),
    "casemate.jobs": ("Job",),
    "casemate.parameters": (
        "SGD",
        "Adam",
        "AllOf",
        "AnyOf",
        "Approvals",
        "AtLeast",
        "Audit",
        "Augmentation",
        "Averaging",
        "Before",
        "Column",
        "DatasetCard",
        "ForPurpose",
        "Licence",
        "LrSchedule",
        "MemberIs",
        "Metrics",
        "NoisePhase",
        "Permission",
        "Privacy",
        "RoleIs",
        "WithMeasurement",
        "WithModel",
    ),
    "casemate.results": ("Result",),
    "casemate.verification": ("Verification",),
}
_LOCATIONS = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {"errors": "casemate_schemas.errors", "rules": "casemate.rules", "sync": "casemate.sync"}

if TYPE_CHECKING:
    from casemate_schemas import errors

    from . import rules, sync
    from .client import Consortium, FirstContactWarning, connect
    from .datasets import Dataset, Datasets
    from .identity import Identity, load_keys, new_person, save_keys
    from .jobs import Job
    from .parameters import (
        SGD,
        Adam,
        AllOf,
        AnyOf,
        Approvals,
        AtLeast,
        Audit,
        Augmentation,
        Averaging,
        Before,
        Column,
        DatasetCard,
        ForPurpose,
        Licence,
        LrSchedule,
        MemberIs,
        Metrics,
        NoisePhase,
        Permission,
        Privacy,
        RoleIs,
        WithMeasurement,
        WithModel,
    )
    from .results import Result
    from .verification import Verification

__all__ = [
    "SGD",
    "Adam",
    "AllOf",
    "AnyOf",
    "Approvals",
    "AtLeast",
    "Audit",
    "Augmentation",
    "Averaging",
    "Before",
    "Column",
    "Consortium",
    "Dataset",
    "DatasetCard",
    "Datasets",
    "FirstContactWarning",
    "ForPurpose",
    "Identity",
    "Job",
    "Licence",
    "LrSchedule",
    "MemberIs",
    "Metrics",
    "NoisePhase",
    "Permission",
    "Privacy",
    "Result",
    "RoleIs",
    "Verification",
    "WithMeasurement",
    "WithModel",
    "connect",
    "errors",
    "load_keys",
    "new_person",
    "rules",
    "save_keys",
    "sync",
]


def __getattr__(name: str) -> Any:
    if (module := _MODULES.get(name)) is not None:
        value: Any = importlib.import_module(module)
    elif (home := _LOCATIONS.get(name)) is not None:
        value = getattr(importlib.import_module(home), name)
    else:
        raise AttributeError(f"module 'casemate' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
