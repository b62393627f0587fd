"""Five configurations that another system published, with the epsilon it claimed for each: what they cost, and what would hold.

BastionAI (github.com/mithril-security/bastionlab, commit c43efb79, under bastionai/): ``examples/`` and ``README.md`` have
the batches, epochs and epsilons; ``learning.rs`` and ``privacy_guard.rs`` how noise follows from them. See
docs/privacy-accounting.md.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
from casemate_privacy import GaussianSumEvent, TrainingEvent, epsilon
from casemate_schemas.job import SGD, Training
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from pydantic import ValidationError


@dataclass(frozen=True)
class Published:
    """``at_least`` was measured by telling neighbours apart; with ``needed`` noise the claim holds under Poisson sampling."""

    records: int
    batch: int
    epochs: int
    claimed: float
    at_least: float
    needed: float

    @property
    def delta(self) -> float:
        return 1 / (10 * self.records)

    @property
    def steps(self) -> int:
        return self.records // self.batch * self.epochs

    @property
    def noise_multiplier(self) -> float:
        """The classical Gaussian formula, for an epsilon of one step that divides by q and sqrt(T): amplification, it hopes."""
        rate = self.batch / self.records
        per_step = self.claimed / (rate * math.sqrt(self.epochs / rate))
        return math.sqrt(2 * math.log(1.25 / self.delta)) / per_step


PUBLISHED = {
    "DistilBERT notebook": Published(64, 2, 2, 6, 38, 0.50962),
    "quick start": Published(4459, 4, 2, 2, 86, 0.55481),
    "ResNet-50": Published(50_000, 4, 100, 6, 145, 0.463),
    "EfficientNet": Published(50_000, 64, 1, 6, 668, 0.44826),
    "DistilBERT script": Published(4459, 2, 1, 6, 2075, 0.38667),
}

each = pytest.mark.parametrize("found", PUBLISHED.values(), ids=PUBLISHED)


@each
def test_the_claims_are_wrong_and_ours_is_not(found):
    """A batch holds each record once an epoch at most. Who sees one epoch's noised sums tells neighbours apart this well."""
    one_epoch = epsilon(GaussianSumEvent(1.0, found.noise_multiplier), found.delta)
    ours = epsilon(GaussianSumEvent(1.0, found.noise_multiplier, found.epochs), found.delta)
    exact = get_epsilon_gaussian(found.noise_multiplier / math.sqrt(found.epochs), found.delta)
    assert one_epoch > found.at_least > 6 * found.claimed
    assert max(exact, one_epoch) <= ours < 1.06 * exact


@each
def test_drawing_each_batch_by_itself_would_not_have_saved_them(found):
    event = TrainingEvent(Fraction(found.batch, found.records), found.noise_multiplier, min(found.steps, 10**6))
    assert epsilon(event, found.delta) > 20 * found.claimed


@each
def test_no_terms_hold_such_noise(found):
    with pytest.raises(ValidationError, match="noise_multiplier"):
        Training(
            loss="cross_entropy",
            optimizer=SGD(lr=0.1),
            steps=min(found.steps, 10**6),
            clipping_norm=1.0,
            noise_multiplier=found.noise_multiplier,
        )


@each
def test_what_the_claim_would_have_needed(found):
    rate, steps = Fraction(found.batch, found.records), found.steps
    events = [TrainingEvent(rate, found.needed, min(steps - done, 10**6)) for done in range(0, steps, 10**6)]
    assert 0.99 * found.claimed < epsilon(events, found.delta) <= found.claimed
    assert found.needed > 3 * found.noise_multiplier
