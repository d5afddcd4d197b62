"""`ulm runs …`: what there is under runs/, and ending a run that is under way. Imports neither torch nor Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from ulm import artefacts, runtime
from ulm.cli import console, train_tables
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import Name

LOOK_EVERY_S = 0.2
BLOCK_BYTES = 65_536
runs = typer.Typer(help="List training runs, show them, read their logs, end them.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(help="A run's name.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(runs, name="runs")


@runs.command("list")
def list_() -> None:
    """All training runs under this root: status, step, figures.

    Example: ulm runs list
    """
    from pipelines.train import status

    found = [status.of(runtime.root() / "runs" / name) for name in _names()]
    console.err.print(train_tables.runs(found))
    console.finish({"runs": found})


@runs.command("show")
def show(run: Run) -> None:
    """A run's recipe, figures, checkpoints and events.

    Example: ulm runs show first
    """
    from pipelines.train import events, status

    folder = _folder(run)
    recipe, report = folder / "recipe.yaml", folder / "report.html"
    checkpoints = status.checkpoints(folder)
    found = {
        **status.of(folder),
        "checkpoints": [entry["name"] for entry in checkpoints],
        "best": next((entry["name"] for entry in checkpoints if entry["best"]), None),
        "events": [asdict(event) for event in events.read(folder)],
        "report": str(report) if report.is_file() else None,
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    }
    console.err.print(train_tables.run({**found, "about_checkpoints": checkpoints}))
    console.finish(found)


@runs.command("logs")
def logs(
    run: Run,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
) -> None:
    """The last lines of what a run's first worker logged.

    Example: ulm runs logs first --follow
    """
    folder = _folder(run)
    path = folder / "log"
    shown = 0
    if not path.is_file():
        console.err.print("nothing has been logged yet")
    try:
        for line in _tail(path, lines, folder if follow else None):
            console.err.print(console.printable(line), markup=False, soft_wrap=True)
            shown += 1
    except KeyboardInterrupt:
        pass  # how one stops following
    console.finish({"run": run, "log": str(path), "lines": shown})


@runs.command("cancel")
def cancel(
    run: Run,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has saved and ended.")] = True,
) -> None:
    """Have a run save after the step it is in, and end. The command that trained it goes on from there.

    Example: ulm runs cancel first
    """
    from pipelines.train import status
    from pipelines.train.stopping import request_stop

    folder = _folder(run)
    if not artefacts.is_locked(folder):
        raise ConfigError("run", f"{run!r} is not running, it is {status.of(folder)['status']}", "see `ulm runs list`")
    request_stop(folder)
    if not wait:
        console.err.print("asked to save and end after the step under way")
        console.finish({"run": run, "status": "stopping"})
        return
    with console.err.status("saving after the step under way …"):
        while artefacts.is_locked(folder):
            time.sleep(LOOK_EVERY_S)
    found, checkpoints = status.of(folder), status.checkpoints(folder)
    place = str(folder / checkpoints[-1]["name"]) if checkpoints else None
    console.err.print(f"{found['status']} at step {found['step']}, saved as {place or 'nothing'}", markup=False)
    console.finish({"run": run, "status": found["status"], "step": found["step"], "checkpoint": place})


def _names() -> list[str]:
    return sorted(path.parent.name for path in (runtime.root() / "runs").glob("*/task.json"))


def _folder(run: str) -> Path:
    """The folder of a run that there is; its name may come from anywhere, so it is held to what recipes allow."""
    try:
        TypeAdapter(Name).validate_python(run)
    except ValidationError:
        raise ConfigError("run", f"{run!r} cannot be the name of a run", "letters a-z, digits, . _ -") from None
    folder = runtime.root() / "runs" / run
    if not (folder / "task.json").is_file():
        known = _names()
        raise ConfigError("run", f"no run {run!r}", did_you_mean(run, known) if known else "there are none yet")
    return folder


def _tail(path: Path, count: int, followed: Path | None) -> Iterator[str]:
    """The last `count` lines of a file, then those that come while the run in the folder `followed` is running."""
    rest = b""
    start = _start_of_last(path, count) if path.is_file() else 0
    while True:
        is_over = followed is None or not artefacts.is_locked(followed)  # before reading: nothing comes after it
        if path.is_file():
            with path.open("rb") as file:
                file.seek(start)
                more = file.read()
            start += len(more)
            *whole, rest = (rest + more).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if is_over:
            break
        time.sleep(LOOK_EVERY_S)
    if rest:
        yield rest.decode(errors="replace")


def _start_of_last(path: Path, count: int) -> int:
    """Where the last `count` lines of a file begin."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        found, start = b"", end
        while start and found.count(b"\n") <= count:
            start = max(0, start - BLOCK_BYTES)
            file.seek(start)
            found = file.read(end - start)
    at = len(found) - found.endswith(b"\n")
    for _ in range(count):
        if (at := found.rfind(b"\n", 0, at)) < 0:
            return start
    return start + at + 1 if count else end
