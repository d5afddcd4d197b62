"""report.html: what a person should see of a training run, made from the files of its folder alone.

`python -m pipelines.train.report FOLDER` makes it again, for example after a kill.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.html import MAX_LABEL, Html, count, counted, details, document, section, size, table, text, tiles
from pipelines.report.lines import Floats, Line, Mark, plot, smoothed
from pipelines.train import events, figures, samples, status
from pipelines.train.events import Event
from pipelines.train.figures import WARM_UP_STEPS
from pipelines.train.samples import Sample
from pipelines.train.status import MODEL, TASK
from ulm import artefacts
from ulm.errors import ArtefactError

FILE = "report.html"
MAX_EVENTS = 200  # the newest are shown
MAX_SAMPLED = 24  # steps whose texts are shown: the newest, and others at equal distances
SMOOTHED_SHARE = 0.02  # of the steps: the width over which a curve is averaged
HIDDEN_SHARE = 0.02  # of the steps, the first and highest losses, that the axis leaves above its edge
LOG_RATIO = 30.0  # gradient norms that differ by more stand on a logarithmic axis
TROUBLE = ("rollback", "damaged", "restart", events.FAILED)


def write(folder: Path) -> Path:
    """Write report.html of the run in a folder, or replace it; ArtefactError where there is no run."""
    artefacts.write_text(folder / FILE, page(folder))
    return folder / FILE


def page(folder: Path) -> str:
    """The whole page, as the run's files are now."""
    if not (folder / TASK).is_file():
        raise ArtefactError(f"{folder}: no run of training, it has no {TASK}")
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    steps, happened = Steps.read(folder), list(events.read(folder))
    body = [
        _head(folder, task, steps, happened),
        section("Curves", _curves(steps, happened)),
        section("Events", *_events(happened)),
        section("Samples", *_samples(samples.read(folder))),
        section("Checkpoints", *_checkpoints(folder, steps)),
        section("Recipe", *_recipe(folder, task)),
    ]
    return document(folder.name, "".join(body))


