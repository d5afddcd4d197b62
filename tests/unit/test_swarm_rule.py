"""The rule that says when a swarm pays: what is measured decides, and what is not stays uncertain."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.swarm.rule import LONGEST, MEASURED, PRIOR, SHORTEST, Measured, Rule, Setting, _features

CENTRE = Setting(50.0, 8, 0.49)
EXACT = 1e-9  # float64, a handful of sums
PLANTED = np.array([0.5, -0.3, 0.2, 0.7, 0.05, -0.2, 0.05])


def planted(settings: list[Setting]) -> list[Measured]:
    """What would be measured if the formula with the planted coefficients were the truth."""
    return [Measured(setting, float(np.exp(_features(setting) @ PLANTED))) for setting in settings]


def varied() -> list[Setting]:
    """Settings in which each factor varies for itself, often enough that the prior no longer matters."""
    generator = np.random.default_rng(0)
    settings = []
    for _ in range(3_000):
        tokens, size = float(np.exp(generator.uniform(0, 5))), float(np.exp(generator.uniform(11, 17)))
        experts, share = int(generator.integers(2, 33)), float(generator.uniform(0.1, 0.9))
        settings.append(Setting(tokens, experts, float(generator.uniform(0, 1)), share, size))
    return settings


@pytest.mark.parametrize("tokens", [0.1, 50.0, 1e4])
def test_one_expert_is_the_dense_model_however_long_it_is_trained(tokens):
    ahead = Rule.fit().forecast(Setting(tokens, 1, 0.0))
    assert (ahead.ratio, ahead.low, ahead.high) == (1.0, 1.0, 1.0)


def test_the_fit_finds_the_coefficients_that_many_measurements_were_made_with():
    found = Rule.fit(planted(varied())).mean_C
    tolerance = 0.01  # the prior still weighs as much as one measurement in some thousand
    assert np.abs(found - PLANTED).max() < tolerance


def test_without_measurements_the_rule_is_the_prior():
    rule = Rule.fit([])
    means, deviations = np.array(PRIOR).T
    np.testing.assert_allclose(rule.mean_C, means, atol=EXACT)
    np.testing.assert_allclose(np.sqrt(np.diag(rule.covariance_CC)), deviations, atol=EXACT)
    assert not rule.forecast(CENTRE).is_sure


@pytest.mark.parametrize("measured", MEASURED)
def test_what_was_measured_lies_in_the_interval_of_its_forecast(measured):
    ahead = Rule.fit().forecast(measured.setting)
    assert ahead.low < measured.ratio < ahead.high


def test_random_clusters_are_forecast_to_be_worse_than_dense_and_real_ones_better():
    rule = Rule.fit()
    assert rule.forecast(replace(CENTRE, information=0.0)).low > 1
    assert rule.forecast(CENTRE).high < 1


def test_far_from_everything_measured_the_interval_is_wider():
    rule = Rule.fit()

    def width(setting: Setting) -> float:
        ahead = rule.forecast(setting)
        return ahead.high / ahead.low

    far = (
        replace(CENTRE, tokens_per_parameter=2_000.0),
        replace(CENTRE, parameters=1e9),
        replace(CENTRE, experts=64),
    )
    assert all(width(setting) > 1.2 * width(CENTRE) for setting in far)
    assert width(replace(CENTRE, seed_share=0.9)) > width(replace(CENTRE, seed_share=0.25)) > width(CENTRE)


def test_where_a_swarm_begins_to_pay_its_forecast_is_dense():
    rule, alike = Rule.fit(), replace(CENTRE, information=0.3)
    start = rule.pays_from(alike)
    assert SHORTEST < start < LONGEST
    assert rule.forecast(replace(alike, tokens_per_parameter=start)).ratio == pytest.approx(1.0, rel=EXACT)
    assert rule.forecast(replace(alike, tokens_per_parameter=2 * start)).ratio < 1
    assert rule.forecast(replace(alike, tokens_per_parameter=start / 2)).ratio > 1


def test_clusters_that_say_much_pay_from_the_shortest_training_that_was_measured():
    assert Rule.fit().pays_from(replace(CENTRE, information=0.8)) == SHORTEST


def test_clusters_that_are_all_alike_never_pay():
    assert Rule.fit(planted(varied())).pays_from(replace(CENTRE, information=0.0)) is None
