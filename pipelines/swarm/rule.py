"""When a swarm pays: its perplexity against one dense model's, forecast from what has been measured.

The gain of a swarm is that an expert's text is of one kind; its price is that an expert sees 1/k of the text. Both
change with training, so, of k experts, t training tokens per parameter, and I nats per token that the cluster of a text
says of its tokens (pipelines/swarm/forecast.py counts it),

    ln(perplexity of route / of dense) = ln k (p0 + p1 ln(t / 50) + p2 ln(k / 8))
        - I (g0 + g1 ln(t / 50) + g2 (seed share - 0.5) + g3 ln(parameters / 360,000))

The seven coefficients are no constants of this file: they are a Gaussian posterior (Bayesian linear regression, Bishop,
Pattern Recognition and Machine Learning, section 3.3), given MEASURED and PRIOR. What was never varied stays as wide as
the prior, so a forecast far from everything measured says so by its interval. One expert is the dense model: k = 1 and
I = 0 give a ratio of 1. Random clusters, whose I is near 0, show the price alone.

Shape letters: M measurements, C coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

# The benchmark's centre, so that p0 and g0 are its own.
CENTRE_TOKENS, CENTRE_EXPERTS, CENTRE_PARAMETERS, CENTRE_SHARE = 50.0, 8, 360_000.0, 0.5
# Mean and standard deviation of p0, p1, p2, g0, g1, g2, g3: before any measurement a swarm of a corpus such as the
# benchmark's (I = 0.5) may lie anywhere from half to one and a half of dense.
PRIOR = ((0.0, 0.05), (0.0, 0.03), (0.0, 0.02), (0.3, 0.5), (0.2, 0.2), (0.0, 0.4), (0.0, 0.1))
# Standard deviation of ln(ratio) about the formula: what another seed changes, and what the formula leaves out.
NOISE = 0.02
STANDARD_DEVIATIONS = 1.645  # on both sides hold nine of ten normal values


@dataclass(frozen=True)
class Setting:
    """What a forecast is made of."""

    tokens_per_parameter: float  # of the whole length: seed and all experts
    experts: int
    information: float  # nats per token, see pipelines/swarm/forecast.py
    seed_share: float = CENTRE_SHARE
    parameters: float = CENTRE_PARAMETERS


@dataclass(frozen=True)
class Measured:
    """A swarm that was trained: its setting, and its perplexity by that of dense."""

    setting: Setting
    ratio: float


# Sources, one seed each, on 2 cores, of 2026-11-21. The first three are a trial with true domains, of which the right
# expert answers; its first corpus had six domains, whose I was not counted: it is taken to be the same per ln k as that
# of the eight. The others are the centre of `ulm bench swarm`: its route, and the route of its random clusters. That
# benchmark prints what is to stand here.
MEASURED = (
    Measured(Setting(1.2, 6, 0.44, parameters=4.20e6), 1.059),
    Measured(Setting(10.4, 8, 0.511, parameters=1.89e6), 0.885),
    Measured(Setting(55.0, 8, 0.511, parameters=0.36e6), 0.751),
    Measured(Setting(50.0, 8, 0.492), 0.788),
    Measured(Setting(50.0, 8, 0.009), 1.153),
)


@dataclass(frozen=True)
class Forecast:
    """A ratio to dense, and the interval that holds nine of ten."""

    ratio: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out that both are equal."""
        return self.high < 1 or self.low > 1


@dataclass(frozen=True)
class Rule:
    """The coefficients' posterior."""

    mean_C: NDArray[np.float64]
    covariance_CC: NDArray[np.float64]

    @classmethod
    def fit(cls, measured: Sequence[Measured] = MEASURED) -> Self:
        """The rule that these measurements give; with none it is the prior."""
        prior_C, deviation_C = np.array(PRIOR).T
        x_MC = np.array([_features(m.setting) for m in measured]).reshape(-1, len(prior_C))
        y_M = np.log([m.ratio for m in measured])
        covariance_CC = np.linalg.inv(np.diag(deviation_C**-2) + x_MC.T @ x_MC / NOISE**2)
        return cls(covariance_CC @ (prior_C / deviation_C**2 + x_MC.T @ y_M / NOISE**2), covariance_CC)

    def forecast(self, setting: Setting) -> Forecast:
        """What a swarm of this setting would come to."""
        x_C = _features(setting)
        log_ratio = float(x_C @ self.mean_C)
        # A swarm of one is the dense model: no noise there, and all of it from two experts on.
        noise = NOISE if setting.experts > 1 else 0.0
        wide = STANDARD_DEVIATIONS * math.sqrt(float(x_C @ self.covariance_CC @ x_C) + noise**2)
        return Forecast(*(math.exp(log_ratio + by) for by in (0.0, -wide, wide)))

    def pays_from(self, setting: Setting) -> float | None:
        """Tokens per parameter from which the swarm is ahead; None where more tokens do not help it."""
        at_centre = float(_features(replace(setting, tokens_per_parameter=CENTRE_TOKENS)) @ self.mean_C)
        later = replace(setting, tokens_per_parameter=CENTRE_TOKENS * math.e)
        slope = float(_features(later) @ self.mean_C) - at_centre
        if slope >= 0:
            return None
        power = -at_centre / slope
        return CENTRE_TOKENS * math.exp(power) if power < MOST_POWER else None


MOST_POWER = 30.0  # of e: so many tokens nobody has


def _features(setting: Setting) -> NDArray[np.float64]:
    """The factors of the coefficients p0, p1, p2, g0, g1, g2, g3."""
    choices, gain = math.log(setting.experts), -setting.information
    length = math.log(setting.tokens_per_parameter / CENTRE_TOKENS)
    number = math.log(setting.experts / CENTRE_EXPERTS)
    share, size = setting.seed_share - CENTRE_SHARE, math.log(setting.parameters / CENTRE_PARAMETERS)
    price = [choices, choices * length, choices * number]
    return np.array([*price, gain, gain * length, gain * share, gain * size])
