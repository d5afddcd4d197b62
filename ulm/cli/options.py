"""Options that many verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="A recipe: a YAML file.", show_default=False)]
Checkpoint = Annotated[
    str, typer.Argument(help="A step directory, a run, or a name under models/.", show_default=False)
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="a.b=value", help="Override a value of the recipe; may be repeated.")
]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster to join. Default: RAY_ADDRESS, else this root's own, else a local one."),
]
