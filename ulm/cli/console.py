"""How verbs speak: people read stderr, programs the last line of stdout; errors become exit codes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ulm.errors import ConfigError, UlmError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
INTERRUPTED = "[yellow]interrupted[/]; nothing half-written is listed, the same command goes on from what is done"
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
    """Progress bars by name, made when first told of. Without a terminal each bar is a line at its end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def update(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """Move a bar."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="", count="")
        count = f"{_short(done)}/{'?' if total is None else _short(total)}"
        self._progress.update(self._tasks[name], completed=done, total=total, note=note, count=count)

    def step(self, run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        """Move a training run's bar, with its loss and speed."""
        note = ""
        if figures.get("loss") is not None:
            note = f"loss {figures['loss']:.3f}  {figures.get('tokens_per_second', 0):,.0f} tokens/s"
        self.update(run, step, num_steps, note)


def _short(number: int) -> str:
    """A count as a bar has room for it."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f} M"


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars on stderr for the time of the block."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]:>15}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=err, redirect_stdout=False, redirect_stderr=False) as progress:
        yield Bars(progress)
