"""`ulm runs …`, and `ulm train --no-ray` that makes what they show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.train import events, figures, folder, status
from pipelines.train.loop import train
from pipelines.train.stopping import STOP
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.written_corpus import written_corpus
from ulm import artefacts
from ulm.checkpoints import store
from ulm.cli.main import app
from ulm.errors import ArtefactError, ConfigError, TrainingError
from ulm.models.account import num_parameters
from ulm.models.decoder import build
from ulm.recipes.base import validate
from ulm.recipes.train import EarlyStopping, TrainRecipe

TEXTS = [f"{i} men went to mow, went to mow a meadow. " * (1 + i % 3) for i in range(60)]
TRAIN = {"steps": 4, "batch_tokens": 256, "context_tokens": 64, "precision": "float32", "eval_every_steps": 2}
ENDLESS = {"num_steps": 1_000_000, "compile": False}  # a run so long would be compiled first
TIMEOUT_S = 120.0


@pytest.fixture
def task(root: Path) -> Callable[..., TrainTask]:
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    whole = resolve(validate(TrainRecipe, {"name": "a", "corpus": "written", "train": TRAIN}), root=root)

    def make(name: str = "a", **changes: Any) -> TrainTask:
        return changed(whole, name, **changes)

    return make


def ulm(*words: str) -> tuple[dict[str, Any], str]:
    """The last line of stdout as JSON, and stderr, of a command line that succeeds."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def stopped_after(steps: int) -> Callable[[], bool]:
    return iter([*[False] * steps, True]).__next__


def test_the_list_says_how_each_run_stands_with_its_figures(task):
    train(task("done"))
    train(task("halted"), should_stop=stopped_after(3))
    impatient = {"num_steps": 50, "early_stopping": EarlyStopping(patience=1, min_improvement=9.0)}
    train(task("early", **impatient))

    def fail(_: Any) -> None:
        raise TrainingError("the roof fell in")

    with pytest.raises(TrainingError):
        train(task("broken"), on_step=fail)
    with artefacts.try_lock(task("halted").folder) as mine:
        assert mine
        running = {run["run"]: run["status"] for run in ulm("runs", "list")[0]["runs"]}
    assert running == {"broken": "failed", "done": "finished", "early": "stopped early", "halted": "running"}
    found, shown = ulm("runs", "list")
    runs = {run["run"]: run for run in found["runs"]}
    assert runs["halted"]["status"] == "interrupted"
    last = list(figures.read(task("done").folder))[-1]
    assert {key: runs["done"][key] for key in ("step", "num_steps", "loss", "bits_per_byte")} == {
        "step": 4, "num_steps": 4, "loss": last["loss"], "bits_per_byte": last["bits_per_byte"],
    }  # fmt: skip
    assert runs["halted"]["bits_per_byte"] == list(figures.read(task("halted").folder))[1]["bits_per_byte"]
    assert runs["done"]["parameters"] == num_parameters(build(task().spec))
    assert runs["done"]["tokens_per_second"] > 0 and runs["done"]["started"].startswith("20")
    line = next(line for line in shown.splitlines() if "done" in line)
    assert "finished" in line and "4/4" in line and f"{last['loss']:.3f}" in line


def test_a_failed_run_that_is_trained_again_is_no_longer_failed(task):
    def fail(_: Any) -> None:
        raise RuntimeError("the roof fell in")

    with pytest.raises(RuntimeError):
        train(task(num_steps=6, checkpoint_every_steps=1), on_step=fail)
    last = list(events.read(task().folder))[-1]
    assert (last.kind, last.text) == ("failed", "the roof fell in")
    assert status.of(task().folder)["status"] == "failed"
    train(task(num_steps=6), should_stop=stopped_after(2))
    assert status.of(task().folder)["status"] == "interrupted"
    train(task(num_steps=6))
    assert status.of(task().folder)["status"] == "finished"


def test_an_error_that_ends_several_runs_is_told_once_by_the_run_it_came_from(task):
    for name in ("one", "two"):
        train(task(name), should_stop=stopped_after(1))
    runs = [task("one"), task("two")]
    with pytest.raises(TrainingError), folder.failure_told(runs):
        raise TrainingError("a worker was lost")
    assert [list(events.read(run.folder))[-1].kind for run in runs] == ["failed", "failed"]
    train(task("one"), should_stop=stopped_after(1))
    with pytest.raises(TrainingError), folder.failure_told(runs):
        raise TrainingError("and again")
    assert [list(events.read(run.folder))[-1].text for run in runs][1] == "a worker was lost"
    with pytest.raises(ConfigError), folder.failure_told(runs[:1]):
        raise ConfigError("name", "is another's")
    assert [event.kind for event in events.read(runs[0].folder)][-1] != "failed"


