from __future__ import annotations

import math

import pytest

import ulm
from ulm import registry


def rates(kind, num_steps, **fields):
    config = registry.configure("schedule", {"kind": kind, **fields})
    schedule = registry.find("schedule", kind)
    return [schedule.share(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ulm.kinds("schedule"))
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_every_schedule_warms_up_and_stays_between_zero_and_the_peak(kind, num_steps):
    shares = rates(kind, num_steps, warmup_steps=5)
    assert all(0 < share <= 1 for share in shares)
    assert shares[: min(5, num_steps)] == [(step + 1) / min(5, num_steps) for step in range(min(5, num_steps))]


def test_cosine_is_half_way_at_half_time_and_nears_its_final_share():
    shares = rates("cosine", 1_000, warmup_steps=0, final_share=0.1)
    assert shares[0] == 1.0
    assert math.isclose(shares[500], 0.55)
    assert 0.1 <= shares[-1] < 0.1001


def test_wsd_holds_the_peak_and_then_falls_in_a_straight_line():
    shares = rates("wsd", 100, warmup_steps=10, decay_share=0.3, final_share=0.1)
    assert shares[9:70] == [1.0] * 61
    falls = [a - b for a, b in zip(shares[70:], shares[71:], strict=False)]
    assert max(falls) - min(falls) < 1e-12
    assert math.isclose(shares[-1], 0.1)
    assert rates("wsd", 20, warmup_steps=2, decay_share=0.0)[2:] == [1.0] * 18
