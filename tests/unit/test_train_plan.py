"""`ulm train --plan`: what it says of a run is what the run then does."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipelines.train import events, figures, plan
from pipelines.train.loop import train
from pipelines.train.prepare import prepare
from tests.written_corpus import written_corpus
from ulm.checkpoints import store
from ulm.cli import train_tables
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, train_flops_per_token
from ulm.models.decoder import build
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

TEXTS = [f"{i} men went to mow, went to mow a meadow. " * (1 + i % 3) for i in range(60)]
TRAIN = {"steps": 6, "batch_tokens": 768, "context_tokens": 64, "precision": "float32"}  # 12 rows
MACHINE_IS_BUSY = 20.0  # a factor: other programs may take the cores in a trial or in a run, but not all the time


def recipe(**fields: Any) -> TrainRecipe:
    train_fields = {**TRAIN, **fields.pop("train", {})}
    return validate(TrainRecipe, {"name": "a", "corpus": "written", "train": train_fields, **fields})


@pytest.fixture
def corpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a small corpus; its path. Trials have one thread, as training in tests has."""
    monkeypatch.setattr("ulm.runtime.num_cpus", lambda: 1)
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    return root


def files(root: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in root.rglob("*")}


def shown(planned: dict[str, Any]) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(train_tables.plan(planned))
    return capture.get()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train": {"micro_batch_rows": 4}},
        {"train": {"ema_decay": 0.9}},
        {"train": {"precision": "pure_bfloat16"}},
        {"optimizer": {"kind": "muon"}},
    ],
    ids=["plain", "micro-batches", "average", "pure_bfloat16", "muon"],
)
def test_what_is_planned_is_what_the_run_then_does(corpus, fields):
    planned = plan.plan(recipe(**fields), root=corpus)
    task = prepare(recipe(**fields), root=corpus)
    done = train(task)
    lines = list(figures.read(task.folder))
    assert planned["steps"] == len(lines) == 6 and planned["steps_done"] == 0
    assert planned["tokens"] == pytest.approx(lines[-1]["tokens"], rel=0.02)  # padding differs from batch to batch
    start = next(iter(events.read(task.folder))).text
    assert f"micro-batches of {planned['batch']['micro_batch_rows']} rows" in start
    assert planned["precision"] in start and ("compiled" in start) == planned["compile"]
    held = {
        name: sum(t.numel() * t.element_size() for t in tensors.values())
        for name, tensors in stored_tensors(done.checkpoint).items()
    }
    memory = planned["memory"]
    assert memory["weights"] == held["model"] == memory["gradients"]
    assert memory["optimizer"] + memory["average"] == held["optimizer"]
    assert planned["disk"]["checkpoint"] == held["model"] + held["optimizer"]
    real_s = statistics.median(line["step_tokens"] / line["tokens_per_second"] for line in lines[1:])
    assert planned["measured"] and 1 / MACHINE_IS_BUSY < planned["seconds_per_step"] / real_s < MACHINE_IS_BUSY


