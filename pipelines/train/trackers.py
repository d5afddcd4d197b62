"""Where a run's figures go beside metrics.jsonl: TensorBoard, report.html, and Weights & Biases or MLflow if asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from pipelines.train import events, report
from pipelines.train.figures import StepFigures
from pipelines.train.hosted import MlFlow, WeightsAndBiases
from pipelines.train.samples import Sample
from pipelines.train.task import TrainTask

log = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"  # folder of the run
# What a tracker is given of StepFigures, by the name that it has there.
SCALARS = {
    "loss": "loss",
    "val_loss": "val_loss",
    "bits_per_byte": "bits_per_byte",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "memory": "memory_bytes",
    "data_wait": "data_wait_s",
}
FLUSH_EVERY_S = 10.0  # of TensorBoard's files
REPORT_EVERY_S = 30.0
REPORT_SHARE = 0.01  # of the time at most, for runs so long that their files take a while to read


class Tracker(Protocol):
    """One place that figures and texts go to."""

    name: str

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log a step's scalars."""

    def sample(self, tag: str, sample: Sample) -> None:
        """Log a text under a name."""

    def close(self) -> None:
        """Write all that is held back."""


class Trackers:
    """The open trackers of a run, and its report. One that fails is told as an event and left; training goes on."""

    def __init__(self, task: TrainTask) -> None:
        self._task = task
        self._reported_s, self._report_took_s = time.monotonic(), 0.0
        self._open: list[Tracker] = []
        self._step = 0
        try:
            self._open.append(TensorBoard(task.folder / TENSORBOARD))
        except ImportError:
            self._say_once("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")
        openers: dict[str, Callable[[TrainTask], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MlFlow}
        self._open += [openers[name](task) for name in task.recipe.log_to]

    def step(self, figures: StepFigures) -> None:
        """Log a step."""
        self._step = figures.step
        values = {name: value for name, field in SCALARS.items() if (value := getattr(figures, field)) is not None}
        for tracker in tuple(self._open):
            self._try(tracker, tracker.step, figures.step, values)
        if time.monotonic() - self._reported_s > max(REPORT_EVERY_S, self._report_took_s / REPORT_SHARE):
            self._report()

    def sample(self, sample: Sample) -> None:
        """Log a text."""
        prompts = self._task.recipe.samples.prompts
        tag = f"sample_{prompts.index(sample.prompt)}"
        for tracker in tuple(self._open):
            self._try(tracker, tracker.sample, tag, sample)

    def _try(self, tracker: Tracker, call: Callable[..., None], *given: Any) -> None:
        try:
            call(*given)
        except Exception as error:  # noqa: BLE001  other people's code and servers; a run of days must not end by them
            self._open.remove(tracker)
            problem = str(error).strip().partition("\n")[0][:300] or repr(error)
            events.say(self._task.folder, self._step, "tracker", f"{tracker.name} is left out from here on: {problem}")

    def _say_once(self, text: str) -> None:
        if not any(event.text == text for event in events.read(self._task.folder)):
            events.say(self._task.folder, self._step, "tracker", text)

    def _report(self) -> None:
        started_s = time.monotonic()
        try:
            report.write(self._task.folder)
        except Exception as error:  # noqa: BLE001  a page is not worth a run of days, and can be made again
            log.warning("%s: the report could not be written: %r", self._task.run, error)
        self._reported_s = time.monotonic()
        self._report_took_s = self._reported_s - started_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in tuple(self._open):
            self._try(tracker, tracker.close)
        self._report()


class TensorBoard:
    """Event files of TensorBoard, one for each time that the run was opened."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        # SummaryWriter takes an event, a pickle and a queue for each scalar: 0.7 ms a step. This takes 0.06.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import text

        folder.mkdir(exist_ok=True)
        # Its names have the time in seconds; the number keeps two within a second apart, and in order.
        number = len(list(folder.glob("events.out.tfevents.*")))
        self._writer = EventsWriter(str(folder / "events"), f".{number:04d}")
        self._proto, self._summary, self._text = event_pb2, summary_pb2, text
        self._begun = False
        self._flushed_s = time.monotonic()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log a step's scalars."""
        value = self._summary.Summary.Value
        self._write(
            step, self._summary.Summary(value=[value(tag=tag, simple_value=number) for tag, number in values.items()])
        )

    def sample(self, tag: str, sample: Sample) -> None:
        """Log a text, in a block that Markdown leaves as it is."""
        shown = "\n".join(f"    {line}" for line in f"{sample.prompt}{sample.text}".splitlines())
        self._write(sample.step, self._text(tag, shown))

    def _write(self, step: int, summary: Any) -> None:
        now_s = time.time()
        if not self._begun:  # steps from here on that an earlier file has were lost with a killed process
            log_start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._writer.write_event(self._proto.Event(wall_time=now_s, step=step, session_log=log_start))
            self._begun = True
        self._writer.write_event(self._proto.Event(wall_time=now_s, step=step, summary=summary))
        if time.monotonic() - self._flushed_s > FLUSH_EVERY_S:
            self._writer.flush()
            self._flushed_s = time.monotonic()

    def close(self) -> None:
        """Write all that is held back."""
        self._writer.close()
