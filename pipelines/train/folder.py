"""What a run's folder says of the run: whose it is, how far it came, how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from pipelines.train import events, figures, legs, report
from pipelines.train.legs import TASK
from pipelines.train.task import TrainTask
from ulm import artefacts
from ulm.checkpoints import store
from ulm.errors import ArtefactError, ClusterError, ConfigError
from ulm.models.account import num_parameters, on_meta
from ulm.recipes.train import TrainingRecipe

LOG = "log"  # what the run's first worker logs
MODEL = "model.json"  # the size of the model, for who lists runs and has no torch to count with
LOCK_WAIT_S = 60.0
log = logging.getLogger(__name__)


def check(task: TrainTask) -> None:
    """ConfigError when the folder belongs to another task; running a recipe again resumes only the same one.

    Its corpus may have been extended. Where the checkpoint to begin with is still to be trained, its digest is not
    compared; `claim` will.
    """
    if (recorded := legs.recorded(task.folder)) is None:
        return
    held, now = recorded[0], task.identity()
    if task.init_from and not task.init_from.is_dir():
        now["init_from"] = held["init_from"]
    if differ := sorted(_differences({**held, "corpus": now["corpus"]}, now)):
        remedy = f"give this recipe another name, or remove {task.folder}"
        raise ConfigError("name", f"run {task.run!r} exists with another {', '.join(differ)}", remedy)
    legs.of(task)


def claim(task: TrainTask) -> None:
    """Make the folder this task's, or refuse it as `check` does; a corpus that has grown begins a new leg."""
    check(task)
    if not (task.folder / MODEL).is_file():
        artefacts.write_json(task.folder / MODEL, {"parameters": num_parameters(on_meta(task.spec))})
    now, recorded = legs.of(task), legs.recorded(task.folder)
    if recorded is None:
        artefacts.write_json(task.folder / TASK, {**task.identity(), "legs": legs.dumped(now)})
    elif now != recorded[1] and not is_finished(task):
        artefacts.write_json(task.folder / TASK, {**recorded[0], "corpus": now[-1].corpus, "legs": legs.dumped(now)})
        more = now[-1].documents - recorded[1][-1].documents
        text = f"the corpus is now {now[-1].corpus[:12]}: {more:,} more documents from position {now[-1].cursor:,} on"
        events.say(task.folder, newest_step(task)[1], "corpus", text)


