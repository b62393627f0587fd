"""The arithmetic of differential privacy: events, what they cost, which noise meets a target. No torch, no I/O.

Importing it does not import ``dp_accounting`` (a second of SciPy): functions that need it do.
"""

from .accounting import epsilon, epsilon_estimate, person_epsilon
from .calibration import noise_multiplier, sample_rate
from .events import GaussianSumEvent, PrivacyEvent, ScheduledEvent, TrainingEvent
from .lifetime import LifetimeLoss
from .owners import Choice, OwnersPlan, OwnerTarget, plan_job, plan_rates, weigh_choices
from .renyi import CURVE_MAX, ORDERS, ZERO_CURVE, Curve, add_curves, check_curve, rdp_curve, rdp_epsilon
from .renyi_filter import RenyiFilter

__all__ = [
    "CURVE_MAX",
    "ORDERS",
    "ZERO_CURVE",
    "Choice",
    "Curve",
    "GaussianSumEvent",
    "LifetimeLoss",
    "OwnerTarget",
    "OwnersPlan",
    "PrivacyEvent",
    "RenyiFilter",
    "ScheduledEvent",
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
    "weigh_choices",
]
