"""How verbs speak: people read stderr, programs the last line of stdout; errors become exit codes."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ulm.errors import ConfigError, UlmError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
INTERRUPTED = "[yellow]interrupted[/]; nothing half-written is listed, the same command goes on from what is done"
REFRESHES_PER_S = 2  # drawing takes time from the workers on a small machine
DRAW_EVERY_S = 0.5
LINE_EVERY_S, QUIET_S = 2.0, 30.0  # without a terminal: between two lines of one work at least, and at most
WIDE = 110  # columns of a terminal that has room for everything
QUIET_EVENTS = ("start", "resume", "end", "corpus")
err = Console(stderr=True, highlight=False)


class Terminated(BaseException):
    """SIGTERM as an exception, so that every `finally` on the way out is run."""


def finish(value: dict[str, Any], out: TextIO | None = None) -> None:
    """Print the result as the last line of stdout; `out` is stdout as it was, where it is redirected meanwhile."""
    out = out or sys.stdout
    line = json.dumps(value, ensure_ascii=False)
    if not line.isprintable():  # json leaves some of what commands a terminal as it is
        line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
    out.write(line + "\n")
    out.flush()


def printable(text: str) -> str:
    """Text without characters that would command the terminal or turn the reading direction."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def finish_job(result: dict[str, Any], out: TextIO | None = None) -> None:
    """Print a job's result; a job that was interrupted after saving ends with 143."""
    finish(result, out)
    if result.get("status") == "interrupted":
        raise SystemExit(EXIT_TERMINATED)


def run(command: Callable[[], None]) -> int:
    """Run a whole command line; its exit code."""

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        command()
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # typer's own answer to Ctrl-C
            err.print(INTERRUPTED)
        return ended.code if isinstance(ended.code, int) else (0 if ended.code is None else EXIT_FAILED)
    except ConfigError as error:
        return _say(error, EXIT_USAGE)
    except UlmError as error:
        return _say(error, EXIT_FAILED)
    except KeyboardInterrupt:
        err.print(INTERRUPTED)
        return EXIT_INTERRUPTED
    except Terminated:
        finish({"status": "interrupted"})
        return EXIT_TERMINATED
    except BrokenPipeError:
        return EXIT_FAILED
    return 0


def _say(error: UlmError, code: int) -> int:
    err.print("[bold red]error[/]", end=" ")
    err.print(printable(str(error)), markup=False, soft_wrap=True)
    return code


class Bars:
    """Progress bars by name, made when first told of; without a terminal a line now and then instead."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, _Bar] = {}
        self._bits_per_byte: dict[str, float] = {}  # newest of each run; most steps have none

    def update(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """Move a bar."""
        bar, now_s = self._bars.get(name), time.monotonic()
        shown: dict[str, Any] = {"note": note, "count": f"{_short(done)}/{'?' if total is None else _short(total)}"}
        if bar is None:
            # From where it stands: a run that is resumed has not made its first steps in no time.
            task = self._progress.add_task(name, total=total, completed=done, **shown)
            bar = self._bars[name] = _Bar(task, begun_s=now_s, first=done, said_s=now_s)
        elif not bar.has_moved and done > bar.first:
            # What came before the first step (workers started, text read, a model compiled) says nothing of the rate.
            bar.first, bar.begun_s, bar.has_moved = done, now_s, True
        elif now_s - bar.drawn_s < DRAW_EVERY_S and done != total:
            return
        bar.drawn_s = now_s
        self._progress.update(bar.task, completed=done, total=total, **shown)
        if self._progress.disable and bar.is_due(done, total, now_s):
            left = bar.left_s(done, total, now_s)
            ending = "" if left is None else f"  {_duration(left)} left"
            err.print(Text(f"{printable(name)}  {shown['count']}  {note}".rstrip() + ending), soft_wrap=True)
            bar.said, bar.said_s = done, now_s

    def step(self, run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        """Move a training run's bar, with its loss, bits per byte, speed and share of the device's peak."""
        if (bits := figures.get("bits_per_byte")) is not None:
            self._bits_per_byte[run] = bits
        parts = []
        if figures.get("loss") is not None:
            parts.append(f"loss {figures['loss']:.3f}")
            parts += [f"{self._bits_per_byte[run]:.3f} bpb"] if run in self._bits_per_byte else []
            parts.append(f"{_rate(figures.get('tokens_per_second', 0))} tok/s")
            parts += [f"{100 * figures['mfu']:.0f}% MFU"] if figures.get("mfu") is not None else []
        self.update(run, step, num_steps, " ".join(parts))

    def event(self, run: str, event: Any) -> None:
        """Say above the bars what has happened to a training run (an Event of pipelines/train/events.py)."""
        style = "dim" if event.kind in QUIET_EVENTS else "yellow"
        said = Text(f"{printable(run)}  step {event.step:,}  ", "dim")
        said.append(f"{printable(event.kind)}: {printable(event.text)}", style)
        err.print(said, soft_wrap=not err.is_terminal)


@dataclass
class _Bar:
    task: TaskID
    begun_s: float
    first: int  # where it stood when it was begun
    said_s: float  # when a line was last printed
    said: int = -1  # and where it stood then
    drawn_s: float = 0.0
    has_moved: bool = False

    def is_due(self, done: int, total: int | None, now_s: float) -> bool:
        """Whether to print a line: at the end, after each tenth of a longer work, and every half minute."""
        since_s = now_s - self.said_s
        is_tenth = total is not None and done - self.said >= total / 10 and since_s > LINE_EVERY_S
        return done != self.said and (done == total or is_tenth or since_s > QUIET_S)

    def left_s(self, done: int, total: int | None, now_s: float) -> float | None:
        """Time left at the rate so far; None at the ends, and where it is not known."""
        if total is None or not self.first < done < total:
            return None
        return (total - done) * (now_s - self.begun_s) / (done - self.first)


def _short(number: int) -> str:
    """A count as a bar has room for it."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f} M"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number < 10_000 else f"{number / 1e3:.0f}k" if number < 1e7 else f"{number / 1e6:.1f}M"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3_600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars on stderr for the time of the block."""
    is_wide = err.width >= WIDE
    columns = (
        TextColumn("{task.description:<16}" if is_wide else "{task.description}"),
        BarColumn(bar_width=24 if is_wide else 8),
        TextColumn("{task.fields[count]:>15}" if is_wide else "{task.fields[count]}"),
        *((TimeElapsedColumn(),) if is_wide else ()),
        TimeRemainingColumn(table_column=Column(min_width=7)),  # where it is narrow, the note is cut
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(
        *columns,
        console=err,
        refresh_per_second=REFRESHES_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not err.is_terminal,
    ) as progress:
        yield Bars(progress)
