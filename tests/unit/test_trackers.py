from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from pipelines.train import events, folder, hosted, report, trackers
from pipelines.train.figures import StepFigures
from pipelines.train.hosted import WANDB_EVERY_S
from pipelines.train.loop import train
from pipelines.train.samples import Sample
from pipelines.train.task import TrainTask, resolve
from pipelines.train.trackers import Trackers
from tests.changed_task import changed
from tests.written_corpus import written_corpus
from ulm.errors import ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

TEXTS = [f"{i} green bottles hang on the wall, {i * i} if one counts the squares.\n" * (1 + i % 3) for i in range(40)]
FIGURES = StepFigures(
    step=1,
    loss=2.0,
    tokens=512,
    step_tokens=512,
    tokens_per_second=1e4,
    batch_digest="ab",
    lr=1e-3,
    grad_norm=None,
    data_wait_s=1e-4,
    mfu=0.3,
    memory_bytes=1_000_000,
)


@pytest.fixture
def task(root: Path) -> Callable[..., TrainTask]:
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    fields = {"steps": 6, "batch_tokens": 256, "context_tokens": 64, "precision": "float32"}
    recipe = {"corpus": "written", "train": fields, "samples": {"prompts": ["5 green", ""], "max_tokens": 4}}
    whole = resolve(validate(TrainRecipe, {"name": "a", **recipe}), root=root)

    def make(name: str = "a", **changes: object) -> TrainTask:
        made = changed(whole, name, **changes)
        made.folder.mkdir(parents=True, exist_ok=True)
        folder.claim(made)
        return made

    return make


