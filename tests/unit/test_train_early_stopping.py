"""A run that ends when val_loss no longer falls, and which of its checkpoints stay."""

from __future__ import annotations

import json

import pytest

from pipelines.train import folder
from pipelines.train.loop import Result, train
from tests.tiny_run import SAME, lines, opened_runs, said, scaled, tiny_tasks
from ulm.checkpoints import store

WITHOUT_GUARD = {"guard": {"loss_rise": None, "grad_norm_ratio": None}}


@pytest.fixture
def task(root):
    return tiny_tasks(root)


def spoilt_after(step):
    """Trains a task whose val_loss is at its lowest after this step; all later ones are much worse."""

    def run(task, **how):
        with opened_runs() as runs:
            return train(task, on_step=scaled(runs, step, 1000.0), **how)

    return run


def test_a_run_whose_val_loss_no_longer_falls_ends_early_with_its_best_checkpoint_as_the_result(task, root):
    a = task(train={"eval_every_steps": 1}, early_stopping={"patience": 3}, **WITHOUT_GUARD)
    assert not folder.is_finished(a)
    assert spoilt_after(3)(a) == Result(6, a.folder / "step-00000006")
    assert json.loads((a.folder / "step-00000006" / "state.json").read_text())["ended"] == "early stopping"
    [(step, text)] = said(a, "end")
    assert step == 6 and text.startswith("val_loss has not fallen for 3 evaluations; the best is 5.")
    val_losses = [loss for (loss,) in lines(a, "val_loss")]
    assert len(val_losses) == 6 and val_losses.index(min(val_losses)) == 2

    assert folder.is_finished(a)
    assert folder.result(a) == a.folder / "step-00000003"
    last = folder.last_line(a)
    assert (last["checkpoint"], last["step"]) == (str(a.folder / "step-00000003"), 3) and "status" not in last
    assert last["loss"] == lines(a, "loss")[2][0] and last["bits_per_byte"] == lines(a, "bits_per_byte")[2][0]
    folder.name_model(a, root)
    assert store.resolve("a", root=root) == a.folder / "step-00000003"
    assert store.resolve("runs/a", root=root) == a.folder / "step-00000006"


def test_small_falls_are_not_enough_where_the_recipe_asks_for_more(task):
    """The loss falls in every step here, but not by a whole nat in two."""
    a = task(train={"eval_every_steps": 1}, early_stopping={"patience": 2, "min_improvement": 1.0})
    assert train(a).step == 3
    assert lines(a, "val_loss") == sorted(lines(a, "val_loss"), reverse=True)
    assert folder.result(a) == a.folder / "step-00000003"


def test_running_again_after_an_early_end_answers_at_once(task):
    a = task(train={"eval_every_steps": 1}, early_stopping={"patience": 2, "min_improvement": 1.0})
    ended = train(a)
    before = (a.folder / "metrics.jsonl").stat().st_mtime_ns
    with opened_runs() as runs:
        assert train(a) == ended
    assert runs == [] and (a.folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_patience_and_the_best_so_far_outlive_a_stop(task):
    fields = {"train": {"eval_every_steps": 1}, "early_stopping": {"patience": 3}, **WITHOUT_GUARD}
    whole, parts = task("whole", **fields), task("parts", **fields)
    spoilt_after(3)(whole)
    steps = iter(range(9))
    assert spoilt_after(3)(parts, should_stop=lambda: next(steps) == 5).stopped
    assert store.newest(parts.folder) == parts.folder / "step-00000005"
    assert train(parts).step == 6
    assert lines(parts, *SAME) == lines(whole, *SAME)
    assert folder.result(parts) == parts.folder / "step-00000003"


@pytest.mark.parametrize(("keep_last", "keep_best", "stay"), [(1, 0, [8]), (1, 1, [4, 8]), (2, 2, [2, 4, 5, 8])])
def test_the_best_is_saved_when_it_is_found_and_stays_beside_the_last(task, keep_last, keep_best, stay):
    keep = {"keep_last": keep_last, "keep_best": keep_best}
    a = task(train={"eval_every_steps": 2, "checkpoint_every_steps": 5, **keep}, **WITHOUT_GUARD)
    spoilt_after(4)(a)
    assert [store.step_of(place) for place in store.whole_steps(a.folder)] == stay
    val_losses = dict(lines(a, "step", "val_loss"))
    for place in store.best(a.folder):
        assert store.read_state(place)["val_loss"] == val_losses[store.step_of(place)]
    assert [store.step_of(place) for place in store.best(a.folder)] == {0: [8], 1: [4, 8], 2: [4, 2, 8]}[keep_best]
