"""Where a run's figures go beside metrics.jsonl: TensorBoard always; Weights & Biases and MLflow where asked for."""

from __future__ import annotations

from typing import Self

from pipelines.train.figures import StepFigures
from pipelines.train.samples import Sample
from pipelines.train.task import TrainTask


class Trackers:
    """The open trackers of a run."""

    def __init__(self, task: TrainTask) -> None:
        pass

    def step(self, figures: StepFigures) -> None:
        """Log a step."""

    def sample(self, sample: Sample) -> None:
        """Log a text."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