def check_workers(task: TrainTask, counts: range) -> None:
    """ConfigError where one of these numbers of workers cannot share the rows of a global batch equally."""
    for workers in counts:
        if task.rows_per_batch % workers:
            problem = f"{workers} workers cannot share the {task.rows_per_batch} rows of a global batch equally"
            fitting = [n for n in range(1, min(task.rows_per_batch, counts[-1]) + 1) if task.rows_per_batch % n == 0]
            batch_tokens = -(-task.rows_per_batch // workers) * workers * task.spec.context_tokens
            remedy = f"{' or '.join(map(str, fitting))}, or train.batch_tokens {batch_tokens}"
            raise ConfigError("train.workers", problem, remedy)


def name_model(task: TrainTask, root: Path) -> None:
    """Give a finished run's result its name under models/."""
    if is_finished(task) and (place := result(task)) is not None:
        artefacts.point(root / "models" / task.run, place)


def write_recipe(task: TrainTask, recipe: TrainingRecipe) -> None:
    """The recipe that the run came from, with the corpus by its digest, unless it is there already.

    Of a run that goes on with a corpus that has grown, only the corpus is changed.
    """
    path = task.folder / "recipe.yaml"
    has_begun = (task.folder / TASK).is_file()  # else the file may be of a start that was refused
    before = _yaml(path) if path.is_file() and has_begun else None
    fields = {**(before or recipe.model_dump(mode="json", exclude_unset=True)), "corpus": task.corpus.name}
    if before is None or (before != fields and not is_finished(task)):
        artefacts.write_text(path, yaml.safe_dump(fields, sort_keys=False))


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ArtefactError(f"{path}: is no recipe; remove it, and the next start writes it anew")
    return found


def newest_step(task: TrainTask) -> tuple[Path | None, int]:
    """The newest whole checkpoint and its step; (None, 0) before there is one."""
    newest = store.newest(task.folder)
    return newest, store.step_of(newest) if newest else 0


def is_finished(task: TrainTask) -> bool:
    """Whether the task's last step has been saved, or the one after which it was stopped early."""
    newest, step = newest_step(task)
    try:
        return step >= task.num_steps or (newest is not None and bool(store.read_state(newest).get("ended")))
    except ArtefactError:
        return False  # damaged: a worker will set it aside and go on from the one before


def result(task: TrainTask) -> Path | None:
    """The checkpoint that a run is for: its newest, or its best where it was to stop early."""
    best = store.best(task.folder) if task.recipe.early_stopping else []
    return best[0] if best else store.newest(task.folder)


@contextmanager
def held(task: TrainTask) -> Iterator[None]:
    """The run's folder for this process alone, and what it logs in the folder's file.

    Waits some seconds: the worker of a driver that was killed may need them to end. ClusterError when it is not free.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        deadline_s, has_told = time.monotonic() + LOCK_WAIT_S, False
        while not stack.enter_context(artefacts.try_lock(task.folder)):
            if not has_told:
                how = f"`ulm runs show {task.run}` shows it, `ulm runs cancel {task.run}` ends it"
                log.warning("%s: another process is training this run; waiting up to a minute; %s", task.run, how)
                has_told = True
            if time.monotonic() > deadline_s:
                problem = f"{task.run}: another process is training this run"
                raise ClusterError(f"{problem}; wait for it, or end it with `ulm runs cancel {task.run}`")
            time.sleep(0.2)
        handler = logging.FileHandler(task.folder / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("pipelines")
        logger.addHandler(handler)
        stack.callback(handler.close)
        stack.callback(logger.removeHandler, handler)
        yield


@contextmanager
def failure_told(tasks: Sequence[TrainTask]) -> Iterator[None]:
    """An error that comes out of the block is told as an event of every run that it ends.

    Those are the runs that have begun and not finished, unless one of them has told a failure of its own already.
    A recipe that is refused, or a cluster without room, ends none.
    """
    try:
        yield
    except (ConfigError, ClusterError):
        raise
    except Exception as error:
        open_runs = [task for task in tasks if (task.folder / TASK).is_file() and not is_finished(task)]
        if not any(events.has_failed(task.folder) for task in open_runs):
            with suppress(OSError):  # the disk may be full, and the error says so
                for task in open_runs:
                    events.say(task.folder, newest_step(task)[1], events.FAILED, str(error) or repr(error))
                    with suppress(Exception):  # a report of odd files must not hide the error that ended the run
                        report.write(task.folder)
        raise


def last_line(task: TrainTask) -> dict[str, Any]:
    """Where a run stands, as `ulm train` ends: with `status: interrupted` when it has not reached its end."""
    checkpoint = result(task) if is_finished(task) else newest_step(task)[0]
    step = store.step_of(checkpoint) if checkpoint else 0
    line = {"run": task.run, "checkpoint": str(checkpoint) if checkpoint else None, "step": step}
    if not is_finished(task):
        return {"status": "interrupted", **line}
    lines = list(figures.read(task.folder))
    last: dict[str, Any] = next((found for found in reversed(lines) if found["step"] == step), {})
    ends = {"loss": last.get("loss"), "bits_per_byte": last.get("bits_per_byte")}
    return {**line, **ends, "tokens_per_second": _tokens_per_second(lines)}


def _tokens_per_second(lines: list[dict[str, Any]]) -> float | None:
    timed = lines[min(figures.WARM_UP_STEPS, len(lines) // 2) :]
    seconds = sum(line["step_tokens"] / line["tokens_per_second"] for line in timed)
    return sum(line["step_tokens"] for line in timed) / seconds if seconds else None


def _differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{place}.{key}" if place else key)
    elif a != b:
        yield f"{place} ({a!r}, now {b!r})"
