"""Training by Ray Train on a real local cluster: it changes who computes, never what is computed."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines.train import job
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.stopping import request_stop
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.processes import training_workers
from tests.written_corpus import written_corpus
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ClusterError, ConfigError, TrainingError
from ulm.metrics import METRICS
from ulm.recipes.base import validate
from ulm.recipes.train import Resources, TrainRecipe

TEXTS = [f"{i} green bottles hang on the wall, {i * i} if one counts the squares.\n" * (1 + i % 3) for i in range(80)]
ONE_CPU = Resources(cpus_per_worker=1)  # as many threads as the tests' own process has, so sums have one order
# Two workers add gradients in another order than one; eight updates enlarge the last bits of float32.
SUM_ORDER = 2e-4

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 300},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def task(root: Path) -> Callable[..., TrainTask]:
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    fields = {"steps": 8, "batch_tokens": 512, "context_tokens": 64, "precision": "float32", "compile": False}
    whole = resolve(validate(TrainRecipe, {"name": "a", "corpus": "written", "train": fields}), root=root)

    def make(name: str, **changes: Any) -> TrainTask:
        return changed(whole, name, **changes)

    return make


def figures(task: TrainTask, key: str) -> list[Any]:
    return [line.get(key) for line in read(task.folder)]


def weights(task: TrainTask) -> str:
    newest = store.newest(task.folder)
    assert newest is not None
    return read_manifest(newest).files["model.safetensors"]


@pytest.mark.slow
def test_stopped_with_one_worker_and_resumed_with_two_the_same_batches_follow(ray_cluster, task):
    whole, parts = task("whole"), task("parts")
    train(whole)
    stopping = iter([False, False, False, True])
    assert train(parts, should_stop=lambda: next(stopping)).step == 3
    seen = []
    line = job.run_task(parts, workers=2, resources=ONE_CPU, on_progress=lambda step, of, _: seen.append((step, of)))
    assert seen == [(step, 8) for step in (4, 5, 6, 7, 8)]
    assert figures(parts, "step") == list(range(1, 9))
    assert figures(parts, "batch_digest") == figures(whole, "batch_digest")
    assert figures(parts, "loss") == pytest.approx(figures(whole, "loss"), abs=SUM_ORDER)
    assert (line["run"], line["step"], line["checkpoint"]) == ("parts", 8, str(parts.folder / "step-00000008"))
    assert line["bits_per_byte"] == pytest.approx(figures(whole, "bits_per_byte")[-1], abs=SUM_ORDER)
    assert line["tokens_per_second"] > 0
    started = time.monotonic()
    assert job.run_task(parts, workers=1) == line
    assert time.monotonic() - started < 1, "a finished run answers without starting workers"


def test_while_it_trains_its_metrics_are_exported_and_a_request_to_stop_saves(ray_cluster, task):
    endless, pages = task("endless", num_steps=1_000_000, eval_every_steps=10), []
    declared = {f"ray_{name}" for name in METRICS if name.startswith("ulm_train_")}
    started = time.monotonic()

    def series() -> list[str]:
        return [line for line in pages[-1].splitlines() if line.startswith("ray_ulm_train") and 'run="endless"' in line]

    def look(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if step % 20 == 0:
            pages.append(metrics_page(ray_cluster))
            if {text.partition("{")[0] for text in series()} >= declared or time.monotonic() - started > 120:
                request_stop(endless.folder)

    line = job.run_task(endless, resources=ONE_CPU, on_progress=look)
    assert line["status"] == "interrupted"
    assert line["checkpoint"] == str(endless.folder / f"step-{line['step']:08d}")
    assert figures(endless, "step") == list(range(1, line["step"] + 1))
    assert {text.partition("{")[0] for text in series()} == declared
    assert "ray_ulm_memory_resident_bytes{" in pages[-1]
    assert any("ray_ulm_train_events_total{" in text and 'kind="start"' in text for text in series())
    assert all('model="96x3"' in text for text in series())
    assert not (endless.folder / "stop").exists()


def metrics_page(ray: Any) -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx.get(url, trust_env=False).text


@pytest.mark.slow
def test_without_restarts_a_killed_worker_ends_the_run_by_name_and_it_resumes_where_it_was_saved(ray_cluster, task):
    endless = task("killed", num_steps=1_000_000, checkpoint_every_steps=5)

    def kill(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if step == 7:
            os.kill(*training_workers(), signal.SIGKILL)

    message = r"killed: a worker failed, running it again resumes it: worker 0 of killed was lost \(.*process has died"
    with pytest.raises(TrainingError, match=message):
        job.run_task(endless, resources=ONE_CPU.model_copy(update={"max_restarts": 0}), on_progress=kill)
    saved = store.newest(endless.folder)
    assert saved is not None
    step = int(saved.name[5:])
    assert step >= 5 and step % 5 == 0
    steps = iter([False] * 3 + [True])
    assert train(endless, should_stop=lambda: next(steps)).step == step + 3
    assert figures(endless, "step") == list(range(1, step + 4))
    train(task("straight", num_steps=1_000_000), should_stop=iter([False] * (step + 3) + [True]).__next__)
    assert figures(endless, "batch_digest") == figures(task("straight"), "batch_digest")


def test_an_error_of_a_worker_comes_out_as_it_was_raised(ray_cluster, task, tmp_path):
    np.save(tmp_path / "val.npy", np.array([75]))  # of val
    with pytest.raises(ConfigError, match=r"^corpus: .* has no training documents among those chosen"):
        job.run_task(task("none", documents=tmp_path / "val.npy"), resources=ONE_CPU)


def test_more_workers_than_the_cluster_has_room_for_are_refused(ray_cluster, task):
    with pytest.raises(ClusterError, match="4 workers need 4 CPUs and 0 GPUs, the cluster has 2 and 0"):
        job.run_task(task("wide"), workers=4)
    with pytest.raises(ConfigError, match=r"train\.workers: 3 workers cannot share the 8 rows"):
        job.run_task(task("odd"), workers=3)
