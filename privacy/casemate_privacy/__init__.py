"""The arithmetic of differential privacy: events, what they cost, which noise meets a target. No torch, no I/O.

Importing it does not import ``dp_accounting`` (a second of SciPy): functions that need it do.
"""

from .accounting import epsilon, epsilon_estimate, person_epsilon
from .calibration import noise_multiplier, sample_rate
from .events import TrainingEvent
from .owners import OwnersPlan, OwnerTarget, plan_job, plan_rates
from .renyi import CURVE_MAX, ORDERS, ZERO_CURVE, Curve, add_curves, check_curve, rdp_curve, rdp_epsilon
from .renyi_filter import RenyiFilter

__all__ = [
    "CURVE_MAX",
    "ORDERS",
    "ZERO_CURVE",
    "Curve",
    "OwnerTarget",
    "OwnersPlan",
    "RenyiFilter",
    "TrainingEvent",
    "add_curves",
    "check_curve",
    "epsilon",
    "epsilon_estimate",
    "noise_multiplier",
    "person_epsilon",
    "plan_job",
    "plan_rates",
    "rdp_curve",
    "rdp_epsilon",
    "sample_rate",
]
