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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from pipelines.train import folder
from pipelines.train.figures import Tail
from pipelines.train.task import Stage, TrainTask, resolve
from pipelines.train.worker_job import STOP, Work, train_worker
from ulm import artefacts, runtime
from ulm.errors import ClusterError, ConfigError, TrainingError, UlmError
from ulm.recipes import load_recipe
from ulm.recipes.train import Resources, TrainRecipe

log = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, Any]], None]  # step, steps, the line of metrics.jsonl
RunProgress = Callable[[str, int, int, dict[str, Any]], None]  # the same, after the run's name
EXIT_FAILED, EXIT_WRONG_RECIPE, EXIT_INTERRUPTED = 1, 2, 143
POLL_S = 0.3
# Ray 2.60's PlacementGroupCleaner takes a controller for dead while the state API of a new cluster knows no actor yet
# (is_actor_alive gives None), and removes the workers' placement group. Seen on a busy machine.
GROUP_REMOVED = "placement group was removed"
MAX_ATTEMPTS = 3
CONTROLLER_POLL_S = "0.5"  # Ray's 2 s is how late it sees that workers are done


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
) -> dict[str, Any]:
    """Train what a recipe says; returns the last line of `ulm train`, see run_task. Needs Ray to be initialised.

    SIGTERM and Ctrl-C make the workers save and stop. A finished run gets a name under models/.
    """
    task = task or prepare(recipe, root=root, near=near)
    folder.write_recipe(task, recipe)
    with stopping([task.folder]):
        line = run_task(task, workers=recipe.train.workers, resources=recipe.resources, on_progress=on_progress)
    if "status" not in line:
        artefacts.point(root / "models" / task.run, Path(line["checkpoint"]))
    return line


def run_task(
    task: TrainTask,
    *,
    workers: int = 1,
    resources: Resources = Resources(),  # noqa: B008  frozen
    recipe: TrainRecipe | None = None,
    on_progress: Progress | None = None,
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
    return run_stages(stages, name=task.run, workers=workers, resources=resources, on_progress=report)[0]


def run_stages(
    stages: Sequence[Stage],
    *,
    name: str,
    workers: int = 1,
    resources: Resources = Resources(),  # noqa: B008  frozen
    on_progress: RunProgress | None = None,
) -> list[dict[str, Any]]:
    """Train all tasks of all stages with one group of workers, which starts once; their last lines, in order.

    Runs lie in one folder; Ray Train keeps its own files beside them under `name`. Finished tasks are skipped.
    """
    tasks = [task for stage in stages for task in stage.tasks]
    for task in tasks:
        folder.check(task)
    for stage in stages:
        for task in stage.tasks:
            if not stage.side_by_side and task.rows_per_batch % workers:
                problem = f"{workers} workers cannot share the {task.rows_per_batch} rows of a global batch equally"
                raise ConfigError("train.workers", problem, "a divisor of batch_tokens / context_tokens")
    if not all(folder.is_finished(task) for task in tasks):
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / STOP).unlink(missing_ok=True)
        _watched(lambda: _fit(tuple(stages), name, workers, resources), tasks, on_progress)
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


def _fit(stages: tuple[Stage, ...], name: str, workers: int, resources: Resources, attempt: int = 1) -> None:
    """Run the workers to the end. An error of ours comes out as it was raised on its worker."""
    runs = stages[0].tasks[0].folder.parent
    # Ray's list of checkpoints: we find the newest ourselves, and Ray would not start once one on its list is pruned.
    (runs / name / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    runtime.set_variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    cpus, gpus = _share(workers, resources)
    one_run = [task.folder.name for stage in stages for task in stage.tasks] == [name]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"work": Work(stages, threads=max(1, int(cpus)), report=one_run)},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})}
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
    except TrainingFailedError as error:
        if GROUP_REMOVED in str(error) and attempt < MAX_ATTEMPTS:
            log.warning("Ray took the workers of %s away while they started; starting them again", name)
            _fit(stages, name, workers, resources, attempt + 1)
            return
        causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
        ours = next((found for cause in causes if (found := _ours(cause)) is not None), None)
        if ours is None:
            last = (
                str(error).strip().rpartition("\n")[2]
            )  # a traceback's error, or how the process died; the rest is chained
            ours = TrainingError(f"{name}: a worker failed, running it again resumes it: {last[:300]}")
        raise ours from error


def _ours(error: BaseException | None) -> UlmError | None:
    """The first error of ours along a chain of causes."""
    while error is not None and not isinstance(error, UlmError):
        error = error.__cause__ or getattr(error, "cause", None)
    return error


def _share(workers: int, resources: Resources) -> tuple[float, float]:
    """CPUs and GPUs of a worker: as the recipe says, else the cluster's, shared."""
    total = ray.cluster_resources()
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= workers else 0.0
    cpus = resources.cpus_per_worker or max(1.0, total.get("CPU", 1) // workers)
    if cpus * workers > total.get("CPU", 0) or gpus * workers > total.get("GPU", 0):
        needs = f"{workers} workers need {cpus * workers:g} CPUs and {gpus * workers:g} GPUs"
        has = f"the cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}"
        raise ClusterError(f"{needs}, {has}; fewer train.workers, or smaller resources")
    return cpus, gpus


def _watched(work: Callable[[], None], tasks: Sequence[TrainTask], on_progress: RunProgress | None) -> None:
    """Do the work in a thread, so that this one answers signals and reports progress from metrics.jsonl."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
            errors.append(error)

    tails = [(task, Tail(task.folder)) for task in tasks]
    thread = threading.Thread(target=body, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        for task, tail in tails if on_progress else ():
            for line in tail.new_lines():
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
