"""What can be seen of a run from its folder while others write there. Needs neither torch nor Ray."""

from __future__ import annotations

import json
import mmap
import re
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.train import events, figures
from ulm import artefacts

TASK, MODEL = "task.json", "model.json"  # as pipelines/train/folder.py writes them
TAIL_BYTES = 16_384  # some dozens of steps
STEPS_OF_RATE = 20  # tokens per second are the median of so many, for single steps vary
_STEP = re.compile(r"step-(\d{8,})")


def of(folder: Path) -> dict[str, Any]:
    """A run's status and newest figures; None stands for what is not known (yet).

    `status` is running, finished, "stopped early", failed (an error ended it) or interrupted: the same command goes
    on with the last two.
    """
    task, newest = _json(folder / TASK), checkpoints(folder)[-1:]
    lines = _newest_lines(folder)
    last = lines[-1] if lines else {}
    settings = task.get("train")
    num_steps = settings.get("steps") if isinstance(settings, dict) else None
    rates = [line["tokens_per_second"] for line in lines[-STEPS_OF_RATE:]]
    first = next(events.read(folder), None)
    return {
        "run": folder.name,
        "status": _status(folder, newest[0] if newest else {}, num_steps),
        "step": last.get("step"),
        "num_steps": num_steps,
        "loss": last.get("loss"),
        "bits_per_byte": _newest_bits_per_byte(folder),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "started": _utc(first.time) if first else None,
        "parameters": _json(folder / MODEL).get("parameters"),
    }


def _utc(seconds: float) -> str | None:
    """A time as text; None where it is beyond what a calendar holds."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Whole checkpoints of a run, oldest first: name, step, val_loss, why it ended the run early, whether it is best.

    Where the run's corpus has grown or eval_tokens has changed, the best is of those since: others are of another text.
    """
    whole = [p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and (p / "manifest.json").is_file()]
    whole.sort(key=lambda path: int(path.name.removeprefix("step-")))
    states = [_json(path / "state.json") for path in whole]
    same = [s for s in states if all(s.get(key) == states[-1].get(key) for key in ("legs", "eval_tokens"))]
    comparable = [s["val_loss"] for s in same if s.get("val_loss") is not None]
    found = []
    for path, state in zip(whole, states, strict=True):
        best = bool(comparable) and state.get("val_loss") == min(comparable)
        step, val_loss = int(path.name.removeprefix("step-")), state.get("val_loss")
        found.append({"name": path.name, "step": step, "val_loss": val_loss, "ended": state.get("ended"), "best": best})
    return found


def _status(folder: Path, newest: dict[str, Any], num_steps: int | None) -> str:
    if artefacts.is_locked(folder):
        return "running"
    if newest.get("ended"):
        return "stopped early"
    if num_steps is not None and newest.get("step", 0) >= num_steps:
        return "finished"
    return "failed" if events.has_failed(folder) else "interrupted"


def newest_step(folder: Path) -> int:
    """The step of the newest line of metrics.jsonl, 0 before there is one; a resume may set it back."""
    lines = _newest_lines(folder)
    return int(lines[-1]["step"]) if lines else 0


def _newest_lines(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl."""
    path = folder / figures.FILE
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - TAIL_BYTES)
        file.seek(start)
        tail = file.read()
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()[1 if start else 0 :]
    return [found for line in lines if (found := figures.parsed(line)) is not None]


def _newest_bits_per_byte(folder: Path) -> float | None:
    """Of the newest line that has one; lines in between are passed over unread, there may be millions."""
    path = folder / figures.FILE
    if not path.is_file() or not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.rfind(b'"bits_per_byte"')
        end = text.find(b"\n", at)
        if at < 0 or end < 0:
            return None
        found = figures.parsed(text[text.rfind(b"\n", 0, at) + 1 : end])
        return None if found is None else found.get("bits_per_byte")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or it has just been removed."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