def test_a_run_whose_files_are_being_written_is_read_up_to_the_last_whole_line(task):
    train(task())
    path = task().folder / figures.FILE
    whole = status.of(task().folder)
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 1.0, "tok')
    assert status.of(task().folder) == whole
    line = {"loss": 2.0, "step_tokens": 768}
    long = "".join(json.dumps({"step": n, "tokens_per_second": float(n), **line}) + "\n" for n in range(5, 3000))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + long)
    found = status.of(task().folder)
    assert found["step"] == 2999 and found["tokens_per_second"] == 2989.5  # the median of the last twenty
    assert found["bits_per_byte"] == whole["bits_per_byte"]  # far before the last lines
    path.write_text("")
    assert status.of(task().folder)["step"] is None


def test_list_and_show_are_quick_because_they_need_neither_torch_nor_ray(task, root):
    train(task())
    script = (
        "import sys\nfrom ulm.cli.main import app\n"
        "for words in (['runs', 'list'], ['runs', 'show', 'a'], ['runs', 'logs', 'a']):\n"
        "    app(words, standalone_mode=False)\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "ULM_HOME": str(root)}, timeout=60)


def test_show_has_recipe_checkpoints_events_and_report(task):
    recipe = task().recipe
    folder.write_recipe(task(), recipe)
    train(task(checkpoint_every_steps=2))
    (task().folder / "report.html").write_text("<p>")
    found, shown = ulm("runs", "show", "a")
    assert found["checkpoints"] == ["step-00000002", "step-00000004"]
    assert found["best"] == store.best(task().folder)[0].name
    assert [event["kind"] for event in found["events"]][0] == "start"
    assert found["report"] == str(task().folder / "report.html")
    assert "steps: 4" in found["recipe"] and "steps: 4" in shown
    assert "best" in next(line for line in shown.splitlines() if found["best"] in line)
    assert "finished" in shown


@pytest.mark.parametrize("verb", ["show", "logs", "cancel"])
@pytest.mark.parametrize("name", ["../a", "a/../a", "/etc", "..", ".", "", "a\n", "A", "x.partial", "a\x1b[2J"])
def test_a_name_that_no_run_can_have_is_refused(root, verb, name):
    for place in (root / "a", root / "runs" / "a", root / "runs"):
        artefacts.write_json(place / "task.json", {})
    done = CliRunner().invoke(app, ["runs", verb, "--", name])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.place == "run" and "cannot be the name of a run" in str(done.exception)


def test_a_run_that_is_not_there_is_guessed(task):
    done = CliRunner().invoke(app, ["runs", "show", "first"])
    assert "no run 'first' (there are none yet)" in str(done.exception)
    train(task("frist"))
    done = CliRunner().invoke(app, ["runs", "cancel", "first"])
    assert "no run 'first' (did you mean 'frist'?)" in str(done.exception)


def test_logs_end_with_as_many_lines_as_asked_for(task):
    train(task())
    path = task().folder / folder.LOG
    path.write_text("".join(f"line {n} {'x' * 90}\n" for n in range(2_000)) + "half a \x1b[2J line")
    found, shown = ulm("runs", "logs", "a", "-n", "3")
    assert [line.split(" x")[0] for line in shown.splitlines()] == ["line 1998", "line 1999", "half a \ufffd[2J line"]
    assert found == {"run": "a", "log": str(path), "lines": 3}
    assert ulm("runs", "logs", "a", "-n", "0")[0]["lines"] == 0
    assert ulm("runs", "logs", "a", "-n", "1500")[0]["lines"] == 1500  # more than a block
    assert ulm("runs", "logs", "a", "-n", "9999")[0]["lines"] == 2001
    path.unlink()
    assert "nothing has been logged yet" in ulm("runs", "logs", "a")[1]


def test_following_a_log_ends_with_the_run(task):
    train(task(), should_stop=stopped_after(1))
    path = task().folder / folder.LOG
    path.write_text("before\n")

    def write() -> None:
        with artefacts.try_lock(task().folder), path.open("a") as file:
            is_held.set()
            for word in ("one\nand a ", "half\n", "last"):
                time.sleep(0.5)
                file.write(word)
                file.flush()

    is_held = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    is_held.wait()
    found, shown = ulm("runs", "logs", "a", "--follow")
    writer.join()
    assert shown.splitlines() == ["before", "one", "and a half", "last"]
    assert found["lines"] == 4


def test_cancel_has_a_run_save_and_end_and_says_where(task):
    endless = task(**ENDLESS)
    stop = endless.folder / STOP
    worker = threading.Thread(target=lambda: train(endless, should_stop=stop.exists))
    worker.start()
    while not list(figures.read(endless.folder)):
        assert worker.is_alive()
        time.sleep(0.05)
    found, shown = ulm("runs", "cancel", "a")
    worker.join()
    step = list(figures.read(endless.folder))[-1]["step"]
    place = store.step_folder(endless.folder, step)
    assert found == {"run": "a", "status": "interrupted", "step": step, "checkpoint": str(place)}
    assert (place / "manifest.json").is_file()
    assert f"interrupted at step {step}" in shown
    done = CliRunner().invoke(app, ["runs", "cancel", "a"])
    assert str(done.exception) == "run: 'a' is not running, it is interrupted (see `ulm runs list`)"


def test_cancel_without_waiting_only_asks(task):
    train(task(), should_stop=stopped_after(1))
    with artefacts.try_lock(task().folder):
        assert ulm("runs", "cancel", "a", "--no-wait")[0] == {"run": "a", "status": "stopping"}
    assert (task().folder / STOP).is_file()


def test_asking_whether_a_folder_is_locked_writes_nothing_and_holds_nothing(tmp_path):
    assert not artefacts.is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with artefacts.try_lock(tmp_path) as mine:
        assert mine and artefacts.is_locked(tmp_path)
    assert not artefacts.is_locked(tmp_path)
    with artefacts.try_lock(tmp_path) as mine:
        assert mine
    (tmp_path / artefacts.LOCK).unlink()
    (tmp_path / artefacts.LOCK).symlink_to("/etc/passwd")
    with pytest.raises(ArtefactError, match="cannot be opened"):
        artefacts.is_locked(tmp_path)


# Training without Ray, as a person starts it.

RUN = "import sys\nfrom ulm.cli import console, main\ncode = console.run(lambda: main.app(sys.argv[1:]))\n"
NO_RAY = RUN + "assert 'ray' not in sys.modules, 'Ray was imported'\nsys.exit(code)\n"
RAY_IS_MISSING = (
    "import sys\nfrom importlib import util\nfind = util.find_spec\n"
    "util.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
    "sys.modules['ray'] = None\n"
)


def written_recipe(root: Path, tmp_path: Path, **fields: Any) -> Path:
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    path = tmp_path / "train.yaml"
    path.write_text(f"corpus: written\nname: plain\ntrain: {json.dumps({**TRAIN, **fields})}\n")
    return path


def start(script: str, root: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ULM_HOME": str(root), "COLUMNS": "200"}
    command = [sys.executable, "-c", script, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", ["asked for", "Ray is missing"])
def test_without_ray_the_same_files_and_the_same_last_line(root, tmp_path, how):
    recipe = written_recipe(root, tmp_path, steps=4)
    script, words = (NO_RAY, ["--no-ray"]) if how == "asked for" else (RAY_IS_MISSING + RUN, [])
    child = start(script, root, "train", str(recipe), *words)
    out, err = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, err
    line = json.loads(out.splitlines()[-1])
    run = root / "runs" / "plain"
    assert list(line) == ["run", "checkpoint", "step", "loss", "bits_per_byte", "tokens_per_second"]
    assert (line["run"], line["step"], line["checkpoint"]) == ("plain", 4, str(run / "step-00000004"))
    assert {"recipe.yaml", "task.json", "metrics.jsonl", "events.jsonl", "log"} <= {path.name for path in run.iterdir()}
    assert artefacts.follow(root / "models" / "plain") == run / "step-00000004"
    alone = [entry["loss"] for entry in figures.read(run)]
    train(
        changed(resolve(validate(TrainRecipe, {"name": "loop", "corpus": "written", "train": TRAIN}), root=root), "b")
    )
    assert alone == pytest.approx([entry["loss"] for entry in figures.read(run.with_name("b"))], abs=1e-4)  # threads


def test_without_ray_an_address_is_refused(root, tmp_path):
    recipe = written_recipe(root, tmp_path, steps=4)
    done = CliRunner().invoke(app, ["train", str(recipe), "--no-ray", "--address", "localhost:6379"])
    assert "--address: training without Ray joins no cluster" in str(done.exception)


def test_without_ray_sigterm_saves_and_exits_143_and_the_run_goes_on(root, tmp_path):
    recipe = written_recipe(root, tmp_path, steps=1_000_000, compile=False)
    run = root / "runs" / "plain"
    child = start(NO_RAY, root, "train", str(recipe), "--no-ray")
    while not list(figures.read(run)):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 143, err
    line = json.loads(out.splitlines()[-1])
    assert line["status"] == "interrupted"
    assert line["checkpoint"] == str(store.newest(run)) and line["step"] == list(figures.read(run))[-1]["step"]
    assert not (run / STOP).exists()
    assert status.of(run)["status"] == "interrupted"
