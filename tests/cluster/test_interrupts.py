"""Ctrl-C and SIGTERM in the middle of a verb: no process stays, nothing half-written is left, nothing saved is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.processes import interrupt, nothing_is_left, processes_of, start, wait_for
from tests.written_corpus import write_corpus

pytestmark = pytest.mark.timeout(600)


def train_recipe(tmp_path: Path, steps: int) -> Path:
    recipe = tmp_path / "train.yaml"
    recipe.write_text(f"corpus: tiny\ntrain: {{steps: {steps}, batch_tokens: 512, context_tokens: 64}}\nname: long\n")
    return recipe


# SIGTERM, and how the run goes on: test_train_faults.py
def test_ctrl_c_while_training_saves(root: Path, tmp_path: Path) -> None:
    write_corpus(root, [("a", "train", f"text number {i} of many. " * 20) for i in range(20)])
    metrics = root / "runs" / "long" / "metrics.jsonl"
    child = start(root, "train", str(train_recipe(tmp_path, 1_000_000)), "--set", "train.eval_tokens=1000")
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3, "the first steps")
    code, out, err = interrupt(child, signal.SIGINT)
    line = json.loads(out.splitlines()[-1])
    assert (code, line["status"]) == (143, "interrupted"), err
    saved = sorted((root / "runs" / "long").glob("step-*"))
    assert line["checkpoint"] == str(saved[-1]) and line["step"] == int(saved[-1].name[5:])
    nothing_is_left(root)


def test_a_signal_while_building_a_corpus_keeps_what_is_done_and_lists_nothing(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "corpus.yaml"
    recipe.write_text(f"sources: [{{path: {Path(os.__file__).parent}, format: code}}]\nname: interrupted\n")
    child = start(root, "corpus", "build", str(recipe))
    wait_for(lambda: child.poll() is not None or list(root.glob("corpora/build.*/parts/*[0-9]")), "the first part")
    code, _, err = interrupt(child, signal.SIGINT)
    assert code == 130, err
    assert "the same command goes on" in err
    wait_for(lambda: not processes_of(root), "orphan processes to end")
    (unfinished,) = (root / "corpora").iterdir()
    assert unfinished.name.startswith("build.") and unfinished.suffix == ".partial"
    assert list((unfinished / "parts").glob("*[0-9]"))


def test_a_signal_ends_a_server_and_its_engines(root: Path, tmp_path: Path) -> None:
    from tests.trained import trained_nano

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = tmp_path / "serve.yaml"
    recipe.write_text(f"members: {{m: {{checkpoint: {trained_nano(tmp_path / 'm')}}}}}\nport: {port}\n")
    child = start(root, "serve", "up", str(recipe))
    assert child.stdout is not None
    started = json.loads(child.stdout.readline())
    assert started["pid"] == child.pid and "m" in started["models"]
    code, _, err = interrupt(child, signal.SIGINT)
    assert code == 0, err
    nothing_is_left(root)
    assert not (root / "serve.json").exists()
