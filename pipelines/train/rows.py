"""The rows that a run trains on, and their order."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.train.task import TrainTask
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Order
from ulm.corpus.rows import RowPlan
from ulm.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Rows and the sequence in which a run takes them, both pure functions of the task."""

    corpus: Corpus
    plan: RowPlan
    order: Order

    @classmethod
    def of(cls, task: TrainTask) -> Rows:
        """The rows of a task's training split, or of its chosen documents."""
        corpus, seed = Corpus.open(str(task.corpus), verify=False), task.train.seed
        plan = RowPlan.make(
            corpus, "train", context_tokens=task.spec.context_tokens, seed=seed, documents=task.chosen_documents()
        )
        if not plan.num_rows:
            raise ConfigError("corpus", f"{task.corpus} has no training documents among those chosen", "give it some")
        return cls(corpus, plan, Order(plan.classes, seed))