def events_of(path: Path) -> list[Event]:
    """The records of one event file: length, its checksum, the event, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        body = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def shown(task: TrainTask) -> dict[str, list[tuple[int, object]]]:
    """Steps and values by tag as TensorBoard shows them: files by name, where a start takes away its step and later."""
    kept: list[Event] = []
    for path in sorted((task.folder / "tensorboard").iterdir()):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START:
                kept = [other for other in kept if other.step < event.step]
            kept.append(event)
    tags: dict[str, list[tuple[int, object]]] = {}
    for event in kept:
        for value in event.summary.value:
            text = value.tensor.string_val[0].decode() if value.tensor.string_val else value.simple_value
            tags.setdefault(value.tag.partition("/")[0], []).append((event.step, text))
    return tags


def test_tensorboard_shows_every_figure_of_every_step_and_the_samples(task):
    train(task(eval_every_steps=3))
    tags = shown(task())
    every = list(range(1, 7))
    for name in ("loss", "tokens_per_second", "mfu", "lr", "grad_norm", "memory", "data_wait"):
        assert [step for step, _ in tags[name]] == every
    assert [step for step, _ in tags["val_loss"]] == [step for step, _ in tags["bits_per_byte"]] == [3, 6]
    assert [step for step, _ in tags["sample_0"]] == [step for step, _ in tags["sample_1"]] == [3, 6]
    assert all(text.startswith("    5 green") for _, text in tags["sample_0"])


def test_after_a_resume_each_step_stands_once(task):
    with Trackers(task()) as first:
        for step in range(1, 7):
            first.step(replace(FIGURES, step=step))
    with Trackers(task()) as second:  # killed after step 6, and the newest checkpoint is of step 4
        for step in range(5, 9):
            second.step(replace(FIGURES, step=step, loss=9.0))
    assert shown(task())["loss"] == [(step, 2.0 if step < 5 else 9.0) for step in range(1, 9)]


def test_a_step_costs_a_tenth_of_a_millisecond(task):
    with Trackers(task()) as found:
        found.step(FIGURES)
        file = next((task().folder / "tensorboard").iterdir())
        started_s = time.process_time()
        for step in range(2, 1_002):
            found.step(replace(FIGURES, step=step))
        cost_s = (time.process_time() - started_s) / 1_000
        assert cost_s < 5e-4  # 0.07 ms where nothing else runs
    assert len(events_of(file)) == 1_003  # with its head and the mark of its start


def test_without_tensorboardx_a_run_says_so_once_and_goes_on(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    for _ in range(2):
        with Trackers(task()) as found:
            found.step(FIGURES)
    texts = [event.text for event in events.read(task().folder)]
    assert texts == ["no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)"]
    assert not (task().folder / "tensorboard").exists()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_tracker_that_is_asked_for_and_not_installed_is_refused_before_anything_starts(root, monkeypatch, package):
    monkeypatch.setattr("pipelines.train.task.find_spec", lambda name: None)
    recipe = {"name": "a", "corpus": "nothing", "train": {"steps": 1}, "log_to": [package]}
    with pytest.raises(ConfigError, match=rf"log_to: {package} is not installed \(pip install {package}, or leave it"):
        resolve(validate(TrainRecipe, recipe), root=root)


class FailingTracker:
    name = "Weights & Biases"

    def __init__(self, task: TrainTask) -> None:
        self.steps: list[int] = []

    def step(self, step: int, values: dict[str, float]) -> None:
        raise OSError("no route to host\nand more")

    def close(self) -> None:
        pytest.fail("a tracker that failed is left alone")


def test_a_tracker_that_fails_is_told_once_and_left_and_training_goes_on(task, monkeypatch):
    monkeypatch.setattr(trackers, "WeightsAndBiases", FailingTracker)
    assert train(task(log_to=("wandb",))).step == 6
    told = [(event.step, event.text) for event in events.read(task().folder) if event.kind == "tracker"]
    assert told == [(1, "Weights & Biases is left out from here on: no route to host")]
    assert len(shown(task())["loss"]) == 6


def test_weights_and_biases_is_given_a_step_a_second_every_evaluation_and_its_own_run_again(task, monkeypatch):
    begun, logged = [], []

    def init(**how: object) -> SimpleNamespace:
        begun.append(how)
        log = lambda values, step: logged.append((step, sorted(values)))  # noqa: E731
        return SimpleNamespace(id="x1", log=log, finish=lambda: logged.append("finished"))

    wandb = SimpleNamespace(init=init, Settings=dict, Error=RuntimeError, Table=lambda columns, data: data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    now_s = iter([100.0, 100.0 + WANDB_EVERY_S / 2, 100.0 + WANDB_EVERY_S / 2, 100.1 + 2 * WANDB_EVERY_S])
    found = hosted.WeightsAndBiases(task())
    monkeypatch.setattr(hosted, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
    for step, values in enumerate([{"loss": 1.0}, {"loss": 1.0}, {"loss": 1.0, "val_loss": 2.0}, {"loss": 1.0}], 1):
        found.step(step, values)
    found.sample("sample_0", Sample(4, "p", "t"))
    found.close()
    hosted.WeightsAndBiases(task())
    assert logged == [(1, ["loss"]), (3, ["loss", "val_loss"]), (4, ["loss"]), (4, ["sample_0"]), "finished"]
    assert [how["id"] for how in begun] == [None, "x1"]
    assert begun[0]["name"] == "a" and begun[0]["config"]["train"]["batch_tokens"] == 256


def test_the_report_is_made_again_at_the_end_and_no_more_than_every_half_minute(task, monkeypatch):
    made = []
    monkeypatch.setattr(report, "write", made.append)
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: clock.now_s, time=time.time))
    with Trackers(task()) as found:
        for second in range(100):
            clock.now_s = float(second)
            found.step(replace(FIGURES, step=second + 1))
        assert len(made) == 3
    assert made == [task().folder] * 4


def test_a_report_that_cannot_be_written_does_not_end_the_run(task, monkeypatch, caplog):
    def full(place: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert train(task()).step == 6
    assert "the report could not be written: OSError(28, 'No space left" in caplog.text
