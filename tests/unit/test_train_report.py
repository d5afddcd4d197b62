from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report.lines import BINS, Line, Mark, plot, smoothed, thinned
from pipelines.train import events, report
from pipelines.train.loop import train
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm import artefacts
from ulm.errors import ArtefactError
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \u202egnp.exe\u2066 \x00\x07\x1b[2J &lt;"
TEXTS = [f"{i} green bottles hang on the wall, {i * i} if one counts the squares.\n" * (1 + i % 3) for i in range(40)]


def step_line(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 - step / 100,
        "tokens": 512 * step,
        "step_tokens": 512,
        "tokens_per_second": 1_024.0,  # half a second a step
        "batch_digest": "ab",
        "lr": 1e-3,
        "grad_norm": 0.5,
        "data_wait_s": 0.005,
        "mfu": 0.25,
        "memory_bytes": 200_000_000,
        **fields,
    }


def write_run(folder: Path, lines: list[dict[str, Any]], num_steps: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    task = {"corpus": "cd" * 32, "model": {}, "train": {"steps": num_steps}}
    artefacts.write_json(folder / "task.json", task)
    artefacts.write_json(folder / "model.json", {"parameters": 1_234_567})
    artefacts.write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 40 steps of 100, evaluated after 20 and 40, that went back once."""
    evaluated = {20: {"val_loss": 4.9, "bits_per_byte": 2.5}, 40: {"val_loss": 4.95, "bits_per_byte": 2.6}}
    folder = write_run(tmp_path / "first", [step_line(n, **evaluated.get(n, {})) for n in range(1, 41)])
    events.say(folder, 0, "start", "1 worker on cpu")
    events.say(folder, 31, "rollback", "loss 14.5 is more than 2 nats above the usual; going back to step-00000020")
    return folder


def shown(page: str) -> str:
    """What a reader sees of a page, a space between its parts."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", page.partition("<body>")[2])).split())


def test_the_tiles_say_where_the_run_is_and_how_fast(run):
    seen = shown(report.page(run))
    assert "not finished" in seen and "40 of 100 steps" in seen
    assert "4.600 loss, nats per target, of the last step" in seen
    assert "2.600 bits per byte of held-out text, lowest 2.500 at step 20" in seen
    assert "1,024 tokens per second" in seen and "25.0 % of the device's peak (MFU)" in seen
    assert "1.00 % of the time waiting for data" in seen  # 5 ms of 500
    assert "20.0 s of training, 20.5k tokens" in seen and "200.0 MB of memory" in seen and "1.23M parameters" in seen


def test_there_is_a_curve_of_everything_that_was_measured(run):
    page = report.page(run)
    captions = re.findall(r"<figcaption>([^<]*)<", page)
    assert captions == ["Loss", "Bits per byte", "Throughput", "Data wait", "Memory", "Learning rate", "Gradient"]
    assert page.count("<svg") == len(captions)


def test_a_run_without_evaluations_has_no_curve_of_them(tmp_path):
    page = report.page(write_run(tmp_path / "r", [step_line(n) for n in range(1, 5)]))
    assert "Bits per byte" not in page and "held-out" not in page


def test_what_happened_is_a_table_and_marks_on_the_loss_curve(run):
    page = report.page(run)
    assert "rollback loss 14.5 is more than 2 nats above the usual; going back to" in shown(page)
    marks = re.findall(r"<title>([^<]*)</title></path>", page)
    assert marks == ["2. step 31: rollback"]  # the start is none
    where = re.search(r'<path d="M([\d.]+),0V', page)
    assert where is not None and float(where[1]) == pytest.approx(1_000 * 31 / 40.4, abs=0.1)


@pytest.mark.parametrize(
    ("steps", "kind", "state"),
    [(100, "start", "finished"), (50, "failed", "failed after step 50"), (50, "end", "ended")],
)
def test_the_page_says_how_the_run_ended(tmp_path, steps, kind, state):
    folder = write_run(tmp_path / "r", [step_line(n) for n in range(1, steps + 1)])
    events.say(folder, steps, kind, "x")
    assert state in shown(report.page(folder))


