"""Steps that are too bad to go on from: back to a good checkpoint, at a lower rate, with the same batches."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import weakref

import pytest

from pipelines.train.guard import WINDOW, Rollbacks
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.tiny_run import SAME, digests, lines, opened_runs, said, scaled, tiny_tasks
from ulm.checkpoints import store
from ulm.errors import TrainingError

NO_LIMIT_OF_LOSS = {"guard": {"loss_rise": None}}


@pytest.fixture
def task(root):
    return tiny_tasks(root)


@pytest.mark.parametrize(
    ("factor", "fields", "why"),
    [
        (float("nan"), {}, "loss nan, gradient norm nan: not finite"),
        (1e30, NO_LIMIT_OF_LOSS, "gradient norm inf: not finite"),  # the norm overflows, the loss does not
        (30.0, {}, "is more than 2 nats above the usual"),
        (300.0, NO_LIMIT_OF_LOSS, "is more than 100 times the usual"),
    ],
    ids=["nan", "overflow", "loss", "gradient"],
)
def test_a_bad_step_goes_back_to_the_newest_checkpoint_at_half_the_rate_with_the_same_batches(
    task, factor, fields, why
):
    length = {"steps": 22, "checkpoint_every_steps": 5}
    good, bad, seen = task("good", train=length, **fields), task("bad", train=length, **fields), []
    train(good)
    with opened_runs() as runs:
        spoil = scaled(runs, 18, factor)
        train(bad, on_step=lambda figures: (seen.append(figures.step), spoil(figures)))
    assert seen == [*range(1, 19), *range(16, 23)]
    [(step, text)] = said(bad, "rollback")
    assert step == 19 and why in text
    assert text.endswith("; going back to step-00000015, from there with 0.5 of the rate")
    assert lines(bad, "step", "batch_digest", "tokens") == lines(good, "step", "batch_digest", "tokens")
    assert lines(bad, *SAME)[:15] == lines(good, *SAME)[:15]
    rates = zip(lines(bad, "lr"), lines(good, "lr"), strict=True)
    assert [mine / normal for (mine,), (normal,) in rates] == [1.0] * 15 + [0.5] * 7
    assert all(math.isfinite(loss) and loss < 6 for (loss,) in lines(bad, "loss"))


def test_it_goes_further_back_when_the_same_stretch_trips_again(task):
    """And with more rollbacks than checkpoints, to the beginning."""
    a = task(train={"steps": 22, "checkpoint_every_steps": 5}, guard={"rollbacks": 9})
    with opened_runs() as runs:
        train(a, on_step=scaled(runs, 18, float("nan"), while_lr_scale_above=0.05))
    found = [(step, text.split("; ")[1]) for step, text in said(a, "rollback")]
    assert found == [
        (19, "going back to step-00000015, from there with 0.5 of the rate"),
        (19, "going back to step-00000010, from there with 0.25 of the rate"),
        (19, "going back to step-00000005, from there with 0.125 of the rate"),  # 15 was saved again meanwhile
        (19, "going back to the beginning, from there with 0.0625 of the rate"),
        (19, "going back to the beginning, from there with 0.03125 of the rate"),
    ]
    assert lines(a, "step") == [(step,) for step in range(1, 23)]


def test_a_later_stretch_begins_with_the_newest_checkpoint_again():
    rollbacks = Rollbacks()
    for step, further in ((100, 1), (90, 2), (100 + WINDOW, 1), (100 + 2 * WINDOW, 2)):
        rollbacks.trip(step, 0.5)
        assert rollbacks.checkpoints == further, step
    assert (rollbacks.times, rollbacks.lr_scale) == (4, 1 / 16)


def test_without_a_checkpoint_it_goes_back_to_the_beginning(task):
    good, bad = task("good"), task("bad")
    train(good)
    with opened_runs() as runs:
        train(bad, on_step=scaled(runs, 3, float("nan")))
    [(step, text)] = said(bad, "rollback")
    assert step == 4 and text.endswith("not finite; going back to the beginning, from there with 0.5 of the rate")
    assert lines(bad, "step", "batch_digest") == lines(good, "step", "batch_digest")
    assert lines(bad, "loss")[0] == lines(good, "loss")[0]


@pytest.mark.parametrize(
    ("every", "what"),
    [  # a checkpoint due at the very step that ruined the weights sees it first
        (2, r"step 4: weights are not finite after the update; the last checkpoint is /.*/step-00000002"),
        (None, "step 5: loss nan.*; there is no checkpoint yet"),
    ],
)
def test_after_as_many_rollbacks_as_the_recipe_allows_it_ends_and_names_what_helps(task, every, what):
    a = task(train={"checkpoint_every_steps": every}, guard={"rollbacks": 2})
    with opened_runs() as runs, pytest.raises(TrainingError, match=rf"a: {what}; a lower optim"):
        train(a, on_step=scaled(runs, 4, float("nan"), while_lr_scale_above=0.01))
    assert len(runs) == 3 and len(said(a, "rollback")) == 2


def test_an_update_that_ruins_the_weights_is_seen_by_the_evaluation_after_it(task):
    """Its own loss was finite, and a val_loss that is not has no place in metrics.jsonl."""
    wild = task(train={"eval_every_steps": 1}, optimizer={"kind": "adamw", "lr": 1e300}, guard={"rollbacks": 1})
    with pytest.raises(TrainingError, match=r"step 1: val_loss nan: not finite; there is no checkpoint yet"):
        train(wild)


def test_the_window_the_rate_and_the_count_of_rollbacks_outlive_a_stop(task):
    fields = {"train": {"steps": 22, "checkpoint_every_steps": 5}, "guard": {"rollbacks": 1}}
    whole, parts, again = task("whole", **fields), task("parts", **fields), task("again", **fields)
    for a in (whole, parts, again):
        with opened_runs() as runs:
            stop = lambda: a is not whole and len(runs) == 2 and runs[-1].step == 17  # noqa: B023, E731
            train(a, on_step=scaled(runs, 18, 30.0), should_stop=stop)
        assert len(said(a, "rollback")) == 1
    assert store.newest(parts.folder) == parts.folder / "step-00000017"
    train(parts)
    assert lines(parts, *SAME) == lines(whole, *SAME)
    assert digests(store.newest(parts.folder)) == digests(store.newest(whole.folder))
    # A leap at step 19 can only be told by what was usual before the stop; and one rollback was all that is allowed.
    with opened_runs() as runs, pytest.raises(TrainingError, match="step 19: loss .* nats above the usual .*"):
        train(again, on_step=scaled(runs, 18, 30.0))


def test_a_float16_loss_that_no_scale_makes_finite_goes_back(task):
    a = task(train={"precision": "float16", "steps": 3, "batch_tokens": 64, "checkpoint_every_steps": 1})
    with opened_runs() as runs:

        def spoil(figures):
            if figures.step == 2 and len(runs) == 1:
                runs[0].model.norm.weight.register_hook(lambda grad: grad * float("inf"))
                runs[0].updater.scaler.update(1.5e-4)  # the next halving is the last

        train(a, on_step=spoil)
    assert [step for step, _ in said(a, "rollback")] == [3]
    assert "no scale keeps the gradient finite in float16; going back to step-00000002" in said(a, "rollback")[0][1]
    assert lines(a, "step") == [(1,), (2,), (3,)]


def test_the_model_before_a_rollback_is_gone_when_the_next_is_made(task, monkeypatch):
    models, left = [], []
    real = Run.open

    def opened(*how):
        left.extend(model for model in models if model() is not None)
        run = real(*how)
        models.append(weakref.ref(run.model))
        return run

    monkeypatch.setattr(Run, "open", opened)
    optimizer = {"kind": "adamw", "lr": 1e300}
    with pytest.raises(TrainingError):
        train(task(train={"eval_every_steps": 1}, optimizer=optimizer, guard={"rollbacks": 2}))
    assert len(models) == 3 and left == []


TWO_RANKS = """
import os, pickle, sys, torch
import torch.distributed as dist
from pipelines.train.loop import train
from pipelines.train.run import Run

