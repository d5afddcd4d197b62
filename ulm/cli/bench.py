"""`ulm bench`: the benchmarks of a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ulm.errors import ConfigError, did_you_mean

FOLDER = Path("tests/benchmarks")


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("bench")(bench)


def bench(
    group: Annotated[str, typer.Argument(help="A file in tests/benchmarks, for example loop.")],
    device: Annotated[str | None, typer.Option(help="Add figures for this device.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Longer than 20 minutes is fine.")] = False,
) -> None:
    """Measure a group of figures; one JSON line each on stdout. Run it in a checkout.

    Example: ulm bench loop
    """
    groups = sorted(path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
    if group not in groups:
        remedy = did_you_mean(group, groups) if groups else "run it in a checkout of the project"
        raise ConfigError("group", f"no benchmark {group!r}", remedy)
    command = [sys.executable, str(FOLDER / f"{group}.py")]
    command += ["--device", device] if device else []
    command += ["--full"] if full else []
    raise SystemExit(subprocess.run(command, check=False).returncode)
