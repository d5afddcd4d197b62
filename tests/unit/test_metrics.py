"""What ulm/metrics.py declares can be made: Ray would say otherwise only where a metric is first used."""

from __future__ import annotations

import pytest

from ulm.metrics import METRICS, Metric


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_declared_metric_is_one_that_ray_takes(metric: Metric) -> None:
    assert (metric.name + metric.help + "".join(metric.tags)).isascii()
    assert metric.name.startswith("ulm_") and (metric.name.endswith("_total") == (metric.kind == "counter"))
    assert bool(metric.buckets) == (metric.kind == "histogram")
