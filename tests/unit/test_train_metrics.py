from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.train import events, worker_job
from pipelines.train.figures import StepFigures
from pipelines.train.worker_job import EXPORT_EVERY_S, Exporter

FIGURES = StepFigures(
    step=1,
    loss=2.0,
    tokens=512,
    step_tokens=512,
    tokens_per_second=1e4,
    batch_digest="ab",
    lr=1e-3,
    grad_norm=0.5,
    data_wait_s=0.001,
    mfu=0.3,
    memory_bytes=1,
)


class Recorded:
    """Ray's gauges and counters as they are called: what was set, what was added up, by name and kind of event."""

    values: dict[str, list[float]] = defaultdict(list)

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name, self._tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys)
        Recorded.values[self._name].append(value)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys) and value > 0  # Ray raises
        Recorded.values[self._name + tags.get("kind", "")].append(value)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=1_000.0)
    monkeypatch.setattr(worker_job, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(worker_job, "Gauge", Recorded)
    monkeypatch.setattr(worker_job, "Counter", Recorded)
    Recorded.values = defaultdict(list)
    return clock


def test_metrics_are_set_once_a_second_and_counters_are_exact_at_the_end(tmp_path: Path, clock: SimpleNamespace):
    task: Any = SimpleNamespace(run="a", folder=tmp_path, spec=SimpleNamespace(d_model=96, num_layers=3))
    events.say(tmp_path, 0, "start", "of an earlier time")
    with Exporter().of(task) as on_step:
        for step in range(1, 501):  # five seconds of steps of ten milliseconds
            clock.now_s += 0.01
            if step == 300:
                events.say(tmp_path, step, "rollback", "x")
            on_step(replace(FIGURES, step=step, val_loss=3.0 if step == 250 else None))
    values = Recorded.values
    assert len(values["ulm_train_loss"]) <= 5 / EXPORT_EVERY_S + 2
    assert values["ulm_train_step"][-1] == 500 and values["ulm_train_val_loss"][-1] == 3.0
    assert sum(values["ulm_train_tokens"]) == 500 * 512
    assert sum(values["ulm_train_data_wait_seconds"]) == pytest.approx(0.5)
    assert values["ulm_train_eventsstart"] == [1] and values["ulm_train_eventsrollback"] == [1]


def test_a_task_without_a_step_exports_nothing(tmp_path: Path, clock: SimpleNamespace):
    task: Any = SimpleNamespace(run="a", folder=tmp_path, spec=SimpleNamespace(d_model=96, num_layers=3))
    with Exporter().of(task):
        pass
    assert not Recorded.values
