"""`ulm`: the command line. Verbs are defined in the files beside this one; each imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer

from ulm import __version__, runtime
from ulm.cli import (
    bench,
    console,
    corpus,
    demo,
    doctor,
    exchange,
    gc,
    jobs,
    keys,
    models,
    runs,
    serve,
    status,
    swarm,
    train,
)

app = typer.Typer(
    name="ulm",
    help="Own your language models: assemble a corpus, train many small models, serve them as one swarm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Artefacts live under ULM_HOME (default ~/.ulm). The last line of stdout is one JSON document."""


for module in (demo, corpus, train, swarm, models, exchange, serve, keys, status, jobs, runs, gc, doctor, bench):
    module.add_to(app)


def main() -> None:
    """The console script."""
    runtime.spare_cores()
    sys.exit(console.run(lambda: app(standalone_mode=True)))


if __name__ == "__main__":
    main()
