"""Weights & Biases and MLflow, as a run's figures go there. Neither is imported unless a recipe asks for it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.train.samples import Sample
from pipelines.train.task import TrainTask
from ulm.errors import ConfigError

SEND_EVERY_S = 10.0  # to MLflow
WANDB_EVERY_S = 1.0  # it takes about a millisecond a step, and a step may take ten; evaluations are always logged
MLFLOW_BATCH, MLFLOW_PARAMS = 1_000, 100  # metrics and parameters of one call, by its API's limits
PROJECT = "ulm"


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
        from mlflow.entities import Param

        known = self._client.get_experiment_by_name(PROJECT)
        experiment_id = known.experiment_id if known else self._client.create_experiment(PROJECT, self._texts)
        run_id: str = self._client.create_run(experiment_id, run_name=task.run).info.run_id
        params = [Param(key, value) for key, value in _flat(_config(task))]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MLFLOW_PARAMS])
        _remember(task.folder / "mlflow.id", run_id)
        return run_id

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log a step's scalars."""
        if step > self._last_step:
            now_ms = int(1_000 * time.time())
            self._held += [self._metric(name, value, now_ms, step) for name, value in values.items()]
            self._last_step = step
        if time.monotonic() - self._sent_s > SEND_EVERY_S:
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


def _flat(values: dict[str, Any], place: str = "") -> list[tuple[str, str]]:
    """Values by dotted place, as MLflow's parameters are; it takes 500 characters."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        where = f"{place}.{key}" if place else key
        found += _flat(value, where) if isinstance(value, dict) else [(where, str(value)[:500])]
    return found


def _remembered(path: Path) -> str | None:
    return path.read_text(encoding="ascii").strip() if path.is_file() else None


def _remember(path: Path, run_id: str) -> None:
    path.write_text(run_id, encoding="ascii")