@dataclass(frozen=True)
class Steps:
    """The columns of metrics.jsonl; NaN where a step says nothing."""

    columns: Mapping[str, Floats]

    @classmethod
    def read(cls, folder: Path) -> Steps:
        """Those of a run's folder."""
        lines = list(figures.read(folder))
        keys = [key for key in figures.StepFigures.__dataclass_fields__ if key != "batch_digest"]
        return cls({key: np.array([line.get(key, math.nan) for line in lines], dtype=np.float64) for key in keys})

    def __getitem__(self, key: str) -> Floats:
        return self.columns[key]

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def seconds(self) -> Floats:
        """How long each step took: its data, logging and Ray included, evaluations not."""
        return self["step_tokens"] / self["tokens_per_second"]

    @property
    def window(self) -> int:
        """Steps over which a curve is averaged."""
        return max(1, round(SMOOTHED_SHARE * len(self)))

    def evaluated(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of the evaluations that gave one."""
        has = np.isfinite(self[key])
        return self["step"][has], self[key][has]

    def value_at(self, key: str, step: int) -> float | None:
        """What was measured in a step, if it was."""
        found = self[key][self["step"] == step]
        return float(found[-1]) if len(found) and np.isfinite(found[-1]) else None


def _head(folder: Path, task: Mapping[str, Any], steps: Steps, happened: Sequence[Event]) -> str:
    num_steps = task["train"]["steps"]
    step = int(steps["step"][-1]) if len(steps) else 0
    corpus = text(str(task["corpus"])[:12])  # its first characters name it everywhere
    about = f"Run on corpus <code>{corpus}</code><br>{_state(step, num_steps, happened)}"
    shown = [(f"{step:,}", f"of {counted(num_steps, 'step')}")]
    if len(steps):
        shown += _figures(steps)
    if (folder / MODEL).is_file():
        shown.append((count(json.loads((folder / MODEL).read_text(encoding="utf-8"))["parameters"]), "parameters"))
    return f"<h1><bdi>{text(folder.name, MAX_LABEL)}</bdi></h1><p>{about}</p>{tiles(shown)}"


def _state(step: int, num_steps: int, happened: Sequence[Event]) -> str:
    if step >= num_steps:
        return "finished"
    last = happened[-1] if happened else None
    if last and last.kind == events.FAILED:
        return f"<span class=u>failed</span> after step {last.step:,}"
    if last and last.kind == "stop":
        return f"interrupted after step {last.step:,}"
    return "ended early" if last and last.kind == "end" else "not finished"


def _figures(steps: Steps) -> list[tuple[str, str]]:
    """The tiles of a run that has made a step. Rates are of the time after the first steps."""
    last = steps["loss"][-steps.window :]
    shown = [(f"{last.mean():.3f}", f"loss, nats per target, {_mean_of(len(last))}")]
    at, bits = steps.evaluated("bits_per_byte")
    if len(bits):
        best = int(np.argmin(bits))
        lowest = "the lowest so far" if bits[-1] <= bits[best] else f"lowest {bits[best]:.3f} at step {at[best]:,.0f}"
        shown.append((f"{bits[-1]:.3f}", f"bits per byte of held-out text, {lowest}"))
    warm = slice(min(WARM_UP_STEPS, len(steps) // 2), None)
    seconds = steps.seconds[warm].sum()
    return [
        *shown,
        (count(steps["step_tokens"][warm].sum() / seconds), "tokens per second"),
        (f"{100 * (steps['mfu'] * steps.seconds)[warm].sum() / seconds:.1f} %", "of the device's peak (MFU)"),
        (f"{100 * steps['data_wait_s'][warm].sum() / seconds:.2f} %", "of the time waiting for data"),
        (duration(steps.seconds.sum()), f"of training, {count(steps['tokens'][-1])} tokens"),
        (size(steps["memory_bytes"].max()), "of memory at most"),
    ]


def _mean_of(num: int) -> str:
    return "of the last step" if num == 1 else f"mean of the last {num:,}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3m 20s, 5h 03m."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {rest:02d}s"


def _curves(steps: Steps, happened: Sequence[Event]) -> str:
    if not len(steps):
        return ""
    drawn = [
        _loss(steps, happened),
        _figure("Bits per byte", "of held-out text", steps, [_dots(steps, "bits_per_byte")]),
        _figure(
            "Throughput",
            "tokens per second",
            steps,
            _raw_and_smooth(steps, "tokens_per_second"),
            y_range=_from_zero(steps["tokens_per_second"]),
        ),
        _figure("Data wait", "% of the time", steps, [_share_of_wait(steps)]),
        _figure(
            "Memory",
            "GB",
            steps,
            [Line(steps["step"], steps["memory_bytes"] / 1e9)],
            y_range=_from_zero(steps["memory_bytes"] / 1e9),
        ),
        _figure("Learning rate", "peak × schedule", steps, [Line(steps["step"], steps["lr"])]),
        _gradient(steps),
    ]
    return f"<div class=plots>{''.join(drawn)}</div>"


def _figure(name: str, unit: str, steps: Steps, lines: Sequence[Line], *, classes: str = "", **how: Any) -> str:
    """A curve by step in its frame; nothing where nothing was measured."""
    drawn = plot(lines, f"{name}, {unit}, by step", x_range=_span(steps), **how)
    caption = f"<figcaption>{name}<span class=soft>{unit}</span></figcaption>"
    return f"<figure{classes}>{caption}{drawn}</figure>" if drawn else ""


def _span(steps: Steps) -> tuple[float, float]:
    """All plots have one x axis, with room for a dot at its end."""
    return 0.0, 1.01 * float(steps["step"][-1])


def _from_zero(y: Floats) -> tuple[float, float]:
    return 0.0, float(np.nanmax(y))


def _dots(steps: Steps, key: str, colour: str = "--c1") -> Line:
    return Line(*steps.evaluated(key), colour=colour, has_dots=len(steps.evaluated(key)[0]) <= 60)


def _raw_and_smooth(steps: Steps, key: str) -> list[Line]:
    raw = Line(steps["step"], steps[key], is_faint=True)
    return [raw, Line(steps["step"], smoothed(steps[key], steps.window))]


def _share_of_wait(steps: Steps) -> Line:
    wait, seconds = (smoothed(values, steps.window) for values in (steps["data_wait_s"], steps.seconds))
    return Line(steps["step"], 100 * wait / seconds)


def _loss(steps: Steps, happened: Sequence[Event]) -> str:
    """Training and held-out loss with what happened; the axis begins where the first fall is over."""
    raw, mean = _raw_and_smooth(steps, "loss")
    held_out = _dots(steps, "val_loss")
    low = np.nanmin(np.concatenate([raw.y, held_out.y]))
    high = np.nanmax(np.concatenate([[np.quantile(raw.y, 1 - HIDDEN_SHARE)], held_out.y]))
    marks = [
        Mark(event.step, str(number), f"{number}. step {event.step}: {event.kind}", _colour(event.kind))
        for number, event in enumerate(happened, 1)
        if event.kind not in ("start", "end") and event.step <= steps["step"][-1]
    ]
    above = int((raw.y > high).sum())
    unit = "nats per target" + (f"; {counted(above, 'step')} so high that the axis leaves them out" if above else "")
    key = _key([("train", "--c0"), ("held-out", "--c1") if len(held_out.x) else None, *_marked(marks)])
    y_range = (low, max(high, low + 1e-6))
    drawn = _figure("Loss", unit, steps, [raw, mean, held_out], classes=" class=wide", y_range=y_range, marks=marks)
    return drawn.replace("</figure>", f"{key}</figure>")


def _marked(marks: Sequence[Mark]) -> list[tuple[str, str] | None]:
    if not marks:
        return []
    return [("what happened, numbered as below", "--bad" if any(m.colour == "--bad" for m in marks) else "--soft")]


def _key(entries: Iterable[tuple[str, str] | None]) -> str:
    shown = (f"<span><i style=background:var({colour})></i>{name}</span>" for name, colour in filter(None, entries))
    return f"<div class=key>{''.join(shown)}</div>"


def _colour(kind: str) -> str:
    return "--bad" if kind in TROUBLE else "--soft"


def _gradient(steps: Steps) -> str:
    norms = steps["grad_norm"]
    some = norms[np.isfinite(norms) & (norms > 0)]
    is_log = bool(len(some)) and some.max() > LOG_RATIO * some.min()
    skipped = len(norms) - int(np.isfinite(norms).sum())
    unit = "norm before clipping"
    if skipped:
        unit += f"; {counted(skipped, 'step')} changed no weight, not finite in float16"
    return _figure("Gradient", unit, steps, _raw_and_smooth(steps, "grad_norm"), is_log=is_log)


def _events(happened: Sequence[Event]) -> list[str]:
    started_s = happened[0].time if happened else 0.0
    rows = [
        [number, event.step, duration(event.time - started_s), _kind(event.kind), Html(text(event.text))]
        for number, event in enumerate(happened, 1)
    ]
    left_out = len(rows) - MAX_EVENTS
    note = f"<p>The first {left_out:,} are left out.</p>" if left_out > 0 else ""
    return [note, table(("", "step", "after", "what", ""), rows[-MAX_EVENTS:])]


def _kind(kind: str) -> Html:
    return Html(f"<span{' class=u' if kind in TROUBLE else ''}>{text(kind, MAX_LABEL)}</span>")


def _samples(written: Sequence[Sample]) -> list[str]:
    by_step: dict[int, list[Sample]] = {}
    for sample in written:
        by_step.setdefault(sample.step, []).append(sample)
    every = list(by_step)
    chosen = [every[round(at)] for at in np.linspace(len(every) - 1, 0, min(len(every), MAX_SAMPLED))]
    shown = []
    for step in chosen:
        texts = "".join(
            f"<pre class=written dir=auto><b>{text(sample.prompt)}</b>{text(sample.text)}</pre>"
            for sample in by_step[step]
        )
        newest = step == every[-1]
        shown.append(f"<h3>After step {step:,}</h3>{texts}" if newest else details(f"After step {step:,}", texts))
    left_out = len(every) - len(chosen)
    return [*shown, f"<p>Samples of {counted(left_out, 'step')} more are in {samples.FILE}.</p>" if left_out else ""]


def _checkpoints(folder: Path, steps: Steps) -> list[str]:
    found = status.checkpoints(folder)
    rows = []
    for checkpoint in reversed(found):
        place = folder / checkpoint["name"]
        roles = [name for name, is_it in (("newest", checkpoint == found[-1]), ("best", checkpoint["best"])) if is_it]
        loss, bits = (_rounded(steps.value_at(key, checkpoint["step"])) for key in ("loss", "bits_per_byte"))
        rows.append([place.name, loss, _rounded(checkpoint["val_loss"]), bits, _on_disk(place), ", ".join(roles)])
    return [table(("", "loss", "held-out loss", "bits per byte", "on disk", ""), rows)]


def _on_disk(place: Path) -> str | None:
    """None for a checkpoint that is pruned just now: a thread writes the next while this is made."""
    try:
        return size(sum(path.stat().st_size for path in place.iterdir()))
    except FileNotFoundError:
        return None


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _recipe(folder: Path, task: Mapping[str, Any]) -> list[str]:
    recipe = folder / "recipe.yaml"
    written = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    settled = json.dumps(task, indent=2, ensure_ascii=False)
    return [
        f"<pre class=whole>{text(written, 20_000)}</pre>" if written else "",
        details("All that decides the weights, with its defaults", f"<pre class=whole>{text(settled, 20_000)}</pre>"),
    ]


if __name__ == "__main__":
    for given in sys.argv[1:]:
        sys.stdout.write(f"{write(Path(given))}\n")
