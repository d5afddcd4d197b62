"""`ulm gc`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ulm import runtime
from ulm.cli import console
from ulm.gc import Unused, remove, survey


def add_to(app: typer.Typer) -> None:
    """Hang this file's verb on the command line."""
    app.command("gc")(gc)


def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove what nothing points to: corpora, tokenizers and exports without a use, and what stopped writers left.

    Shows it first and asks; without a terminal it removes only with --yes. Example: ulm gc --dry-run
    """
    root = runtime.root()
    found = survey(root)
    if found.unused:
        console.err.print(_table(found.unused, root.resolve()))
    wanted = bool(found.unused) and not dry_run and (yes or _confirmed())
    gone = remove(root, found.unused) if wanted else []
    num_bytes = sum(item.num_bytes for item in gone)
    console.err.print(
        f"{len(gone)} removed, {decimal(num_bytes)} freed; {found.num_kept} corpora and tokenizers in use"
    )
    console.finish(
        {
            "removed": [str(item.path) for item in gone],
            "bytes": num_bytes,
            "kept": found.num_kept,
            "found": [{"path": str(i.path), "bytes": i.num_bytes, "why": i.why} for i in found.unused],
        }
    )


def _confirmed() -> bool:
    if not _is_terminal():
        console.err.print("nothing is removed without a terminal to ask on; give --yes")
        return False
    return typer.confirm("Remove these?", err=True)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _table(items: list[Unused], root: Path) -> Table:
    table = Table(title="nothing points to these", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why")
    for item in items:
        table.add_row(Text(console.printable(str(item.path.relative_to(root)))), decimal(item.num_bytes), item.why)
    return table
