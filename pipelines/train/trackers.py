"""Where a run's figures go beside metrics.jsonl: TensorBoard, report.html, and Weights & Biases or MLflow if asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self

from pipelines.train import events, report
from pipelines.train.figures import StepFigures
from pipelines.train.samples import Sample
from pipelines.train.task import TrainTask
from ulm.errors import ConfigError

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
FLUSH_EVERY_S = 10.0  # to the disk, or over the network
WANDB_EVERY_S = 1.0  # it takes about a millisecond a step, and a step may take ten; evaluations are always logged
MLFLOW_BATCH = 1_000  # metrics of one call, by its API's limit
REPORT_EVERY_S = 30.0
REPORT_SHARE = 0.01  # of the time at most, for runs so long that their files take a while to read
PROJECT = "ulm"


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


class WeightsAndBiases:
    """A run of the project `ulm` at Weights & Biases, or in the run's folder where WANDB_MODE is offline.

    A resumed run goes on with its own; steps that are done again are not logged again.
    """

    name = "Weights & Biases"

    def __init__(self, task: TrainTask) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=PROJECT,
                name=task.run,
                id=_remembered(task.folder / "wandb.id"),
                resume="allow",
                dir=str(task.folder),
                config=_config(task),
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise ConfigError("log_to", f"wandb: {error}", "`wandb login`, or WANDB_MODE=offline") from None
        _remember(task.folder / "wandb.id", self._run.id)
        self._wandb = wandb
        self._logged_s = 0.0

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log a step's scalars, at most about one step a second and every evaluation."""
        now_s = time.monotonic()
        if now_s - self._logged_s > WANDB_EVERY_S or "val_loss" in values:
            self._run.log(values, step=step)
            self._logged_s = now_s

    def sample(self, tag: str, sample: Sample) -> None:
        """Log a text, as a table of one row."""
        row = self._wandb.Table(columns=["step", "prompt", "text"], data=[[sample.step, sample.prompt, sample.text]])
        self._run.log({tag: row}, step=sample.step)

    def close(self) -> None:
        """Write all that is held back."""
        self._run.finish()


class MlFlow:
    """A run of the experiment `ulm` of MLflow: where MLFLOW_TRACKING_URI says, else in mlflow.db beside `runs`.

    A thread sends what has come together. A resumed run goes on with its own; steps done again are not logged again.
    """

    name = "MLflow"

    def __init__(self, task: TrainTask) -> None:
        import mlflow
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        root = task.folder.parent.parent
        self._texts = None if mlflow.is_tracking_uri_set() else (root / "mlflow-texts").as_uri()
        uri = f"sqlite:///{root / 'mlflow.db'}" if self._texts else None
        self._metric = Metric
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._run_id = _remembered(task.folder / "mlflow.id") or self._new_run(task)
            logged = self._client.get_metric_history(self._run_id, "loss")
        except MlflowException as error:
            raise ConfigError("log_to", f"mlflow: {error}", "set MLFLOW_TRACKING_URI to a server's address") from None
        self._last_step = max((metric.step for metric in logged), default=0)
        self._held: list[Any] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: Future[None] | None = None
        self._sent_s = time.monotonic()

    def _new_run(self, task: TrainTask) -> str:
        known = self._client.get_experiment_by_name(PROJECT)
        experiment_id = known.experiment_id if known else self._client.create_experiment(PROJECT, self._texts)
        run_id: str = self._client.create_run(experiment_id, run_name=task.run).info.run_id
        for key, value in _flat(_config(task)):
            self._client.log_param(run_id, key, value)
        _remember(task.folder / "mlflow.id", run_id)
        return run_id

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log a step's scalars."""
        if step > self._last_step:
            now_ms = int(1_000 * time.time())
            self._held += [self._metric(name, value, now_ms, step) for name, value in values.items()]
            self._last_step = step
        if time.monotonic() - self._sent_s > FLUSH_EVERY_S:
            self._send()

    def sample(self, tag: str, sample: Sample) -> None:
        """Log a text, as a file."""
        self._wait()
        content, file = f"{sample.prompt}{sample.text}", f"{tag}/step-{sample.step:08d}.txt"
        self._sending = self._thread.submit(self._client.log_text, self._run_id, content, file)

    def _send(self) -> None:
        self._wait()
        held, self._held, self._sent_s = self._held, [], time.monotonic()
        self._sending = self._thread.submit(self._log, held)

    def _log(self, held: list[Any]) -> None:
        for start in range(0, len(held), MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=held[start : start + MLFLOW_BATCH])

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def close(self) -> None:
        """Write all that is held back."""
        try:
            self._send()
            self._wait()
            self._client.set_terminated(self._run_id)
        finally:
            self._thread.shutdown()


def _config(task: TrainTask) -> dict[str, Any]:
    """What a tracker is told of the task: all that decides its weights, and its recipe."""
    return {**task.recipe.model_dump(mode="json", exclude_unset=True), **task.identity()}


def _flat(values: dict[str, Any], place: str = "") -> list[tuple[str, Any]]:
    """Values by dotted place, as MLflow's parameters are; it takes 500 characters."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        where = f"{place}.{key}" if place else key
        found += _flat(value, where) if isinstance(value, dict) else [(where, str(value)[:500])]
    return found


def _remembered(path: Path) -> str | None:
    return path.read_text(encoding="ascii").strip() if path.is_file() else None


def _remember(path: Path, run_id: str) -> None:
    path.write_text(run_id, encoding="ascii")
