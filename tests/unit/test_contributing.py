"""CONTRIBUTING.md's "Add a component" is true: it is followed to the letter, inside a copy of the tree and outside."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ulm
from pipelines.train.loop import train
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm import registry
from ulm.errors import ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

ROOT = Path(__file__).parents[2]
FLOAT32_ORDER = {"rtol": 0.0, "atol": 1e-5}  # float32 sums in other blocks; logits of weights this small stay below 1
KIND = "cosine:CosineAttention"


def section() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("\n## Add a component\n")[2].partition("\n## ")[0]


def blocks(language: str) -> dict[str, str]:
    """The section's blocks in a language, by the place that their first line names; commands by themselves."""
    found = re.findall(rf"^```{language}\n(.*?)^```", section(), re.DOTALL | re.MULTILINE)
    if language == "console":
        return {line[2:]: "" for block in found for line in block.splitlines()}
    named = [re.match(r"# (\S+?)(?:, .*)?\n", block) for block in found]
    assert all(named), "a block without a place"
    return {name[1]: block for name, block in zip(named, found, strict=True) if name}


PYTHON, YAML, (IN_THE_TREE, OUTSIDE) = blocks("python"), blocks("yaml"), blocks("console")
(FILE, REFERENCE, SETTINGS) = PYTHON


def test_the_section_has_the_blocks_that_are_followed_here():
    assert FILE == "ulm/components/attention/cosine.py"
    assert REFERENCE == "ulm/reference/attention.py"
    assert SETTINGS == "tests/variants.py"
    assert [*YAML] == ["cosine.yaml"]


def test_in_the_tree_the_suites_find_the_kind_by_its_file_and_hold_it(tmp_path):
    for folder in ("ulm", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / FILE).write_text(PYTHON[FILE], encoding="utf-8")
    with (tmp_path / REFERENCE).open("a", encoding="utf-8") as file:
        file.write("\n\n" + PYTHON[REFERENCE])
    variants = (tmp_path / SETTINGS).read_text(encoding="utf-8")
    begins = re.search(r"^SETTINGS.*\{.*\n", variants, re.MULTILINE)
    assert begins
    entry = PYTHON[SETTINGS].partition("\n")[2]
    (tmp_path / SETTINGS).write_text(variants.replace(begins[0], begins[0] + entry), encoding="utf-8")
    assert IN_THE_TREE.startswith(".venv/bin/python ")
    command = IN_THE_TREE.replace(".venv/bin/python", sys.executable).split()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed and int(passed[1]) >= 30  # two variants through every test of the two suites
    assert "skipped" not in found.stdout and "failed" not in found.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder outside the tree with the kind's file, where Python looks for modules."""
    module = Path(FILE).stem
    (tmp_path / f"{module}.py").write_text(PYTHON[FILE], encoding="utf-8")
    for name, text in YAML.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop(module, None)


def test_outside_the_tree_the_command_shows_a_model_with_the_kind(folder):
    command = OUTSIDE.replace("PYTHONPATH=.", f"PYTHONPATH=.{os.pathsep}{ROOT}")
    assert command != OUTSIDE
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    spec = json.loads(found.stdout.splitlines()[-1])["spec"]
    assert spec["attention"] | {"temperature": 12.0, "num_heads": 3, "num_kv_heads": 1} == spec["attention"]
    assert KIND in found.stderr


def test_outside_the_tree_a_model_with_the_kind_trains_comes_back_and_decodes_as_in_one_pass(folder, root):
    written_corpus(root, {"train": ["some words to learn. " * 5] * 20, "val": ["a word. "], "test": []})
    spec = ulm.ModelSpec.from_yaml(folder / "cosine.yaml")
    assert spec.attention.kind == KIND
    assert KIND not in ulm.kinds("attention")
    recipe = {
        "name": "cosine",
        "corpus": "written",
        "model": {"preset": "nano", "num_layers": 2, "attention": spec.attention.model_dump()},
        "train": {"steps": 12, "batch_tokens": 256, "context_tokens": 64, "precision": "float32"},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
    }
    trained = train(resolve(validate(TrainRecipe, recipe), root=root))
    lines = [json.loads(line) for line in (root / "runs" / "cosine" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    model, tokenizer = ulm.load(trained.checkpoint)
    model.eval()
    attention = model.blocks[0].attention
    assert type(attention).__name__ == "CosineAttention"
    assert attention.temperature.shape == (3,) and (attention.temperature != 12).all()  # it has learned
    tokens_BT = torch.tensor([tokenizer.encode("some words to learn. some")])
    with torch.no_grad():
        one_pass = model(tokens_BT)
    cache = model.new_cache(batch=1)
    steps = [model.step(tokens_BT[:, t : t + 1], cache) for t in range(tokens_BT.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), one_pass, **FLOAT32_ORDER)
    assert ulm.generate(model, tokenizer, "some words", max_tokens=4).tokens


def test_the_check_of_the_kind_refuses_a_spec_by_the_name_of_the_field(folder):
    for temperature in (2.5, 2.8):
        attention = {"kind": KIND, "temperature": temperature}
        for place, over in (("", {"attention": attention}), ("blocks.1.", {"blocks": [{}, {"attention": attention}]})):
            if temperature > 2.78:  # ln(256) / 2 = 2.77
                assert ulm.ModelSpec.preset("nano", **over)
                continue
            with pytest.raises(ConfigError) as caught:
                ulm.ModelSpec.preset("nano", **over)
            told = f"{place}attention.temperature: 2.5 is too low to tell 256 tokens apart (at least 2.8)"
            assert str(caught.value) == told


def test_every_slot_has_a_row_that_says_what_a_class_of_it_needs():
    rows = re.findall(r"^\| (\w+) \| (.*) \|$", section(), re.MULTILINE)
    slots = [slot for slot, package in registry.PACKAGES.items() if package.startswith("ulm.components.")]
    assert sorted(slot for slot, _ in rows if slot != "slot") == sorted(slots)
