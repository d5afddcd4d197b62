"""How work is shared out: a task is applied to items, here one after another, on a cluster side by side (job.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

Item = dict[str, Any]  # what JSON can hold
Task = Callable[[Item], Item]
Progress = Callable[[str, int, int | None, str], None]  # stage, done, of how many, a note


class Over(Protocol):
    """Applies a task to items and yields what it returns, in any order."""

    def __call__(self, task: Task, items: Sequence[Item], /) -> Iterator[Item]: ...


def one_by_one(task: Task, items: Sequence[Item], /) -> Iterator[Item]:
    """The plain `Over`."""
    return map(task, items)


def silent(stage: str, done: int, total: int | None, note: str) -> None:
    """The `Progress` that says nothing."""