rank, (whole, disturbed) = int(sys.argv[2]), pickle.load(open(sys.argv[1], "rb"))
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.group", rank=rank, world_size=2)
runs, opened, spoilt = [], Run.open, []
Run.open = lambda *how: runs.append(opened(*how)) or runs[-1]

def spoil():  # asked in every step on every rank
    if rank == 1 and runs and runs[-1].step == 5 and not spoilt:
        spoilt.append(runs[-1].model.norm.weight.data.mul_(float("nan")))
    return False

print(train(whole, rank=rank, world_size=2).step)
print(train(disturbed, rank=rank, world_size=2, should_stop=spoil).step)
assert len(runs) == 3, runs
dist.destroy_process_group()
"""


def test_two_workers_go_back_together_when_one_of_them_sees_a_bad_step(task, tmp_path):
    fields = {"train": {"checkpoint_every_steps": 2, "eval_every_steps": 4, "ema_decay": 0.9}}
    whole, disturbed = task("whole", **fields), task("disturbed", **fields)
    (tmp_path / "tasks").write_bytes(pickle.dumps((whole, disturbed)))
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "tasks")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["8", "8"]] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]
    [(step, text)] = said(disturbed, "rollback")
    assert step == 6 and text.endswith("going back to step-00000004, from there with 0.5 of the rate")
    assert lines(disturbed, "step", "batch_digest") == lines(whole, "step", "batch_digest")
    assert lines(disturbed, *SAME)[:4] == lines(whole, *SAME)[:4]
    alone = task("alone", **fields)
    train(alone)
    assert lines(alone, "step", "batch_digest", "tokens") == lines(whole, "step", "batch_digest", "tokens")
    for (one,), (two,) in zip(lines(alone, "loss"), lines(whole, "loss"), strict=True):
        assert one == pytest.approx(two, abs=1e-4)  # float32 sums in another order, over eight updates
