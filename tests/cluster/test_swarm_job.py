"""The swarm job: a whole small swarm, found finished when run again, stopped in the middle, its workers killed."""

import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.swarm import queue, workers_job
from pipelines.swarm.job import train_swarm
from pipelines.swarm.workers_job import train_all
from pipelines.train import events
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.processes import rank_0_of, training_workers
from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import TrainingError
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe, SwarmResources, TrainRecipe
from ulm.swarm.manifest import Swarm

# Ray Train starts threads in this process that trip over Ray Data's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
WORDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section liable contract",
    "code": "def return import class self lambda yield parser buffer index",
    "medicine": "patient dose tablet symptom fever clinic nurse therapy vaccine blood",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a corpus of three kinds of text, bytes as tokens."""
    generator = random.Random(0)
    documents = [
        (domain, ("train", "train", "val", "test")[number % 4], " ".join(generator.choices(words.split(), k=25)))
        for number in range(40)
        for domain, words in WORDS.items()
    ]
    root = tmp_path_factory.mktemp("swarm-home")
    write_corpus(root, documents)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def recipe(name: str = "t", **changes: Any) -> SwarmRecipe:
    train = {"steps": 13, "batch_tokens": 256, "context_tokens": 64, **changes.pop("train", {})}
    fields = {"corpus": "tiny", "model": {"preset": "nano", "num_layers": 1}, "experts": 3, **changes}
    return validate(SwarmRecipe, {"name": name, "train": train, **fields})


@pytest.mark.usefixtures("cluster")
def test_a_swarm_is_trained_written_compared_and_found_finished_when_run_again(home):
    seen: dict[str, tuple[int, int]] = {}
    result = train_swarm(recipe(), root=home, on_progress=lambda run, step, of, _: seen.update({run: (step, of)}))
    swarm = Swarm.open("t", root=home)
    assert result["swarm"] == str(swarm.folder) and result["digest"] == swarm.digest and result["experts"] == 3
    assert list(swarm.members) == ["e00", "e01", "e02", "seed"]
    assert sorted(swarm.members[f"e0{c}"].domain for c in range(3)) == sorted(WORDS)

    seed = read_manifest(swarm.checkpoint("seed"))
    assert (seed.step, seed.init_from) == (7, None)
    digests = set()
    for path in (*(swarm.checkpoint(f"e0{c}") for c in range(3)), swarm.path_of(swarm.manifest.controls.dense)):
        manifest = read_manifest(path)
        assert manifest.init_from == seed.digest
        assert manifest.step == (6 if "dense" in manifest.run else 2)
        digests.add(manifest.digest)
    assert len(digests) == 4  # each learned something else
    assert seen["t-seed"] == (7, 7) and seen["t-e02"] == (2, 2) and seen["t-dense"] == (6, 6)

    assert set(result["bits_per_byte"]) == set(WORDS)
    for row in result["bits_per_byte"].values():
        assert list(row) == ["dense", "route", "mixture"]
        assert all(1 < bits < 8 for bits in row.values())  # a little trained: better than a uniform byte
    assert result["tokens_per_parameter"] == pytest.approx(13 * 256 / result["parameters"])

    metrics = {path: path.read_bytes() for path in (home / "runs").glob("t-*/metrics.jsonl")}
    assert len(metrics) == 5
    started_s = time.monotonic()
    assert train_swarm(recipe(), root=home) == result
    assert time.monotonic() - started_s < 5
    assert {path: path.read_bytes() for path in metrics} == metrics


@pytest.mark.usefixtures("cluster")
def test_sigterm_saves_every_run_under_way_and_leaves_no_swarm(home):
    def stop(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        if run == "stopped-seed":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train_swarm(recipe("stopped", train={"steps": 20_000}), root=home, on_progress=stop)
    assert result == {"status": "interrupted", "runs": ["stopped-seed"]}
    assert signal.getsignal(signal.SIGTERM) == before
    run = home / "runs" / "stopped-seed"
    newest = store.newest(run)
    assert newest is not None and read_manifest(newest).is_training
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(newest.name[5:]) < 10_000
    assert not list((home / "runs").rglob(f"*{artefacts.PARTIAL}"))
    assert store.newest(home / "runs" / "stopped-dense") is None
    assert "stopped" not in artefacts.names(home / "swarms" / "names")


def queue_tasks(home: Path, steps: dict[str, int]) -> list[TrainTask]:
    train = {"steps": 1, "batch_tokens": 256, "context_tokens": 64, "precision": "float32", "eval_tokens": 100}
    fields = {"name": "q", "corpus": "tiny", "model": {"preset": "nano", "num_layers": 1}, "train": train}
    whole = resolve(validate(TrainRecipe, {**fields, "samples": {"prompts": []}}), root=home)
    return [
        changed(whole, name, num_steps=number, checkpoint_every_steps=20, seed=seed, compile=False)
        for seed, (name, number) in enumerate(steps.items())
    ]


def as_undisturbed(task: TrainTask) -> None:
    """Every step once, on the same rows, with the same losses and the same weights to the last bit."""
    alone = replace(task, run=f"alone-{task.run}", folder=task.folder.with_name(f"alone-{task.run}"))
    train(alone)
    for key in ("step", "batch_digest", "loss"):
        assert [line[key] for line in read(task.folder)] == [line[key] for line in read(alone.folder)], key
    ends = [store.newest(of.folder) for of in (task, alone)]
    assert len({read_manifest(end).files["model.safetensors"] for end in ends if end}) == 1


def kill_while(home: Path, tasks: list[TrainTask], kills: int, every_s: float) -> list[tuple[str, str]]:
    """Train by two workers, one of which is killed now and then; what was told, as (run, kind)."""
    told: list[tuple[str, str]] = []
    done: list[float] = []

    def kill(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        workers = training_workers(b"ray::ExpertWorker.train")
        if workers and len(done) < kills and time.monotonic() > (done[-1] if done else 0) + every_s:
            done.append(time.monotonic())
            os.kill(workers[len(done) % len(workers)], signal.SIGKILL)

    figures = train_all(
        tasks,
        name="killed",
        resources=SwarmResources(cpus_per_worker=1),  # as many threads as this process has, so sums have one order
        on_progress=kill,
        on_event=lambda run, event: told.append((run, event.kind)),
    )
    assert figures["workers"] == 2 and figures["lost"] == kills == len(done)
    return told


@pytest.mark.usefixtures("cluster")
def test_workers_are_killed_and_overtaken_and_the_runs_end_as_if_nothing_had_happened_but_for_one_that_cannot(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    monkeypatch.setattr(queue, "PACE_MIN_S", 1.0)
    monkeypatch.setattr(queue, "MOVE_MARGIN", 0.0)  # whoever is idle takes over what is under way
    *tasks, broken = queue_tasks(home, {"qa": 350, "qb": 150, "qc": 100, "broken": 50})
    (tmp_path / "documents.npy").write_text("no array")
    broken = replace(broken, documents=tmp_path / "documents.npy")
    told: list[tuple[str, str]] = []
    message = r"^1 of 4 runs failed; the others are kept, running it again resumes these: broken: ValueError: .*pickle"
    with pytest.raises(TrainingError, match=message):
        told += kill_while(home, [*tasks, broken], kills=2, every_s=2.0)
    kinds = [event.kind for task in tasks for event in events.read(task.folder)]
    assert kinds.count("restart") == 2 and "moved" in kinds
    assert [event.kind for event in events.read(broken.folder)] == ["failed"]
    for task in tasks:
        assert not (task.folder / "stop").exists()
        as_undisturbed(task)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_eight_runs_end_as_if_nothing_had_happened_with_a_worker_killed_every_few_seconds(home, monkeypatch):
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    tasks = queue_tasks(home, {f"soak{number}": 300 + 40 * number for number in range(8)})
    kill_while(home, tasks, kills=12, every_s=4.0)
    for task in tasks:
        as_undisturbed(task)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_stuck_is_replaced(home, monkeypatch):
    """Stopped, it answers nobody, and holds the run's folder."""
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    monkeypatch.setattr(queue, "STUCK_AFTER_S", 4.0)
    monkeypatch.setattr(queue, "PACE_MIN_S", 0.2)
    tasks, stopped = queue_tasks(home, {"stuck": 400, "beside": 300}), []

    def stop(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        if run == "stuck" and step >= 200 and not stopped:
            stopped.append(rank_0_of(tasks[0].folder, training_workers(b"ray::ExpertWorker.train")))
            os.kill(stopped[0], signal.SIGSTOP)

    train_all(tasks, name="stuck", resources=SwarmResources(cpus_per_worker=1), on_progress=stop)
    (restart,) = [event.text for event in events.read(tasks[0].folder) if event.kind == "restart"]
    assert restart.endswith("has made no step for too long, and was ended; another worker goes on from here")
    assert stopped[0] not in training_workers(b"ray::ExpertWorker.train")
    for task in tasks:
        as_undisturbed(task)
