"""Ctrl-C and SIGTERM in the middle of a verb: no process stays, nothing half-written is left, nothing saved is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.written_corpus import write_corpus

ULM = [sys.executable, "-m", "ulm.cli.main"]
TIMEOUT_S = 240.0  # Ray's processes may take a minute to notice that their driver is gone
pytestmark = pytest.mark.timeout(600)


def processes_of(home: Path) -> list[int]:
    """Processes that were started with this root in their environment."""
    mark, found = f"ULM_HOME={home}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(0.1)


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ULM_HOME": str(home)}
    return subprocess.Popen(
        [*ULM, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; a terminal's jobs heed it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(child: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    """Ctrl-C goes to the whole foreground group, as a terminal sends it; SIGTERM to the process, as `kill` does."""
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    out, err = child.communicate(timeout=TIMEOUT_S)
    return child.returncode, out, err


def nothing_is_left(home: Path) -> None:
    wait_for(lambda: not processes_of(home), "orphan processes to end")
    assert [str(p) for p in home.rglob("*.partial")] == []


def train_recipe(tmp_path: Path, steps: int) -> Path:
    recipe = tmp_path / "train.yaml"
    recipe.write_text(f"corpus: tiny\ntrain: {{steps: {steps}, batch_tokens: 512, context_tokens: 64}}\nname: long\n")
    return recipe


# SIGTERM to the training job is in test_train_job.py; through the command line too it is left to `make test-all`
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_training_saves_and_the_run_goes_on(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_corpus(root, [("a", "train", f"text number {i} of many. " * 20) for i in range(20)])
    metrics = root / "runs" / "long" / "metrics.jsonl"
    child = start(root, "train", str(train_recipe(tmp_path, 1_000_000)), "--set", "train.eval_tokens=1000")
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3, "the first steps")
    code, out, err = interrupt(child, number)
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
