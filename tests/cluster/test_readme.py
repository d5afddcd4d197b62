"""The README is true: its files are written and its commands run, in order, as a newcomer would."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ulm.recipes.train import EarlyStopping, Guard, Resources, Samples, Train, TrainRecipe

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def environment_of(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ULM_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "no_proxy": "127.0.0.1",
    }


def run_page(page: str, folder: Path, port: str = "8123") -> dict[str, str]:
    """The stdout of every console command of a page, its files written and its commands run in order."""
    environment = environment_of(folder)
    for kind, ending in (("yaml", "yaml"), ("python", "py")):
        for block in blocks(page, kind):
            name = re.match(rf"# (\S+\.{ending})\n", block)
            assert name or kind == "python", block
            if name:
                (folder / name[1]).write_text(block.replace("8123", port))
    commands = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    outputs = {}
    try:
        for command in commands:
            found = subprocess.run(
                command.replace("8123", port),
                shell=True,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
            outputs[command] = found.stdout
    finally:
        subprocess.run(["ulm", "serve", "down"], env=environment, capture_output=True, timeout=TIMEOUT_S)
    return outputs


def results(outputs: dict[str, str]) -> dict[str, Any]:
    """The JSON that each command ended with."""
    said = {command: out for command, out in outputs.items() if not command.startswith("python") and out.strip()}
    return {command: json.loads(out.splitlines()[-1]) for command, out in said.items()}


@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial_runs_in_order(tmp_path: Path) -> None:
    with socket.socket() as probe:  # the README's port may be taken here
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    outputs = run_page("README.md", tmp_path, port)
    last = results(outputs)
    assert sum(command.startswith("ulm ") for command in last) >= 10
    assert last["ulm train train.yaml"]["step"] == 40
    assert last["ulm runs show first"]["step"] == 40
    assert last["ulm swarm train swarm.yaml"]["experts"] == 3
    completion = next(value for command, value in last.items() if "v1/completions" in command)
    assert completion["model"] == "swarm/mixture" and completion["ulm"]["calls"]
    chat = next(value for command, value in last.items() if "v1/chat/completions" in command)
    assert chat["choices"][0]["message"]["content"] in ('"yes"', '"no"')
    assert "'member': 'e0" in outputs["python ask.py"]
    assert (tmp_path / "first-hf" / "config.json").is_file()
    (example,) = [block for block in blocks("README.md", "python") if not block.startswith("# ")]
    script = f"{example}\nprint(logits_BTV.shape)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment_of(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "torch.Size([2, 3, 1024])" in done.stdout and (tmp_path / "folder" / "manifest.json").is_file(), done.stderr


@pytest.mark.timeout(600)
def test_every_command_of_the_page_on_corpora_runs_in_order(tmp_path: Path) -> None:
    last = results(run_page("docs/corpora.md", tmp_path))
    planned, built = last["ulm corpus build docs.yaml --plan"], last["ulm corpus build docs.yaml"]
    dropped = built["documents"]["dropped"]
    unique = built["documents"]["kept"] + dropped["duplicate_exact"] + dropped["duplicate_near"]
    assert planned["documents"] == pytest.approx(unique, rel=0.05)  # all of these sources is its sample
    assert last["ulm corpus show docs"]["digest"] == built["digest"]
    assert (Path(built["corpus"]) / "report.html").is_file()
    assert last["ulm corpus show docs --token train:1000"]["document"]["domain"] == "reference"
    compared = last["ulm corpus diff docs docs-and-more"]
    assert compared["documents"]["added"] == 2 and compared["documents"]["removed"] == 0
    assert last["ulm corpus verify docs-and-more"]["verified"]


@pytest.mark.timeout(600)
def test_every_command_of_the_page_on_training_runs_in_order(tmp_path: Path) -> None:
    last = results(run_page("docs/training.md", tmp_path))
    planned, trained = last["ulm train first.yaml --plan"], last["ulm train first.yaml --no-ray"]
    assert planned["steps"] == trained["step"] == 20
    assert last["ulm train first.yaml --set name=two-workers --set train.steps=10"]["step"] == 10
    listed = {run["run"]: run for run in last["ulm runs list"]["runs"]}
    assert {name: run["status"] for name, run in listed.items()} == {"first": "finished", "two-workers": "finished"}
    assert listed["first"]["parameters"] == planned["parameters"] and listed["first"]["loss"] == trained["loss"]
    assert last["ulm runs show first"]["best"] == Path(trained["checkpoint"]).name
    assert Path(last["ulm runs show first"]["report"]).is_file()
    assert 0 < last["ulm runs logs first -n 5"]["lines"] <= 5


def test_the_page_on_training_names_every_key_of_its_recipe_and_no_other() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`.+?`[^|]*) \| ([^\n]*)", page, re.MULTILINE))
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    sections = {"early_stopping": EarlyStopping, "guard": Guard, "samples": Samples, "resources": Resources}
    of_train = set(Train.model_fields)
    assert named - of_train == {"optimizer", "schedule", "log_to", *sections}
    assert of_train <= named
    assert set(TrainRecipe.model_fields) <= named | {"name", "corpus", "model", "init_from", "train"}
    for section, fields in sections.items():
        text = next(text for row, text in rows.items() if row == f"`{section}`")
        assert set(fields.model_fields) <= set(re.findall(r"\w+", text)), section
