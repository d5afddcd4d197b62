"""The swarm job: a whole small swarm, found finished when run again, stopped in the middle, its workers killed."""

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.swarm import add_job, queue, workers_job
from pipelines.swarm.job import train_swarm
from pipelines.swarm.workers_job import train_all
from pipelines.train import events
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.processes import rank_0_of, training_workers
from tests.written_corpus import KINDS, write_kinds
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import TrainingError
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe, SwarmResources, TrainRecipe
from ulm.swarm.manifest import Swarm

# Ray Train starts threads in this process that trip over Ray Data's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
EXPERT_WORKER = b"ray::ExpertWorker.train"  # the process of one that has a run
ONE_CPU = SwarmResources(cpus_per_worker=1)  # as many threads as the tests' own process has, so sums have one order


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a corpus of three kinds of text, bytes as tokens."""
    root = tmp_path_factory.mktemp("swarm-home")
    write_kinds(root)
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
    assert sorted(swarm.members[f"e0{c}"].domain for c in range(3)) == sorted(KINDS)

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

    assert set(result["bits_per_byte"]) == set(KINDS)
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
def test_an_expert_is_added_by_a_job_as_ray_runs_it(home, tmp_path, monkeypatch, capsys):
    train_swarm(recipe(), root=home)  # trained already, unless this test runs alone
    monkeypatch.setenv("ULM_HOME", str(home))
    fields = {"swarm": "t", "corpus": "tiny", "name": "more", "train": {"steps": 2, "batch_tokens": 256}}
    path = tmp_path / "add.yaml"
    artefacts.write_json(path, fields)  # JSON is YAML
    assert add_job.main([str(path), "--set", "samples.prompts=[]"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    swarm = Swarm.open("t", root=home)
    assert (line["member"], line["digest"]) == ("e03", swarm.digest) and "e03" in swarm.members
    assert read_manifest(swarm.checkpoint("e03")).run == "more"
    assert add_job.main([str(path), "--set", "corpus=none"]) == 2
    assert "ulm swarm add: corpus" in capsys.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_sigterm_saves_every_run_under_way_and_leaves_no_swarm(home):
    def stop(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        if run == "stopped-seed" and step:
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


class Killer:
    """Kills the worker of a run that is under way now and then, as `on_progress`."""

    def __init__(self, home: Path, kills: int, every_s: float) -> None:
        self.home, self.every_s, self.left = home, every_s, kills
        self.killed_s = 0.0

    def __call__(self, run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        is_under_way = 20 < step < num_steps - 50  # it will not have ended before it is hit
        if self.left and is_under_way and time.monotonic() > self.killed_s + self.every_s:
            with suppress(AssertionError):  # its worker has been killed already, and this is what it had told
                os.kill(rank_0_of(self.home / "runs" / run, training_workers(EXPERT_WORKER)), signal.SIGKILL)
                self.left, self.killed_s = self.left - 1, time.monotonic()


@pytest.mark.usefixtures("cluster")
def test_workers_are_killed_and_overtaken_and_the_runs_end_as_if_nothing_had_happened_but_for_one_that_cannot(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    monkeypatch.setattr(queue, "PACE_MIN_S", 0.3)
    monkeypatch.setattr(queue, "MOVE_MARGIN", 0.0)  # whoever is idle takes over what is under way
    # qa is long: both kills may hit it, and it has to be under way still when another worker has nothing left to do.
    *tasks, broken = queue_tasks(home, {"qa": 900, "qb": 120, "qc": 80, "broken": 50})
    (tmp_path / "documents.npy").write_text("no array")
    broken = replace(broken, documents=tmp_path / "documents.npy")
    killer, told = Killer(home, kills=2, every_s=2.0), []
    message = r"^1 of 4 runs failed; the others are kept, running it again resumes these: broken: ValueError: .*pickle"
    with pytest.raises(TrainingError, match=message):
        train_all(
            [*tasks, broken],
            name="killed",
            resources=ONE_CPU,
            on_progress=killer,
            on_event=lambda run, event: told.append((run, event.kind)),
        )
    kinds = [kind for _, kind in told]
    assert killer.left == 0 and kinds.count("restart") == 2
    assert 0 < kinds.count("stop") <= kinds.count("moved"), "whoever is slow saves, unless it has just ended its run"
    assert [kind for run, kind in told if run == "broken"] == ["failed"]
    for task in tasks:
        assert not (task.folder / "stop").exists()
        as_undisturbed(task)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_eight_runs_end_as_if_nothing_had_happened_with_a_worker_killed_every_few_seconds(home, monkeypatch):
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    tasks = queue_tasks(home, {f"soak{number}": 300 + 40 * number for number in range(8)})
    killer = Killer(home, kills=12, every_s=4.0)
    patient = ONE_CPU.model_copy(update={"max_restarts": 12})  # the same run may be hit before it saves again
    figures = train_all(tasks, name="soak", resources=patient, on_progress=killer)
    assert (figures["workers"], figures["lost"], killer.left) == (2, 12, 0)
    for task in tasks:
        as_undisturbed(task)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_stuck_is_replaced(home, monkeypatch):
    """Stopped, it answers nobody, and holds the run's folder."""
    monkeypatch.setattr(workers_job, "POLL_S", 0.05)
    monkeypatch.setattr(queue, "STUCK_AFTER_S", 15.0)
    monkeypatch.setattr(queue, "PACE_MIN_S", 0.2)
    tasks, stopped = queue_tasks(home, {"stuck": 400, "beside": 300}), []

    def stop(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        if run == "stuck" and step >= 200 and not stopped:
            stopped.append(rank_0_of(tasks[0].folder, training_workers(EXPERT_WORKER)))
            os.kill(stopped[0], signal.SIGSTOP)

    train_all(tasks, name="stuck", resources=ONE_CPU, on_progress=stop)
    (restart,) = [event.text for event in events.read(tasks[0].folder) if event.kind == "restart"]
    assert restart.endswith("has made no step for too long, and was ended; another worker goes on from here")
    assert stopped[0] not in training_workers(EXPERT_WORKER)
    for task in tasks:
        as_undisturbed(task)
