"""Every preset trains, by the loop that trains everything and with what it proposes for training itself."""

from __future__ import annotations

import pytest

import ulm
from pipelines.train import figures
from pipelines.train.loop import train
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe
from ulm.spec import preset_sizes

STEPS = 6
TEXTS = [f"{i} men went to mow, went to mow a meadow. " * (1 + i % 3) for i in range(40)]
SIZES = [
    pytest.param(preset, size, marks=[] if size in ("nano", "micro") else [pytest.mark.slow], id=f"{preset}-{size}")
    for preset, stored in preset_sizes().items()
    for size in stored["sizes"]
]


@pytest.fixture
def root(tmp_path):
    written_corpus(tmp_path, {"train": TEXTS[10:], "val": TEXTS[:10]})
    return tmp_path


@pytest.mark.parametrize(("preset", "size"), SIZES)
def test_a_few_steps_of_every_preset_at_every_size_lower_the_loss(root, preset, size):
    model = {"preset": preset, "size": size, "context_tokens": 32}
    fields = {"steps": STEPS, "batch_tokens": 512, "precision": "float32", "compile": False}
    samples = {"prompts": []}
    recipe = {"name": "a", "corpus": "written", "model": model, "train": fields, "samples": samples}
    task = resolve(validate(TrainRecipe, recipe), root=root)
    assert task.optimizer.kind == ("muon" if preset == "modern" else "adamw")
    result = train(task)
    losses = [line["loss"] for line in figures.read(task.folder)]
    assert len(losses) == STEPS
    assert min(losses) < losses[0] - 1  # the last may be higher: so short a run has no time to warm up
    assert ulm.load(result.checkpoint)[0].spec == task.spec
