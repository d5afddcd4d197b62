"""events.jsonl: what happened to a run beside its steps: starts, rollbacks, lost workers, a checkpoint set aside."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "events.jsonl"
FAILED = "failed"  # the kind of the event that an error leaves as the last
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that a person should know of a run. `kind` is one word, `text` a sentence."""

    time: float  # seconds since 1970
    step: int
    kind: str
    text: str


def say(folder: Path, step: int, kind: str, text: str) -> None:
    """Append an event to a run's file, in one write, and log it."""
    line = json.dumps(asdict(Event(time.time(), step, kind, text))).encode() + b"\n"
    with (folder / FILE).open("a+b", buffering=0) as file:
        if (size := file.tell()) and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line  # a full disk or a kill has cut the last one short
        file.write(line)
    log.log(logging.INFO if kind in QUIET else logging.WARNING, "%s: step %d: %s", folder.name, step, text)


QUIET = ("start", "resume", "end", "stop")


def read(folder: Path) -> Iterator[Event]:
    """The events of a run; a last line that a kill cut short is left out."""
    return _parse((folder / FILE).read_bytes() if (folder / FILE).is_file() else b"")


def has_failed(folder: Path) -> bool:
    """Whether the last that happened to a run is that it failed."""
    *_, last = (None, *read(folder))
    return last is not None and last.kind == FAILED


class EventTail:
    """Events that come from now on, as another process sees them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._offset = self._path.stat().st_size if self._path.is_file() else 0

    def new(self) -> list[Event]:
        """What was appended since the last look."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return list(_parse(whole))


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            event = Event(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(event.time, int | float) and isinstance(event.step, int):
            yield event
