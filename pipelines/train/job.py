"""The training job: a task handed to Ray Train's workers, watched, stopped, resumed.

`python -m pipelines.train.job RECIPE` is `ulm train` as a Ray job.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import job as submitted
from pipelines.train import events, folder
from pipelines.train.events import Event, EventTail
from pipelines.train.figures import Tail
from pipelines.train.legs import TASK
from pipelines.train.prepare import prepare
from pipelines.train.saver import full_disk, full_disk_told, is_full
from pipelines.train.stopping import STOP, stopping
from pipelines.train.task import TrainTask
from pipelines.train.worker_job import Work, train_worker
from ulm import runtime
from ulm.errors import ClusterError, TrainingError, UlmError
from ulm.recipes.train import Resources, TrainRecipe

log = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, Any]], None]  # step, steps, the line of metrics.jsonl
POLL_S = 1.0  # how often figures are read for the bars; each look takes time from the workers on a small machine
# Ray 2.60's PlacementGroupCleaner takes a controller for dead while the state API of a new cluster knows no actor yet
# (is_actor_alive gives None), and removes the workers' placement group. Seen on a busy machine.
GROUP_REMOVED = "placement group was removed"
MAX_ATTEMPTS = 3
CONTROLLER_POLL_S = "1"  # Ray's 2 s is how late it sees that workers are done
ROOM_WAIT_S = 60.0  # for a node that was lost to come back, where the recipe allows no fewer workers
START_WAIT_S = 20.0  # for CPUs and GPUs that others use, or that went with a node; then fewer workers are tried
# A worker that answers for so long neither its peers nor Ray is taken for lost. Longer than what one rank does while
# the others wait: load and check a checkpoint, wait for the run's folder, write samples. Ray's and torch's own: 10
# and 30 minutes, and for ever between reports.
STUCK_AFTER_S = 300.0
GUESSES = re.compile(r" (?:Some common causes|This is typically)")  # of Ray and of gloo, after what they know
# Exceptions that come again however often the workers are started.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)


def run(
    recipe: TrainRecipe,
    *,
    root: Path,
    near: Path | None = None,
    task: TrainTask | None = None,  # as `prepare` made it of the same recipe
    on_progress: Progress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train what a recipe says; returns the last line of `ulm train`, see run_task. Needs Ray to be initialised.

    A finished run gets a name under models/.
    """
    task = task or prepare(recipe, root=root, near=near)
    with full_disk_told(task.folder):
        folder.write_recipe(task, recipe)
        line = run_task(
            task,
            workers=recipe.train.worker_counts,
            resources=recipe.resources,
            on_progress=on_progress,
            on_event=on_event,
        )
        folder.name_model(task, root)
    return line


