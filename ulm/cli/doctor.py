"""`ulm doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from ulm import runtime
from ulm.cli import console

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}


def add_to(app: typer.Typer) -> None:
    """Hang this file's verb on the command line."""
    app.command("doctor")(doctor)


def doctor() -> None:
    """Whether this machine has what is needed, with a remedy for each line that fails; exit 1 if one does.

    Example: ulm doctor
    """
    from ulm.doctor import check_all

    with console.err.status("looking"):
        found = list(check_all(runtime.root()))
    table = Table.grid(padding=(0, 2))
    for check in found:
        mark, style = MARKS[check.verdict]
        said = Text(console.printable(check.found))
        if check.remedy:
            said.append(f"\n→ {console.printable(check.remedy)}", style)
        table.add_row(Text(mark, style), check.name, said)
    console.err.print(table)
    failed = [check.name for check in found if check.verdict == "failed"]
    console.finish({"ok": not failed, "checks": [asdict(check) for check in found]})
    if failed:
        raise SystemExit(console.EXIT_FAILED)
