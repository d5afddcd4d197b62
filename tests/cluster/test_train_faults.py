"""Faults while training, by real kills of real processes: no step is done twice or left out, and nothing hangs."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.train import events, folder, job
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.process_group import train_by
from tests.processes import ended, interrupt, nothing_is_left, rank_0_of, start, training_workers, wait_for
from tests.written_corpus import written_corpus
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ClusterError, TrainingError
from ulm.recipes.base import validate
from ulm.recipes.train import Resources, Samples, TrainRecipe

TEXTS = [f"{i} green bottles hang on the wall, {i * i} if one counts the squares.\n" * (1 + i % 3) for i in range(80)]
FIELDS = {"steps": 150, "batch_tokens": 512, "context_tokens": 64, "precision": "float32", "eval_tokens": 100}
EVERY = 10  # steps between checkpoints
ONE_CPU = Resources(cpus_per_worker=1)  # as many threads as the tests' own process has, so sums have one order
SUM_ORDER = 2e-3  # nats: two workers add gradients in another order than one, and updates enlarge the last bits

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray"),
]


@dataclass
class Nodes:
    """A Ray cluster of two nodes with one CPU each."""

    cluster: Any
    second: Any

    def lose_second(self) -> None:
        """Kill the second node with all that runs on it."""
        node, self.second = self.second, None
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    import ray
    from ray.cluster_utils import Cluster

    nodes = Nodes(Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}), None)
    ray.init(address=nodes.cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture
def nodes(cluster: Nodes, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Both nodes, whatever the test before has done; figures are looked at often enough to act in mid-run."""
    monkeypatch.setattr(job, "POLL_S", 0.05)
    if cluster.second is None:
        cluster.second = cluster.cluster.add_node(num_cpus=1)
    return cluster


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("faults") / "home"
    written_corpus(home, {"train": TEXTS[10:], "val": TEXTS[:10]})
    return home


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> dict[int, TrainTask]:
    """The run as it is when nothing happens, by the number of workers, without Ray."""
    whole = {workers: task_in(home, f"undisturbed-{workers}") for workers in (1, 2)}
    train(whole[1])
    train_by(whole[2], 2)
    return whole


@pytest.fixture
def task(home: Path) -> Callable[..., TrainTask]:
    return lambda name, **fields: task_in(home, name, **fields)


def task_in(home: Path, name: str, **fields: Any) -> TrainTask:
    recipe = validate(TrainRecipe, {"name": "a", "corpus": "written", "train": FIELDS})
    return changed(
        resolve(recipe, root=home), name, **{"checkpoint_every_steps": EVERY, "samples": Samples(prompts=())} | fields
    )


def recipe_file(home: Path, name: str, steps: int = 150) -> str:
    train_section = {**FIELDS, "steps": steps, "checkpoint_every_steps": EVERY}
    fields = {"name": name, "corpus": "written", "train": train_section, "samples": {"prompts": []}}
    path = home / f"{name}.yaml"
    path.write_text(json.dumps({**fields, "resources": {"cpus_per_worker": 1}}))
    return str(path)


def column(task: TrainTask, key: str) -> list[Any]:
    return [line.get(key) for line in read(task.folder)]


def told(task: TrainTask, kind: str) -> list[events.Event]:
    return [event for event in events.read(task.folder) if event.kind == kind]


def newest_step(task: TrainTask) -> int:
    return folder.newest_step(task)[1]


def weights(task: TrainTask) -> str:
    newest = store.newest(task.folder)
    assert newest is not None
    return read_manifest(newest).files["model.safetensors"]


def is_as_if_nothing_had_happened(task: TrainTask, whole: TrainTask) -> None:
    """Every step once, on the same rows, with the same losses and the same weights to the last bit."""
    assert column(task, "step") == list(range(1, task.num_steps + 1))
    assert column(task, "batch_digest") == column(whole, "batch_digest")
    assert column(task, "loss") == column(whole, "loss")
    assert weights(task) == weights(whole)


def steps_done(run: Path) -> int:
    return sum(1 for _ in read(run))


