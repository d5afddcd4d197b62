"""The rows that a run trains on, and their order."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.train import legs
from pipelines.train.legs import Leg
from pipelines.train.task import TrainTask
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Joined, Order
from ulm.corpus.rows import RowPlan, Version
from ulm.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Rows and the sequence in which a run takes them, both pure functions of the task and the legs of its run."""

    corpus: Corpus
    plan: RowPlan
    order: Order
    legs: tuple[Leg, ...]

    @classmethod
    def of(cls, task: TrainTask, of_run: tuple[Leg, ...] | None = None) -> Rows:
        """The rows of a task's training split, or of its chosen documents; legs as the run's folder has them.

        Only the newest corpus is read: the documents of those that it extends are its first.
        """
        of_run = of_run or legs.of(task)
        corpus, seed = Corpus.open(str(task.corpus), verify=False), task.train.seed
        plan = RowPlan.make(
            corpus,
            "train",
            context_tokens=task.spec.context_tokens,
            seed=seed,
            documents=task.chosen_documents(),
            versions=[Version(leg.corpus, leg.documents) for leg in of_run],
        )
        if not plan.num_rows:
            raise ConfigError("corpus", f"{task.corpus} has no training documents among those chosen", "give it some")
        joined = [Joined(leg.cursor, classes) for leg, classes in zip(of_run[1:], plan.parts[1:], strict=True)]
        return cls(corpus, plan, Order(plan.parts[0], seed, joined), of_run)