def run_task(
    task: TrainTask,
    *,
    workers: int | range = 1,
    resources: Resources = Resources(),  # noqa: B008  frozen
    recipe: TrainRecipe | None = None,
    on_progress: Progress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train a task to its end, from where its folder stands; a finished one answers at once.

    Of a range of workers as many are taken as the cluster has room for. SIGTERM and Ctrl-C make them save and stop.
    Returns {run, checkpoint, step, loss, bits_per_byte, tokens_per_second}, or with `status: interrupted` the run,
    the newest checkpoint and its step. ConfigError when the folder holds another run of that name, ClusterError where
    another process trains it already.
    """
    folder.check(task)
    if recipe is not None:
        folder.write_recipe(task, recipe)
    counts = range(workers, workers + 1) if isinstance(workers, int) else workers
    folder.check_workers(task, counts)
    if not folder.is_finished(task):
        with folder.held(task):  # no other process is at it, which this would disturb
            (task.folder / STOP).unlink(missing_ok=True)
        with stopping([task.folder], on_event), folder.failure_told([task]):
            _watched(lambda: _fit(task, counts, resources), task, on_progress, on_event)
        (task.folder / STOP).unlink(missing_ok=True)
    return folder.last_line(task)


def _fit(task: TrainTask, counts: range, resources: Resources) -> None:
    """Run the workers to the end, again where one is lost. Errors of ours come out as they were raised on a worker."""
    failures, before, room, waits = 0, None, _room(counts, resources), False
    while (lost := _fit_once(task, room)) is not None:
        reached = folder.newest_step(task)[1]
        if lost.is_taken:  # by others, or by a node that has just gone: fewer workers may find room, else wait for it
            allowed = range(counts.start, max(room.workers, counts.start + 1))
        else:
            failures, before, allowed = (failures + 1 if reached == before else 1), reached, counts
        if failures > resources.max_restarts:
            raise TrainingError(f"{task.run}: a worker failed, running it again resumes it: {lost.how}")
        found = _room_again(allowed, resources, task)
        if found is None:
            return  # it was asked to stop; what is saved is saved
        if lost.is_taken and found == room:
            if not waits:
                log.warning("%s: what %s would need is in use; waiting for it", task.run, _workers(room.workers))
            waits = True
            continue
        text = f"{lost.how}; starting again from here with {_workers(found.workers)}"
        if (task.folder / TASK).is_file() and not folder.is_finished(task):
            events.say(task.folder, reached, "restart", text)
        room, waits = found, False


@dataclass(frozen=True)
class _Room:
    """Workers that the cluster has room for, and what each of them is given."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class _Lost:
    """Why a group of workers ended before its work was done."""

    how: str
    is_taken: bool = False  # it never began: what it needs was in use


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _fit_once(task: TrainTask, room: _Room) -> _Lost | None:
    """Run the workers until they end: None when they are done. Errors of ours, and mistakes in our code, are raised."""
    runtime.set_variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    runtime.set_variable("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # of cloud machines; an actor that takes CPU time
    runtime.set_variable("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{START_WAIT_S:g}", keep=False)
    for stuck in ("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"):
        runtime.set_variable(stuck, f"{STUCK_AFTER_S:g}", keep=False)
    for _attempt in range(MAX_ATTEMPTS):
        # Ray's list of checkpoints: we find the newest ourselves, and Ray would not start once one on it is pruned.
        (task.folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"work": Work(task, threads=max(1, int(room.cpus)))},
            torch_config=TorchConfig(timeout_s=math.ceil(STUCK_AFTER_S)),
            scaling_config=ScalingConfig(
                num_workers=room.workers,
                use_gpu=room.gpus > 0,
                resources_per_worker={"CPU": room.cpus, **({"GPU": room.gpus} if room.gpus else {})},
            ),
            run_config=RunConfig(
                name=task.folder.name,
                storage_path=str(task.folder.parent),
                checkpoint_config=CheckpointConfig(num_to_keep=None),
                # Ray would try again for ever, with as many workers as before; how many there is room for is said here.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        try:
            trainer.fit()
            return None
        except TrainingFailedError as error:
            lost = _judge(task.folder, error)
            if GROUP_REMOVED not in str(error):
                return lost
            log.warning("Ray took the workers of %s away while they started; starting them again", task.run)
    return lost


def _judge(run: Path, error: TrainingFailedError) -> _Lost:
    """How the workers were lost; raises what another group of workers would meet again."""
    of_controller: Exception | None = getattr(error, "controller_failure", None)
    of_ranks: dict[int, Exception] = getattr(error, "worker_failures", {})
    for cause in (*of_ranks.values(), of_controller):
        if (known := ours(cause)) is not None:
            raise known from error
        if is_full(cause):  # of Ray's controller, which writes beside the run
            raise full_disk(run) from error
        if isinstance(cause, MISTAKES):
            log.error("%s", error)  # with the worker's traceback
            raise TrainingError(f"{run.name}: a worker failed: {type(cause).__name__}: {cause}") from error
    if type(of_controller).__name__ == "WorkerGroupStartupTimeoutError":  # Ray 2.60 keeps the class to itself
        return _Lost("there is no room for all workers now", is_taken=True)
    # A rank that lost its peer fails too; the one that was lost says why, if Ray knows of it already.
    dead = {rank: cause for rank, cause in of_ranks.items() if "health check" in str(cause)}
    why = str(next(iter((dead or of_ranks).values()), error)).strip().rpartition("\n")[2]
    which = f"worker {min(dead)} of {run.name}" if dead else f"a worker of {run.name}"
    return _Lost(f"{which} was lost ({GUESSES.split(why)[0][:300]})")


def ours(error: BaseException | None) -> UlmError | None:
    """The first error of ours along a chain of causes."""
    while error is not None and not isinstance(error, UlmError):
        error = error.__cause__ or getattr(error, "cause", None)
    return error


def _room(counts: range, resources: Resources) -> _Room:
    """The most workers of these that the cluster has room for, with what each gets: the recipe's, else equal shares.

    ClusterError when it has no room for the fewest. What others use at the moment counts as room.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    for workers in reversed(counts):
        given = resources.gpus_per_worker
        gpus = given if given is not None else float(total["GPU"] >= workers)
        shares = [float(share) for share in range(int(total["CPU"]) // workers, 1, -1)]
        for cpus in [resources.cpus_per_worker] if resources.cpus_per_worker else [*shares, 1.0]:
            if sum(_fitting(node, cpus, gpus) for node in nodes) >= workers:
                return _Room(workers, cpus, gpus)
    needs = f"train.workers: {_workers(workers)} need{'s' if workers == 1 else ''} {cpus * workers:g} CPUs"
    has = f"the cluster has {total['CPU']:g} and {total['GPU']:g}" + (f" on {len(nodes)} nodes" * (len(nodes) > 1))
    raise ClusterError(f"{needs} and {gpus * workers:g} GPUs, {has}; fewer train.workers, or smaller resources")


def _fitting(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Workers that a node can hold."""
    by_cpus = node.get("CPU", 0.0) // cpus
    return int(min(by_cpus, node.get("GPU", 0.0) // gpus) if gpus else by_cpus)


def _room_again(counts: range, resources: Resources, task: TrainTask) -> _Room | None:
    """Room for workers after some were lost; None when the task was asked to stop meanwhile.

    ClusterError when there is none for the fewest, also after ROOM_WAIT_S, in which a node may come back.
    """
    deadline_s = time.monotonic() + ROOM_WAIT_S
    while not (task.folder / STOP).exists():
        try:
            return _room(counts, resources)
        except ClusterError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(1.0)
    return None


def _watched(
    work: Callable[[], None],
    task: TrainTask,
    on_progress: Progress | None,
    on_event: Callable[[str, Event], None] | None,
) -> None:
    """Do the work in a thread, so that this one answers signals and reports what the run's files tell."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
            errors.append(error)

    watch = Watch(task, on_progress, on_event)
    thread = threading.Thread(target=body, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        watch.look()
    if errors:
        raise errors[0]


class Watch:
    """Tells what a run's files say while others write them."""

    def __init__(
        self, task: TrainTask, on_progress: Progress | None, on_event: Callable[[str, Event], None] | None
    ) -> None:
        self._task, self._on_progress, self._on_event = task, on_progress, on_event
        self._figures, self._events = Tail(task.folder), EventTail(task.folder)

    def look(self) -> None:
        """Tell the events and steps since the last look, each once."""
        for event in self._events.new() if self._on_event else ():
            self._on_event(self._task.run, event)  # type: ignore[misc]
        for line in self._figures.new_lines() if self._on_progress else ():
            self._on_progress(line["step"], self._task.num_steps, line)  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipelines.train.job RECIPE [--set a.b=value]`, as `ray job submit` runs it; returns the exit code."""
    return submitted.run("train", run, argv)


if __name__ == "__main__":
    sys.exit(main())