class Tags(HTMLParser):
    """Names of tags and attributes, and what attributes link to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links |= {value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")}


def test_nothing_from_outside_acts_on_the_page_or_turns_it(run):
    folder = run.rename(run.with_name("<script>run"))
    sample = {"step": 20, "prompt": HOSTILE, "text": HOSTILE * 100}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    events.say(folder, 33, HOSTILE, HOSTILE)
    (folder / "recipe.yaml").write_text(f"corpus: {HOSTILE!r}\n")
    artefacts.write_json(folder / "task.json", {"corpus": HOSTILE, "train": {"steps": 100}, HOSTILE: HOSTILE})
    page = report.page(folder)
    found = Tags()
    found.feed(page)
    assert not found.tags & {"script", "img", "link", "iframe", "a", "object", "image", "foreignobject"}
    assert not {name for name in found.attributes if name.startswith("on")} and not found.links
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)
    assert "U+202E" in page and "&lt;script&gt;" in page and "@import" not in page


def test_samples_stand_by_step_the_newest_open_and_at_most_so_many(run):
    lines = [json.dumps({"step": n, "prompt": "To be", "text": f", said {n}."}) for n in range(1, 101)]
    (run / "samples.jsonl").write_text("\n".join(lines))
    page = report.page(run)
    assert "<h3>After step 100</h3><pre class=written dir=auto><b>To be</b>, said 100.</pre>" in page
    folded = [int(n) for n in re.findall("<summary>After step ([0-9]+)</summary>", page)]
    assert len(folded) == report.MAX_SAMPLED - 1 and folded == sorted(folded, reverse=True) and folded[-1] == 1
    assert "Samples of 76 steps more are in samples.jsonl." in page


def test_a_run_of_a_hundred_thousand_steps_is_drawn_in_a_second_with_its_extremes(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 100_000)
    lines = [step_line(n + 1, loss=3 + 4 * math.exp(-n / 1e4) + noise[n]) for n in range(100_000)]
    lines[70_000]["grad_norm"] = 20.0
    folder = write_run(tmp_path / "long", lines, 100_000)
    started_s = time.process_time()
    page = report.page(folder)
    assert time.process_time() - started_s < 5  # 1 s where nothing else runs, nearly all of it reading
    assert len(page) < 400_000
    gradient = page.partition("<figcaption>Gradient")[2].partition("</figure>")[0]
    highest = min(float(y) for y in re.findall(r"[ML][\d.]+,(-?[\d.]+)", gradient))
    assert highest < 40  # of 400: the one step of 20 is at the top


def test_thinning_keeps_the_extremes_of_equal_parts_and_short_lines_whole():
    x = np.arange(1.0, 10_001)
    y = np.sin(x / 300)
    y[5_000], y[5_001] = 9.0, -9.0
    kept = thinned(Line(x, y))
    assert len(kept.x) <= 2 * BINS and (np.diff(kept.x) > 0).all()
    assert {9.0, -9.0} <= set(kept.y.tolist())
    width = (x[-1] - x[0]) / BINS
    parts = [y[np.minimum((x - x[0]) // width, BINS - 1) == n] for n in range(BINS)]
    assert set(kept.y.tolist()) == {extreme for part in parts for extreme in (part.min(), part.max())}
    short = Line(x[: 2 * BINS], y[: 2 * BINS])
    assert thinned(short) is short


def test_smoothing_is_the_mean_of_the_finite_values_around():
    y = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    slow = [np.nanmean(y[max(0, n - 1) : n + 2]) for n in range(5)]
    assert smoothed(y, 3) == pytest.approx(slow)
    assert smoothed(y, 1)[[0, 4]] == pytest.approx([1.0, 9.0])


@pytest.mark.parametrize(
    ("values", "is_log", "labels"),
    [
        ([0.0, 10.0], False, ["0", "2", "4", "6", "8", "10"]),
        ([2.61, 3.34], False, ["2.6", "2.8", "3", "3.2"]),
        ([0.0, 0.004], False, ["0", "0.001", "0.002", "0.003", "0.004"]),
        ([0.1, 1_000.0], True, ["0.1", "1", "10", "100", "1k"]),
        ([7.0, 7.0], False, ["7"]),
    ],
)
def test_axes_have_round_labels(values, is_log, labels):
    drawn = plot([Line(np.array([0.0, 1.0]), np.array(values))], "t", is_log=is_log)
    found = re.findall("<span class=y[^>]*>([^<]*)<", drawn)
    assert set(labels) <= set(found) and len(found) <= len(labels) + 2


def test_a_curve_is_broken_where_nothing_was_measured_and_empty_ones_are_not_drawn():
    x = np.arange(4.0)
    drawn = plot([Line(x, np.array([1.0, np.nan, 2.0, 3.0]))], "t")
    curve = re.findall(r'd="([^"]*)" stroke="var\(--c0\)"', drawn)[0]
    assert curve.count("M") == 2 and curve.count("L") == 1
    assert plot([Line(x, np.full(4, np.nan))], "t") == "" and plot([], "t") == ""


def test_labels_of_marks_that_are_close_stand_together():
    marks = [Mark(at, str(n), f"<b>{n}") for n, at in enumerate([1.0, 50.0, 50.5, 51.0, 51.5])]
    drawn = plot([Line(np.arange(101.0), np.arange(101.0))], "t", marks=marks)
    assert re.findall("<span class=m[^>]*>([^<]*)<", drawn) == ["0", "1, 2, 3…"]
    assert drawn.count("<title>&lt;b&gt;") == 5


def test_a_trained_run_has_a_report_that_can_be_made_again_byte_by_byte(root):
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    fields = {"steps": 6, "batch_tokens": 256, "context_tokens": 64, "eval_every_steps": 3, "checkpoint_every_steps": 3}
    recipe = validate(TrainRecipe, {"name": "a", "corpus": "written", "train": {**fields, "precision": "float32"}})
    task = resolve(recipe, root=root)
    train(task)
    written = (task.folder / report.FILE).read_text(encoding="utf-8")
    seen = shown(written)
    assert "finished" in seen and "6 of 6 steps" in seen and "After step 6" in seen
    rows = re.findall(r"<tr><td><bdi>(step-\d+).*?</tr>", written)
    assert rows == ["step-00000006", "step-00000003"]
    assert "newest, best" in seen or ("newest" in seen and "best" in seen)
    (task.folder / report.FILE).unlink()
    done = subprocess.run([sys.executable, "-m", "pipelines.train.report", str(task.folder)], capture_output=True)
    assert done.stdout.decode().strip() == str(task.folder / report.FILE)
    assert (task.folder / report.FILE).read_text(encoding="utf-8") == written


def test_after_a_kill_at_the_first_step_there_is_a_page_too(tmp_path):
    folder = write_run(tmp_path / "r", [])
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert "0 of 100 steps" in shown(report.page(folder))
    with pytest.raises(ArtefactError, match=r"nothing: no run of training, it has no task\.json"):
        report.write(tmp_path / "nothing")