# --- a worker --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # make test has a lost node here, and killed workers in test_swarm_job
def test_killed_workers_are_replaced_and_the_run_ends_as_if_nothing_had_happened(nodes, task, undisturbed):
    killed = task("killed")
    victims = iter(["rank 0", "the other"])
    saved: list[int] = []

    def kill(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if len(saved) < 2 and step >= (len(saved) + 1) * 30 and len(workers := training_workers()) == 2:
            rank_0 = rank_0_of(killed.folder, workers)
            victim = rank_0 if next(victims) == "rank 0" else next(pid for pid in workers if pid != rank_0)
            saved.append(newest_step(killed))
            os.kill(victim, signal.SIGKILL)

    job.run_task(killed, workers=2, resources=ONE_CPU, on_progress=kill)
    assert len(saved) == 2
    restarts = told(killed, "restart")
    assert [event.text[:23] for event in restarts] == ["worker 0 of killed was ", "worker 1 of killed was "]
    assert all("worker process has died" in event.text for event in restarts)
    assert all(event.text.endswith("; starting again from here with 2 workers") for event in restarts)
    assert all(event.step >= step and event.step % EVERY == 0 for event, step in zip(restarts, saved, strict=True))
    resumed = told(killed, "resume")
    assert [event.step for event in resumed] == [event.step for event in restarts], "nothing that was saved is lost"
    is_as_if_nothing_had_happened(killed, undisturbed[2])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["the other", "rank 0"])
