"""Odd files, odd values and odd weights: what is acknowledged stays, and what is refused is refused by name."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml

from pipelines.train import figures, folder, job, status
from pipelines.train.loop import train
from pipelines.train.prepare import prepare
from pipelines.train.run import Best
from tests.tiny_run import lines, opened_runs, said, stop_after, tiny_tasks
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest, write_manifest
from ulm.components import loss
from ulm.errors import ArtefactError, ClusterError, ConfigError, UnsupportedError
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe


@pytest.fixture
def task(root):
    return tiny_tasks(root)


# ---- samples


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_training(task, root):
    recipe = task(samples={"prompts": ["the", "a " * 40]}).recipe
    with pytest.raises(ConfigError, match=r"^samples\.prompts\.1: \d+ tokens, and the model's context is 32"):
        prepare(recipe, root=root)


def test_samples_that_fail_are_told_and_cost_no_step(task, monkeypatch):
    def fail(*_):
        raise UnsupportedError("no pen")

    monkeypatch.setattr("pipelines.train.samples.generate", lambda *_, **__: fail())
    a = task(samples={"prompts": ["the"], "every_steps": 1}, train={"checkpoint_every_steps": 4})
    assert train(a).checkpoint == a.folder / "step-00000008"
    assert said(a, "samples") == [(step, "no samples: no pen") for step in range(1, 9)]


# ---- evaluation


def test_small_falls_add_up_to_one_that_counts():
    best = Best()
    for step in range(1, 40):
        best.see(5.0 - 0.02 * step, step, min_improvement=0.05)
        assert best.evaluations_since <= 2
    for step in range(40, 44):
        best.see(4.5, step, min_improvement=0.05)
    assert best.evaluations_since >= 4 and best.step == 39


def test_losses_on_more_held_out_text_are_not_compared_with_those_on_less(task):
    fields = {"eval_every_steps": 1, "keep_best": 1, "keep_last": 3}
    train(task(train={**fields, "eval_tokens": 1}), should_stop=stop_after(4))
    more = task(train={**fields, "eval_tokens": None})
    with opened_runs() as runs:
        train(more, should_stop=stop_after(1))
    assert runs[0].best.step == 5, "the best of those on the whole text"
    assert [path.name for path in store.best(more.folder)] == ["step-00000005"]
    assert [entry["name"] for entry in status.checkpoints(more.folder) if entry["best"]] == ["step-00000005"]


# ---- weights


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_weights_that_are_not_finite_are_never_saved_and_push_out_no_checkpoint(task, ema_decay):
    a = task(
        train={"checkpoint_every_steps": 2, "keep_last": 1, "keep_best": 0, "eval_tokens": 1, "ema_decay": ema_decay}
    )
    done = []

    def spoil(step_figures):
        if step_figures.step == 4 and not done:
            done.append(store.newest(a.folder))
            runs[-1].model.norm.weight.data[0] = float("nan")
            if runs[-1].average:
                runs[-1].average["norm.weight"][0] = float("nan")

    with opened_runs() as runs:
        result = train(a, on_step=spoil)
    assert [(step, text.partition(";")[0]) for step, text in said(a, "rollback")] == [
        (4, "weights are not finite after the update")
    ]
    assert "going back to step-00000002" in said(a, "rollback")[0][1]
    assert result.step == 8
    assert all(tensor.isfinite().all() for tensor in store.load(result.checkpoint)[0].state_dict().values())


def test_in_float16_the_gradient_of_the_head_stays_finite_however_many_tokens_are_taken_at_once(monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK", loss.GPU_CHUNK)
    generator = torch.Generator().manual_seed(0)
    x_BTD = (torch.randn(1, 65_536, 16, generator=generator) + 3).requires_grad_()
    head, targets_BT = torch.nn.Linear(16, 64, bias=False), torch.zeros(1, 65_536, dtype=torch.long)

    def gradient() -> torch.Tensor:
        head.weight.grad = None
        with torch.autocast("cpu", torch.float16):
            nats = loss.summed_nats(x_BTD, targets_BT, head, 64)
        (nats / 65_536).backward()
        return head.weight.grad

    assert gradient().isfinite().all()
    monkeypatch.setattr(loss, "FLOAT16_TOKENS", loss.GPU_CHUNK)
    assert not gradient().isfinite().all(), "what the bound is for"


# ---- values


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"train": {"steps": 1, "batch_tokens": 32 * 10**30}}, "train.batch_tokens"),
        ({"train": {"steps": 1, "workers": 10**30}}, "train.workers"),
        ({"train": {"steps": 1, "workers": {"min": 1, "max": 10**12}}}, "train.workers"),
        ({"train": {"tokens_per_parameter": float("inf")}}, "train.tokens_per_parameter"),
        ({"train": {"tokens_per_parameter": 1e308}}, "train.tokens_per_parameter"),
        ({"train": {"tokens": 10**400}}, "train.tokens"),
        ({"train": {"steps": 1, "seed": 2**64}}, "train.seed"),
        ({"train": {"steps": 1, "seed": -1}}, "train.seed"),
        ({"train": {"steps": 1, "micro_batch_rows": 10**30}}, "train.micro_batch_rows"),
        ({"train": {"steps": 1}, "optimizer": {"lr": float("inf")}}, "optimizer.lr"),
        ({"train": {"steps": 1}, "guard": {"loss_rise": float("nan")}}, "guard.loss_rise"),
        ({"train": {"steps": 1}, "samples": {"temperature": float("inf")}}, "samples.temperature"),
        ({"train": {"steps": 1}, "model": {"size": "25M", "d_model": 2**40}}, "model.d_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_beyond_what_any_run_needs_are_refused_by_name(fields, place):
    with pytest.raises(ConfigError) as refused:
        validate(TrainRecipe, {"name": "a", "corpus": "x", **fields})
    assert str(refused.value).startswith(place), refused.value


def test_the_recipe_of_a_start_that_was_refused_is_not_taken_for_the_one_that_trained(task, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    wide = task(train={"workers": 4})
    with pytest.raises(ClusterError, match=r"^train\.workers: 4 workers need 4 CPUs"):
        job.run(wide.recipe, root=wide.folder.parents[1], task=wide)
    narrow = task(optimizer={"lr": 1e-3})
    folder.write_recipe(narrow, narrow.recipe)
    train(narrow)
    assert yaml.safe_load((narrow.folder / "recipe.yaml").read_text())["optimizer"]["lr"] == 1e-3


# ---- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("task.json", '{"train": []}'),
        ("task.json", "[" * 100_000),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", "no JSON\n"),
        ("metrics.jsonl", '{"step": "x", "bits_per_byte": "y"}\n'),
        ("events.jsonl", '{"time": "x", "step": 1, "kind": "start", "text": ""}\n'),
        ("events.jsonl", '{"time": 1e300, "step": 1, "kind": "start", "text": ""}\n'),
        ("events.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_a_folder_with_an_odd_file_is_listed_like_any_other(task, name, text):
    a = task()
    train(a, should_stop=stop_after(2))
    (a.folder / name).write_text(text)
    found = status.of(a.folder)
    assert found["run"] == "a" and found["status"] in ("interrupted", "finished")


def test_one_damaged_line_of_the_metrics_costs_that_line_alone_and_is_told(task):
    a = task()
    train(a, should_stop=stop_after(6))
    path = a.folder / figures.FILE
    whole = path.read_bytes().splitlines(keepends=True)
    whole[1] = b"\0" * 50 + b"\n"
    path.write_bytes(b"".join(whole))
    train(a)
    assert [step for (step,) in lines(a, "step")] == [1, 3, 4, 5, 6, 7, 8]
    assert said(a, "damaged") == [(6, "1 lines of metrics.jsonl cannot be read and are left out")]


@pytest.mark.parametrize(
    "change",
    [
        {"rollbacks": {"bogus": 1}},
        {"best": {}, "val_loss": "x"},
        {"cursor": "x"},
        {"step": 3},
    ],
    ids=str,
)
def test_a_state_that_is_not_ours_sets_its_checkpoint_aside_though_its_digests_agree(task, change):
    a = task(train={"checkpoint_every_steps": 2})
    train(a, should_stop=stop_after(4))
    reseal(a.folder / "step-00000004", {**state_of(a), **change})
    assert train(a).step == 8
    [(_, text)] = said(a, "damaged")
    assert "step-00000002, is taken" in text


def state_of(task):
    return json.loads((task.folder / "step-00000004" / "state.json").read_text())


def reseal(place, state):
    """A checkpoint with another state and a manifest that fits it."""
    lineage = read_manifest(place).model_dump(exclude={"format_version", "kind", "files", "digest", "manifest_digest"})
    artefacts.write_json(place / "state.json", state)
    (place / "manifest.json").unlink()
    write_manifest(place, **lineage)


def test_rates_come_from_the_recipe_whatever_a_checkpoint_says(task):
    a = task(train={"checkpoint_every_steps": 4})
    train(a, should_stop=stop_after(4))
    state = state_of(a)
    text = json.dumps(state).replace(json.dumps(a.optimizer.lr), "7.0")
    assert "7.0" in text
    reseal(a.folder / "step-00000004", json.loads(text))
    with opened_runs() as runs:
        train(a)
    assert {group["peak_lr"] for group in runs[0].optimizer.param_groups} == {a.optimizer.lr}


def test_a_recipe_file_that_is_none_is_named(task):
    a = task()
    train(a, should_stop=stop_after(2))
    (a.folder / "recipe.yaml").write_text("[1, 2]")
    with pytest.raises(ArtefactError, match=r"recipe\.yaml: is no recipe; remove it"):
        folder.write_recipe(a, a.recipe)


def test_a_run_that_is_asked_to_stop_says_so_in_its_events_and_log(task, caplog):
    a = task(train={"eval_every_steps": 2})
    with caplog.at_level(logging.INFO, "pipelines"):
        train(a, should_stop=stop_after(3))
    assert said(a, "stop") == [(3, "ended as it was asked to; the same command goes on from here")]
    log = (a.folder / "log").read_text()
    assert "step 2 of 8: loss" in log and "val_loss" in log
