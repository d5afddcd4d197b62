"""The training job: tasks handed to Ray Train's workers, watched, stopped, resumed.

`python -m pipelines.train.job RECIPE` is `ulm train` as a Ray job.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from pipelines.train import events, folder
from pipelines.train.events import Event, EventTail
from pipelines.train.figures import Tail
from pipelines.train.task import Stage, TrainTask, resolve
from pipelines.train.worker_job import STOP, Work, train_worker
from ulm import runtime
from ulm.errors import ClusterError, ConfigError, TrainingError, UlmError
from ulm.recipes import load_recipe
from ulm.recipes.train import Resources, TrainRecipe

log = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, Any]], None]  # step, steps, the line of metrics.jsonl
RunProgress = Callable[[str, int, int, dict[str, Any]], None]  # the same, after the run's name
EXIT_FAILED, EXIT_WRONG_RECIPE, EXIT_INTERRUPTED = 1, 2, 143
POLL_S = 1.0  # how often figures are read for the bars; each look takes time from the workers on a small machine
# Ray 2.60's PlacementGroupCleaner takes a controller for dead while the state API of a new cluster knows no actor yet
# (is_actor_alive gives None), and removes the workers' placement group. Seen on a busy machine.
GROUP_REMOVED = "placement group was removed"
MAX_ATTEMPTS = 3
CONTROLLER_POLL_S = "1"  # Ray's 2 s is how late it sees that workers are done
ROOM_WAIT_S = 60.0  # for a node that was lost to come back, where the recipe allows no fewer workers


def prepare(recipe: TrainRecipe, *, root: Path, near: Path | None = None) -> TrainTask:
    """What a recipe means, with every mistake in it raised; needs no Ray."""
    task = resolve(recipe, root=root, near=near)
    folder.check(task)
    return task


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

    SIGTERM and Ctrl-C make the workers save and stop. A finished run gets a name under models/.
    """
    task = task or prepare(recipe, root=root, near=near)
    folder.write_recipe(task, recipe)
    with stopping([task.folder]):
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

    Returns {run, checkpoint, step, loss, bits_per_byte, tokens_per_second}, or with `status: interrupted` the run,
    the newest checkpoint and its step. ConfigError when the folder holds another run of that name.
    """
    if recipe is not None:
        folder.check(task)
        folder.write_recipe(task, recipe)
    report = None if on_progress is None else lambda _run, *rest: on_progress(*rest)
    stages = (Stage((task,)),)
    return run_stages(
        stages, name=task.run, workers=workers, resources=resources, on_progress=report, on_event=on_event
    )[0]


def run_stages(
    stages: Sequence[Stage],
    *,
    name: str,
    workers: int | range = 1,
    resources: Resources = Resources(),  # noqa: B008  frozen
    on_progress: RunProgress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> list[dict[str, Any]]:
    """Train all tasks of all stages with one group of workers, which starts once; their last lines, in order.

    Of a range of workers as many are taken as the cluster has room for. Finished tasks are skipped.
    Runs lie in one folder; Ray Train keeps its own files beside them under `name`.
    """
    tasks = [task for stage in stages for task in stage.tasks]
    for task in tasks:
        folder.check(task)
    counts = range(workers, workers + 1) if isinstance(workers, int) else workers
    for stage in stages:
        for task in stage.tasks if not stage.side_by_side else ():
            folder.check_workers(task, counts)
    if not all(folder.is_finished(task) for task in tasks):
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / STOP).unlink(missing_ok=True)
        _watched(lambda: _fit(tuple(stages), name, counts, resources), tasks, on_progress, on_event)
        for task in tasks:
            (task.folder / STOP).unlink(missing_ok=True)
    return [folder.last_line(task) for task in tasks]


def request_stop(run_folder: Path) -> None:
    """Ask the workers of the run in this folder to save after the step they are in, and to return."""
    if run_folder.is_dir():
        (run_folder / STOP).touch()


@contextmanager
def stopping(run_folders: Sequence[Path]) -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C ask these runs to stop; a second Ctrl-C interrupts at once.

    Only the main thread of a process can catch signals; in another this does nothing.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        for run_folder in run_folders:
            request_stop(run_folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("saving and stopping after this step")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit(stages: tuple[Stage, ...], name: str, counts: range, resources: Resources) -> None:
    """Run the workers to the end, again where one is lost. Errors of ours come out as they were raised on a worker."""
    tasks = [task for stage in stages for task in stage.tasks]
    workers, cpus, gpus = _share(counts, resources)
    attempts, before = 0, None
    while (lost := _fit_once(stages, name, workers, cpus, gpus)) is not None:
        reached = [folder.newest_step(task)[1] for task in tasks]
        attempts, before = (attempts + 1 if reached == before else 1), reached
        if any((task.folder / STOP).exists() for task in tasks):
            return  # it was asked to stop; what is saved is saved
        if attempts > resources.max_restarts:
            raise TrainingError(f"{name}: a worker failed, running it again resumes it: {lost}") from None
        workers, cpus, gpus = _share(counts, resources, wait_s=ROOM_WAIT_S)
        for task, step in zip(tasks, reached, strict=True):
            if (task.folder / folder.TASK).is_file() and not folder.is_finished(task):
                text = f"a worker was lost ({lost}); starting again from here with {_workers(workers)}"
                events.say(task.folder, step, "restart", text)


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _fit_once(stages: tuple[Stage, ...], name: str, workers: int, cpus: float, gpus: float) -> str | None:
    """Run the workers until they end: None when they are done, else how one was lost. Errors of ours are raised."""
    runs = stages[0].tasks[0].folder.parent
    runtime.set_variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    one_run = [task.folder.name for stage in stages for task in stage.tasks] == [name]
    for _attempt in range(MAX_ATTEMPTS):
        # Ray's list of checkpoints: we find the newest ourselves, and Ray would not start once one on it is pruned.
        (runs / name / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"work": Work(stages, threads=max(1, int(cpus)), report=one_run)},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(runs),
                checkpoint_config=CheckpointConfig(num_to_keep=None),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
            return None
        except TrainingFailedError as error:
            causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
            if (ours := next((found for cause in causes if (found := _ours(cause)) is not None), None)) is not None:
                raise ours from error
            # a traceback's error, or how the process died
            lost = str(error).strip().rpartition("\n")[2][:300]
            if GROUP_REMOVED not in str(error):
                return lost
            log.warning("Ray took the workers of %s away while they started; starting them again", name)
    return lost


def _ours(error: BaseException | None) -> UlmError | None:
    """The first error of ours along a chain of causes."""
    while error is not None and not isinstance(error, UlmError):
        error = error.__cause__ or getattr(error, "cause", None)
    return error


def _share(counts: range, resources: Resources, wait_s: float = 0.0) -> tuple[int, float, float]:
    """How many workers the cluster has room for, with CPUs and GPUs of each: the recipe's, else equal shares.

    ClusterError when it has no room for the fewest, after `wait_s` seconds in which a node may come back.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        total = ray.cluster_resources()
        for workers in reversed(counts):
            given = resources.gpus_per_worker
            gpus = given if given is not None else float(total.get("GPU", 0) >= workers)
            cpus = resources.cpus_per_worker or max(1.0, total.get("CPU", 1) // workers)
            if cpus * workers <= total.get("CPU", 0) and gpus * workers <= total.get("GPU", 0):
                return workers, cpus, gpus
        if time.monotonic() > deadline_s:
            needs = f"{_workers(workers)} need{'s' if workers == 1 else ''} {cpus * workers:g} CPUs"
            has = f"the cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}"
            raise ClusterError(f"{needs} and {gpus * workers:g} GPUs, {has}; fewer train.workers, or smaller resources")
        time.sleep(1.0)


def _watched(
    work: Callable[[], None],
    tasks: Sequence[TrainTask],
    on_progress: RunProgress | None,
    on_event: Callable[[str, Event], None] | None,
) -> None:
    """Do the work in a thread, so that this one answers signals and reports what the runs' files tell."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
            errors.append(error)

    tails = [(task, Tail(task.folder), EventTail(task.folder)) for task in tasks]
    thread = threading.Thread(target=body, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        for task, tail, event_tail in tails:
            for event in event_tail.new() if on_event else ():
                on_event(task.run, event)  # type: ignore[misc]
            for line in tail.new_lines() if on_progress else ():
                on_progress(task.run, line["step"], task.num_steps, line)  # type: ignore[misc]
    if errors:
        raise errors[0]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipelines.train.job RECIPE [--set a.b=value]`, as `ray job submit` runs it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pipelines.train.job", description="Train one model from a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        recipe = load_recipe("train", given.recipe, given.overrides)
        assert isinstance(recipe, TrainRecipe)
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        line = run(recipe, root=runtime.root(), near=given.recipe.parent)
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_WRONG_RECIPE
    except UlmError as error:
        log.error("%s", error)
        return EXIT_FAILED
    sys.stdout.write(json.dumps(line) + "\n")
    return EXIT_INTERRUPTED if "status" in line else 0


if __name__ == "__main__":
    sys.exit(main())