def test_a_worker_that_is_stuck_is_replaced(nodes, task, undisturbed, monkeypatch, which):
    """Stopped, it keeps its connections and answers nobody."""
    monkeypatch.setattr(job, "STUCK_AFTER_S", 6.0)
    stuck, stopped = task(f"stuck-{which[:4].strip()}"), []

    def stop(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if not stopped and step >= 15:
            workers = training_workers()
            rank_0 = rank_0_of(stuck.folder, workers)
            stopped.append(rank_0 if which == "rank 0" else next(pid for pid in workers if pid != rank_0))
            os.kill(stopped[0], signal.SIGSTOP)

    job.run_task(stuck, workers=2, resources=ONE_CPU, on_progress=stop)
    assert len(told(stuck, "restart")) == 1
    is_as_if_nothing_had_happened(stuck, undisturbed[2])
    assert stopped[0] not in training_workers()


def test_workers_lost_again_and_again_without_a_new_checkpoint_end_the_run(task, monkeypatch):
    """Two losses in a row at one step are allowed; each new checkpoint allows two more."""
    fragile = task("fragile")
    reached, groups = iter([0, 0, 10, 10, 20, 20, 20, 30]), []

    def lose(*_: Any) -> job._Lost:
        groups.append(step := next(reached))
        if step:
            (store.step_folder(fragile.folder, step)).mkdir(parents=True, exist_ok=True)
            (store.step_folder(fragile.folder, step) / "manifest.json").write_text("{}")
        return job._Lost("worker 0 of fragile was lost")

    monkeypatch.setattr(job, "_fit_once", lose)
    monkeypatch.setattr(job, "_room", lambda counts, resources: job._Room(1, 1.0, 0.0))
    with pytest.raises(TrainingError, match="fragile: a worker failed, running it again resumes it: worker 0 of fragi"):
        job._fit(fragile, range(1, 2), Resources(max_restarts=2))
    assert groups == [0, 0, 10, 10, 20, 20, 20]


def test_a_mistake_in_our_code_ends_the_run_at_once(nodes, task, tmp_path, monkeypatch, caplog):
    (tmp_path / "documents.npy").write_text("no array")
    groups, fit_once = [], job._fit_once
    monkeypatch.setattr(job, "_fit_once", lambda *given: groups.append(given) or fit_once(*given))
    with pytest.raises(TrainingError, match="mistaken: a worker failed: ValueError: .*pickle"):
        job.run_task(task("mistaken", documents=tmp_path / "documents.npy"), resources=ONE_CPU)
    assert len(groups) == 1, "no other worker would have fared better"
    assert "np.load(self.documents" in caplog.text, "the traceback is told"


# --- the driver ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # make test kills a process in test_loop
def test_when_the_driver_is_killed_its_workers_end_and_the_same_command_goes_on(nodes, home, task, undisturbed):
    command = ("train", recipe_file(home, "driven"), "--address", nodes.cluster.address)
    child = start(home, *command)
    wait_for(lambda: steps_done(task("driven").folder) >= 25, "some steps")
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    saved = newest_step(task("driven"))
    code, out, err = ended(start(home, *command))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 150
    (resumed,) = told(task("driven"), "resume")
    assert resumed.step >= saved >= 20, "nothing that was saved is lost"
    is_as_if_nothing_had_happened(task("driven"), undisturbed[1])


@pytest.mark.slow  # make test has Ctrl-C in test_interrupts, SIGTERM without Ray in test_runs_cli
@pytest.mark.parametrize("where", ["on a cluster", "by itself"])
def test_sigterm_saves_ends_with_143_and_the_same_command_ends_as_if_nothing_had_happened(
    nodes, home, task, undisturbed, where
):
    terminated = task(f"terminated-{where[:2]}")
    command = ["train", recipe_file(home, terminated.run)]
    command += ["--address", nodes.cluster.address] if where == "on a cluster" else []
    child = start(home, *command)
    wait_for(lambda: steps_done(terminated.folder) >= 15, "some steps")
    code, out, err = interrupt(child, signal.SIGTERM)
    line, step = json.loads(out.splitlines()[-1]), steps_done(terminated.folder)
    checkpoint = store.step_folder(terminated.folder, step)
    assert (code, line) == (
        143,
        {"status": "interrupted", "run": terminated.run, "checkpoint": str(checkpoint), "step": step},
    ), err
    assert 15 <= step < 150
    nothing_is_left(home)
    code, out, err = ended(start(home, *command))
    assert (code, json.loads(out.splitlines()[-1])["step"]) == (0, 150), err
    assert [event.step for event in told(terminated, "resume")] == [step], "not one step is lost"
    is_as_if_nothing_had_happened(terminated, undisturbed[1])


def test_a_second_driver_of_a_run_is_refused_and_does_not_disturb_the_first(task, undisturbed, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_WAIT_S", 0.5)
    shared, second_done = task("shared"), threading.Event()

    def on_step(figures: Any) -> None:
        if figures.step == 20:
            second_done.wait(60)

    first = threading.Thread(target=lambda: train(shared, on_step=on_step))
    first.start()
    try:
        wait_for(lambda: steps_done(shared.folder) >= 20, "some steps")
        with pytest.raises(ClusterError, match="shared: another process is training this run; wait for it, or end it"):
            job.run_task(shared)  # needs no cluster to say so
        assert not (shared.folder / "stop").exists()
    finally:
        second_done.set()
        first.join()
    assert told(shared, "failed") == []
    is_as_if_nothing_had_happened(shared, undisturbed[1])


# --- a node ----------------------------------------------------------------------------------------------------------


def test_when_a_node_is_lost_the_run_goes_on_with_fewer_workers_on_the_same_batches(
    nodes, task, undisturbed, monkeypatch
):
    monkeypatch.setattr(job, "START_WAIT_S", 5.0)
    shrunk, lost = task("shrunk"), []

    def lose(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if not lost and step >= 25:
            lost.append(newest_step(shrunk))
            nodes.lose_second()

    job.run_task(shrunk, workers=range(1, 3), resources=ONE_CPU, on_progress=lose)
    assert [
        event.text.split(" on ")[0] for event in events.read(shrunk.folder) if event.kind in ("start", "resume")
    ] == [
        "2 workers",
        "1 worker",
    ]
    restarts = told(shrunk, "restart")  # twice where Ray takes the node for alive at first
    assert restarts[-1].text.endswith("; starting again from here with 1 worker")
    assert all(restart.step >= lost[0] >= 20 for restart in restarts)
    assert column(shrunk, "step") == list(range(1, 151))
    assert column(shrunk, "batch_digest") == column(undisturbed[1], "batch_digest")
    near = slice(40)  # after that the last bits have grown into another path
    assert column(shrunk, "loss")[near] == pytest.approx(column(undisturbed[1], "loss")[near], abs=SUM_ORDER)


def test_a_worker_is_given_no_more_than_a_node_has(nodes):
    assert job._room(range(1, 2), Resources()) == job._Room(1, 1.0, 0.0)
    assert job._room(range(1, 5), Resources()) == job._Room(2, 1.0, 0.0)
    with pytest.raises(ClusterError, match="1 worker needs 2 CPUs and 0 GPUs, the cluster has 2 and 0 on 2 nodes; few"):
        job._room(range(1, 5), Resources(cpus_per_worker=2))


@pytest.mark.slow
def test_cpus_that_others_use_are_waited_for_by_the_fewest_workers(nodes, task, undisturbed, monkeypatch, caplog):
    import ray

    monkeypatch.setattr(job, "START_WAIT_S", 3.0)
    busy = [ray.remote(num_cpus=1)(Busy).remote() for _ in range(2)]
    ray.get([actor.ready.remote() for actor in busy])
    waiting = task("waiting")

    def make_room() -> None:
        wait_for(lambda: "what 1 worker would need is in use; waiting for it" in caplog.text, "the run to wait")
        ray.kill(busy[0])

    freeing = threading.Thread(target=make_room)
    freeing.start()
    try:
        job.run_task(waiting, workers=range(1, 3), resources=ONE_CPU)
    finally:
        freeing.join()
        ray.kill(busy[1])
    is_as_if_nothing_had_happened(waiting, undisturbed[1])


class Busy:
    def ready(self) -> bool:
        return True


@pytest.mark.slow
def test_without_room_for_a_fixed_number_of_workers_the_run_ends_and_says_so(nodes, task, monkeypatch):
    monkeypatch.setattr(job, "ROOM_WAIT_S", 2.0)
    monkeypatch.setattr(job, "START_WAIT_S", 5.0)
    fixed, lost_s = task("fixed"), []

    def lose(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if not lost_s and step >= 15:
            nodes.lose_second()
            lost_s.append(time.monotonic())

    with pytest.raises(
        ClusterError, match="2 workers need 2 CPUs and 0 GPUs, the cluster has 1 and 0; fewer train.wor"
    ):
        job.run_task(fixed, workers=2, resources=ONE_CPU, on_progress=lose)
    assert time.monotonic() - lost_s[0] < 60
    assert newest_step(fixed) >= 10, "what was saved can be gone on from"


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB with a corpus on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    written_corpus(disk, {"train": TEXTS[10:], "val": TEXTS[:10]})
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left_bytes: int) -> Path:
    """A file that leaves so much of the disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        at = os.statvfs(disk)
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, at.f_bavail * at.f_frsize - left_bytes))
        except OSError:
            assert not left_bytes  # what the run has just written was missing
            while True:
                try:
                    file.write(b"0" * 4096)
                except OSError:
                    break
    return filler


def test_a_disk_that_fills_up_ends_the_run_with_a_line_and_with_room_it_goes_on(small_disk, undisturbed):
    command = ("train", recipe_file(small_disk, "filled", steps=60), "--no-ray")
    filled = task_in(small_disk, "filled", num_steps=60)
    child = start(small_disk, *command)
    wait_for(lambda: newest_step(filled) >= 10, "a checkpoint")
    filler = fill(small_disk, 1_000_000)
    code, _, err = ended(child)
    newest = store.newest(filled.folder)
    assert newest is not None and store.step_of(newest) < 60
    line = err.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in err, err
    assert "no space for a checkpoint of 4 MB, 1 MB are free; the last whole checkpoint is " + newest.name in line, err
    assert line.endswith("make room and run it again: it resumes")
    store.load(newest)
    filler.unlink()
    code, out, err = ended(start(small_disk, *command))
    assert (code, json.loads(out.splitlines()[-1])["step"]) == (0, 60), err
    assert [event.step for event in told(filled, "resume")] == [store.step_of(newest)]
    assert column(filled, "step") == list(range(1, 61))
    assert column(filled, "batch_digest") == column(undisturbed[1], "batch_digest")[:60]


@pytest.mark.slow
def test_a_disk_too_full_for_one_more_line_ends_the_run_the_same_way(nodes, small_disk, undisturbed):
    full, filler = task_in(small_disk, "full"), []

    def fill_all(step: int, num_steps: int, line: dict[str, Any]) -> None:
        if not filler and newest_step(full) >= 10:
            filler.append(fill(small_disk, 0))

    with pytest.raises(TrainingError, match="no space .*make room and run it again: it resumes"):
        job.run_task(full, resources=ONE_CPU, on_progress=fill_all)
    assert told(full, "restart") == [], "another worker would find the disk as full"
    newest = store.newest(full.folder)
    assert newest is not None
    store.load(newest)
    filler[0].unlink()
    job.run_task(full, resources=ONE_CPU)
    is_as_if_nothing_had_happened(full, undisturbed[1])


# --- a damaged checkpoint --------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the weights": lambda step: flip(step / "model.safetensors"),
    "a truncated optimizer": lambda step: os.truncate(step / "optimizer.safetensors", 1_000),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "an empty manifest": lambda step: (step / "manifest.json").write_text(""),
    "garbage as state": lambda step: (step / "state.json").write_bytes(b"\x00\xff{"),
    "no object as state": lambda step: (step / "state.json").write_text("[]"),
    "a missing spec": lambda step: (step / "spec.json").unlink(),
}
SHORT = {"num_steps": 12, "checkpoint_every_steps": 3}


def stopped_after(task: TrainTask, steps: int) -> TrainTask:
    asked = iter([False] * steps + [True])
    assert train(task, should_stop=lambda: next(asked)).step == steps
    return task


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_taken(task, damage, caplog):
    name = damage.replace(" ", "-")
    whole, damaged = task("short", **SHORT), stopped_after(task(name, **SHORT), 8)
    train(whole)
    DAMAGES[damage](damaged.folder / "step-00000008")
    train(damaged)
    (event,) = told(damaged, "damaged")
    text = "step-00000008 is damaged, the one before, step-00000006, is taken: "
    assert event.step == 8 and event.text.startswith(text)
    assert event.text.endswith("; it is kept as step-00000008.damaged")
    assert f"{name}: step 8: {text}" in caplog.text
    assert [event.step for event in told(damaged, "resume")] == [6]
    is_as_if_nothing_had_happened(damaged, whole)


def test_a_damaged_older_checkpoint_does_not_stop_a_run(task):
    damaged = stopped_after(task("older", **SHORT), 8)
    DAMAGES["garbage as state"](damaged.folder / "step-00000003")
    assert train(damaged).step == 12


@pytest.mark.slow
def test_with_two_workers_all_damaged_checkpoints_are_set_aside_once_and_it_begins_anew(nodes, task):
    whole, ruined = task("two", **SHORT), stopped_after(task("ruined", **SHORT), 8)
    train_by(whole, 2)
    for step, damage in zip(
        (3, 6, 8), ("no manifest", "a flipped bit in the weights", "garbage as state"), strict=True
    ):
        DAMAGES[damage](store.step_folder(ruined.folder, step))
    said: list[str] = []
    job.run_task(ruined, workers=2, resources=ONE_CPU, on_event=lambda run, event: said.append(event.text))
    damaged = [event.text.partition(":")[0] for event in told(ruined, "damaged")]
    assert damaged == [
        "step-00000008 is damaged, the one before, step-00000006, is taken",
        "step-00000006 is damaged, the one before, step-00000003, is taken",
        "step-00000003 is damaged, training starts from the beginning",
    ]
    assert [text.partition(":")[0] for text in said][:3] == damaged, "whoever started it is told"
    assert math.isfinite(column(ruined, "loss")[-1])
    is_as_if_nothing_had_happened(ruined, whole)


def test_the_command_line_tells_of_a_damaged_checkpoint(home, task):
    command = ("train", recipe_file(home, "said", steps=30), "--no-ray")
    said = stopped_after(task("said", num_steps=30), 25)
    DAMAGES["a flipped bit in the weights"](said.folder / "step-00000025")
    code, _, err = ended(start(home, *command))
    assert code == 0, err
    assert "damaged: step-00000025 is damaged, the one before, step-00000020, is taken" in err