def stored_tensors(checkpoint: Path | None) -> dict[str, Any]:
    from safetensors.torch import load_file

    assert checkpoint is not None
    return {name: load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer")}


def test_the_account_of_a_run_adds_up(corpus):
    planned = plan.plan(recipe(), root=corpus)
    task = prepare(recipe(), root=corpus)
    model = build(task.spec)
    assert planned["parameters"] == num_parameters(model)
    assert planned["flops"] == train_flops_per_token(model, 64) * 6 * 768
    assert planned["tokens_per_parameter"] == planned["tokens"] / planned["parameters"]
    assert planned["batch"] == {"tokens": 768, "rows": 12, "micro_batch_rows": 12, "micro_batches": 1}
    assert planned["workers_possible"] == [1, 2, 3, 4, 6, 12]
    assert planned["memory"]["total"] == sum(
        planned["memory"][part] for part in train_tables._MEMORY if part in planned["memory"]
    )
    assert planned["disk"]["kept"] == 4
    assert planned["disk"]["total"] == 5 * planned["disk"]["checkpoint"] + plan.SPARE_BYTES
    assert planned["mfu"] == pytest.approx(
        planned["flops"] / 6 / planned["seconds_per_step"] / planned["peak_flops"], rel=1e-6
    )


def test_several_workers_have_a_share_of_the_batch_each(corpus):
    planned = plan.plan(recipe(train={"workers": {"min": 1, "max": 4}, "micro_batch_rows": 2}), root=corpus)
    assert planned["workers"] == 4
    assert planned["batch"] == {"tokens": 768, "rows": 12, "micro_batch_rows": 2, "micro_batches": 2}
    assert "4; the batch can be shared by 1, 2, 3, 4, 6, 12" in shown(planned)


def test_mistakes_are_refused_as_training_refuses_them(corpus):
    with pytest.raises(ConfigError, match="train.workers: 5 workers cannot share"):
        plan.plan(recipe(train={"workers": 5}), root=corpus)


def test_a_run_that_has_begun_is_planned_from_where_it_stands_and_a_finished_one_takes_no_time(corpus):
    task = prepare(recipe(), root=corpus)
    train(task, should_stop=iter([False, False, True]).__next__)
    planned = plan.plan(recipe(), root=corpus)
    assert planned["steps_done"] == 2 and planned["seconds"] > 0
    assert "the run goes on from step 2" in planned["remarks"]
    train(task)
    planned = plan.plan(recipe(), root=corpus)
    assert planned["seconds"] == 0 and "the run is finished: training answers at once" in planned["remarks"]


def test_a_model_too_large_to_be_tried_is_planned_by_the_usual_share_of_the_peak(corpus, monkeypatch):
    monkeypatch.setattr(plan, "MEASURE_S", 0.0)
    monkeypatch.setattr(plan, "LONGEST_S", 0.0)
    planned = plan.plan(recipe(), root=corpus)
    assert not planned["measured"] and planned["mfu"] == pytest.approx(plan.USUAL_MFU, rel=1e-6)
    assert planned["batch"]["micro_batch_rows"] == 12
    assert "assumed, 40% of" in shown(planned)
    assert any(remark.startswith("the model is too large to be tried here") for remark in planned["remarks"])


def test_a_trial_of_a_part_of_the_batch_stands_for_the_whole(corpus, monkeypatch):
    fields = {"batch_tokens": 64 * 96, "micro_batch_rows": 8}
    whole = plan.plan(recipe(train=fields), root=corpus)
    usual_row_s = whole["flops_per_token"] * 64 / (plan.USUAL_MFU * whole["peak_flops"])
    monkeypatch.setattr(plan, "MEASURE_S", 4.5 * usual_row_s)
    tried = []
    update = plan.Updater.update
    monkeypatch.setattr(
        plan.Updater,
        "update",
        lambda self, batch, share: tried.append(len(batch.inputs_BT)) or update(self, batch, share),
    )
    part = plan.plan(recipe(train=fields), root=corpus)
    assert max(tried) < 96
    assert part["measured"] and part["batch"] == whole["batch"]
    assert 1 / MACHINE_IS_BUSY < part["seconds_per_step"] / whole["seconds_per_step"] < MACHINE_IS_BUSY


@pytest.mark.parametrize(
    ("train_fields", "remark"),
    [
        ({}, "few tokens for this model: about 20 per parameter give the least loss for the work done"),
        ({"steps": 100_000}, "many tokens for this model: beyond 20 per parameter a larger one would learn more"),
        ({"steps": 100_000}, "times: from 4 on, repeated text teaches little that is new"),
    ],
)
def test_the_plan_says_what_to_think_of(corpus, train_fields, remark):
    planned = plan.plan(recipe(train=train_fields), root=corpus)
    assert any(remark in said for said in planned["remarks"])
    assert remark in shown(planned)


def test_too_little_memory_or_disk_is_said(corpus, monkeypatch):
    monkeypatch.setattr(plan, "_free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    said = " ".join(plan.plan(recipe(), root=corpus)["remarks"])
    assert "memory is short: a smaller train.micro_batch_rows" in said
    assert "the disk is too small for the checkpoints" in said


def test_the_command_writes_nothing_and_needs_no_ray(corpus, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(f"corpus: written\nname: a\ntrain: {json.dumps(TRAIN)}\n")
    before = files(corpus)
    script = "import sys; sys.modules['ray'] = None; from ulm.cli.main import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", script, "train", str(path), "--plan"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "ULM_HOME": str(corpus), "COLUMNS": "200"},
    )
    assert found.returncode == 0, found.stderr
    planned = json.loads(found.stdout.splitlines()[-1])
    assert planned["steps"] == 6 and planned["device"].startswith("cpu")
    assert "per parameter (about 20 are compute-optimal)" in found.stderr
    assert files(corpus) == before
    assert store.newest(corpus / "runs" / "a") is None
