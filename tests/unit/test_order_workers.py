"""The exact order in real processes: gloo process groups of one to four, stopped and begun again."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.train.figures import read
from pipelines.train.rows import Rows
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.extended_corpus import extension, first_corpus
from tests.process_group import train_by
from ulm.corpus.order import batch_digest
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

BATCH_ROWS, CONTEXT_TOKENS = 24, 64
WEIGHTS = (1.0, 2.0, 0.5)


@pytest.fixture
def task(root, tmp_path) -> TrainTask:
    """12 steps of 24 rows, on a corpus of sources of weights 1, 2 and 0.5."""
    first_corpus(root, tmp_path, WEIGHTS)
    return on_newest(root)


def on_newest(root) -> TrainTask:
    train_fields = {"steps": 12, "batch_tokens": BATCH_ROWS * CONTEXT_TOKENS, "context_tokens": CONTEXT_TOKENS}
    fields = {
        "name": "a",
        "corpus": "grows",
        "train": {**train_fields, "precision": "float32"},
        "samples": {"prompts": []},
    }
    return resolve(validate(TrainRecipe, fields), root=root)


def lines(task: TrainTask, *keys: str) -> list[tuple]:
    return [tuple(line.get(key) for key in keys) for line in read(task.folder)]


def indices(rows: Rows, parts: list[dict[str, np.ndarray]]) -> list[list[int]]:
    """Which rows of the plan these steps' batches are, by what they hold."""
    whole = rows.plan.batch(np.arange(rows.plan.num_rows))
    both = np.concatenate([whole.inputs_BT, whole.targets_BT], 1)
    index = {row.tobytes(): number for number, row in enumerate(both)}
    assert len(index) == rows.plan.num_rows, "two rows of the same tokens cannot be told apart"
    return [
        [index[row.tobytes()] for row in np.concatenate([part["inputs_BT"], part["targets_BT"]], 1)] for part in parts
    ]


def test_one_then_three_then_two_then_four_workers_take_one_sequence_of_batches_also_where_the_corpus_grew(
    task, root, tmp_path
):
    """Three steps each. The corpus is extended after six, in the third epoch; the last steps are of the fourth."""
    taken = [(workers, train_by(task, workers, steps=3)) for workers in (1, 3)]
    extension(root, tmp_path, "grows", WEIGHTS)
    grown = on_newest(root)
    taken += [(workers, train_by(grown, workers, steps=3)) for workers in (2, 4)]

    rows, before = Rows.of(grown), Rows.of(task, (legs := Rows.of(grown).legs)[:1])
    assert [leg.cursor for leg in legs] == [0, 6 * BATCH_ROWS]
    batches = rows.order.rows(0, 12 * BATCH_ROWS).reshape(12, BATCH_ROWS)
    assert batches[:6].tolist() == before.order.rows(0, 6 * BATCH_ROWS).reshape(6, BATCH_ROWS).tolist()
    assert lines(task, "step", "batch_digest") == [(1 + n, batch_digest(batch)) for n, batch in enumerate(batches)]
    for start, (workers, of_ranks) in enumerate(taken):
        by_rank = [indices(rows, parts) for parts in of_ranks]
        for step in range(3):
            global_batch = batches[3 * start + step].tolist()
            assert [by_rank[rank][step] for rank in range(workers)] == [
                global_batch[r::workers] for r in range(workers)
            ]
    old_rows, all_rows = before.order.epoch_rows, rows.order.epoch_rows
    end_of_third = 3 * old_rows + all_rows - old_rows
    assert 2 * old_rows < 6 * BATCH_ROWS < 3 * old_rows < end_of_third < 12 * BATCH_ROWS


def test_two_workers_stopped_and_begun_again_have_the_losses_of_two_that_were_not_bit_for_bit(task):
    whole, parts = changed(task, "whole", num_steps=5), changed(task, "parts", num_steps=5)
    train_by(whole, 2)
    train_by(parts, 2, steps=2)
    assert len(lines(parts, "step")) == 2
    train_by(parts, 2)
    keys = ("step", "loss", "grad_norm", "batch_digest", "tokens", "val_loss")
    assert lines(parts, *keys) == lines(whole, *keys)
    assert len(lines(whole, "step")) == 5
