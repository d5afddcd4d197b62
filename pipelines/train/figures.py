"""metrics.jsonl: one object a step, appended as training goes, each step in it once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from pipelines.train import events
from ulm import artefacts

FILE = "metrics.jsonl"
WARM_UP_STEPS = 20  # left out of a run's tokens per second


@dataclass(frozen=True)
class StepFigures:
    """What one step, the `step`-th update, was like. Evaluation stands in the step after which it was made."""

    step: int
    loss: float  # nats per target, mean over the global batch
    tokens: int  # targets trained on so far
    step_tokens: int  # targets of this step
    tokens_per_second: float
    batch_digest: str
    lr: float
    grad_norm: float | None  # before clipping; None: not finite in float16, and no weight was changed
    data_wait_s: float
    mfu: float  # operations done of those that the workers' devices could have done: ulm.runtime.peak_flops
    memory_bytes: int  # of rank 0: allocated on its GPU, else resident
    val_loss: float | None = None  # nats per target
    bits_per_byte: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Without what was not measured."""
        return {key: value for key, value in vars(self).items() if value is not None}


class MetricsFile:
    """The open metrics.jsonl of a run. Lines beyond `last_step`, of work that was lost, are cut first."""

    def __init__(self, folder: Path, last_step: int) -> None:
        path = folder / FILE
        kept = [line for line in read(folder) if line["step"] <= last_step]
        num_lines = path.read_bytes().count(b"\n") if path.is_file() else 0
        if unreadable := num_lines - sum(1 for _ in read(folder)):
            events.say(folder, last_step, "damaged", f"{unreadable} lines of {FILE} cannot be read and are left out")
        artefacts.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, figures: StepFigures) -> None:
        """Append one line and hand it to the system; it survives a killed process, not a power cut."""
        self._file.write(json.dumps(figures.as_json(), allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that a kill cut short, or that is damaged, is left out."""
    path = folder / FILE
    if path.is_file():
        yield from (found for line in path.read_bytes().splitlines() if (found := parsed(line)) is not None)


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = ("step", "loss", "tokens_per_second", "step_tokens")
    is_line = isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in numbers)
    return found if is_line else None


class Tail:
    """What is appended to a run's metrics.jsonl from now on, as another process sees it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._file_id, self._offset = folder / FILE, 0, 0
        self._last_step = max((line["step"] for line in read(folder)), default=0)

    def new_lines(self) -> list[dict[str, Any]]:
        """Lines of steps later than any seen before; after a resume the repeated ones are not news."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self._file_id or now.st_size < self._offset:  # a resume has replaced the file
                self._file_id, self._offset = now.st_ino, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = [line for text in whole.splitlines() if (line := parsed(text)) is not None]
        new = [line for line in lines if line["step"] > self._last_step]
        self._last_step = max([self._last_step, *(line["step"] for line in new)])
        return new
