"""When a swarm pays: its perplexity against one dense model's, forecast from what has been measured.

The gain of a swarm is that an expert's text is of one kind; its price is that an expert sees 1/k of the text, which
training makes up for. So, of k experts, t training tokens per parameter, s = 1 / (1 + t / 10), and I nats per token
that the cluster of a text says of its tokens (pipelines/swarm/forecast.py counts it),

    ln(perplexity of route / of dense) = s ln k (p0 + p1 s + p2 ln(k / 8))
        - I (g0 + g1 ln(t / 50) + g2 (seed share - 0.5) + g3 ln(parameters / 360,000))

The seven coefficients are no constants of this file: they are a Gaussian posterior (Bayesian linear regression, Bishop,
Pattern Recognition and Machine Learning, section 3.3), given MEASURED and PRIOR. What was never varied stays as wide as
the prior, so a forecast far from everything measured says so by its interval. One expert is the dense model: k = 1 and
I = 0 give a ratio of 1. Random clusters, whose I is near 0, show the price alone: it is highest at some 5 tokens per
parameter, where a model learns most from each, and falls after. The gain hardly depends on t. (A price that falls with
ln t missed by twice as much: docs/experiments.md.)

Shape letters: M measurements, C coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

PRICE_TOKENS = 10.0  # per parameter, at which s is a half
# The benchmark's centre, so that g0 is its own.
CENTRE_TOKENS, CENTRE_EXPERTS, CENTRE_PARAMETERS, CENTRE_SHARE = 50.0, 8, 360_000.0, 0.5
# Mean and standard deviation of p0, p1, p2, g0, g1, g2, g3: before any measurement a swarm of a corpus such as the
# benchmark's (I = 0.5) may lie anywhere from half to one and a half of dense.
PRIOR = ((0.3, 0.5), (0.0, 0.5), (0.0, 0.3), (0.5, 0.5), (0.0, 0.1), (0.0, 0.4), (0.0, 0.1))
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


# Sources: of 2026-11-22, `ulm bench swarm --full`, 2 cores, which prints what is to stand here: route, and the route of
# random clusters, where a setting has both. Before it two of a trial with true domains, of which the right expert
# answers (its third, at 1.2 tokens per parameter, is left out: the learning rate was not tuned for so short a training,
# and that alone has moved a ratio by 0.07).
MEASURED = (
    Measured(Setting(10.4, 8, 0.511, parameters=1.89e6), 0.885),
    Measured(Setting(55.0, 8, 0.511, parameters=0.36e6), 0.751),
    Measured(Setting(1.002, 8, 0.509), 0.989),
    Measured(Setting(1.002, 8, 0.009), 1.518),
    Measured(Setting(5.001, 8, 0.509), 0.973),
    Measured(Setting(5.001, 8, 0.009), 1.612),
    Measured(Setting(20.0, 8, 0.509), 0.858),
    Measured(Setting(20.0, 8, 0.009), 1.334),
    Measured(Setting(50.0, 4, 0.334), 0.794),
    Measured(Setting(50.0, 8, 0.509, seed_share=0.25), 0.738),
    Measured(Setting(50.0, 8, 0.509), 0.732),
    Measured(Setting(50.0, 8, 0.009), 1.186),
    Measured(Setting(50.0, 8, 0.509), 0.748),
    Measured(Setting(50.0, 8, 0.009), 1.229),
    Measured(Setting(50.0, 16, 0.545), 0.822),
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
        noise = NOISE * (1 + _beyond(setting)) if setting.experts > 1 else 0.0
        wide = STANDARD_DEVIATIONS * math.sqrt(float(x_C @ self.covariance_CC @ x_C) + noise**2)
        return Forecast(*(math.exp(log_ratio + by) for by in (0.0, -wide, wide)))

    def pays_from(self, setting: Setting) -> float | None:
        """Tokens per parameter from which on the swarm is ahead, at least SHORTEST; None where it is not at LONGEST."""

        def is_ahead(tokens: float) -> bool:
            return float(_features(replace(setting, tokens_per_parameter=tokens)) @ self.mean_C) < 0

        lengths: list[float] = np.geomspace(SHORTEST, LONGEST, NUM_LENGTHS).tolist()
        behind = [number for number, tokens in enumerate(lengths) if not is_ahead(tokens)]
        if not behind:
            return SHORTEST
        if behind[-1] == NUM_LENGTHS - 1:
            return None
        low, high = lengths[behind[-1]], lengths[behind[-1] + 1]
        while high / low > 1 + PRECISION:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if is_ahead(middle) else (middle, high)
        return high


# Between these, tokens per parameter are looked at: the shortest measured, and ten times the longest.
SHORTEST, LONGEST, NUM_LENGTHS, PRECISION = 1.0, 500.0, 200, 1e-12


def _beyond(setting: Setting) -> float:
    """How far, in ln t, a training is shorter or longer than any measured: there the formula itself is a guess."""
    lengths = [measured.setting.tokens_per_parameter for measured in MEASURED]
    t = setting.tokens_per_parameter
    return max(0.0, math.log(min(lengths) / t), math.log(t / max(lengths)))


def _features(setting: Setting) -> NDArray[np.float64]:
    """The factors of the coefficients p0, p1, p2, g0, g1, g2, g3."""
    choices, gain = math.log(setting.experts), -setting.information
    length = math.log(setting.tokens_per_parameter / CENTRE_TOKENS)
    number = math.log(setting.experts / CENTRE_EXPERTS)
    share, size = setting.seed_share - CENTRE_SHARE, math.log(setting.parameters / CENTRE_PARAMETERS)
    short = 1 / (1 + setting.tokens_per_parameter / PRICE_TOKENS)
    price = [choices * short, choices * short**2, choices * short * number]
    return np.array([*price, gain, gain * length, gain * share, gain * size])
