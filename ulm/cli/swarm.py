"""`ulm swarm …`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from ulm import runtime
from ulm.cli import console, swarm_tables
from ulm.cli.cluster import session
from ulm.cli.options import Address, Overrides, Recipe
from ulm.recipes import SwarmAddRecipe, SwarmRecipe, load_recipe

FEW_TOKENS = 2_000  # the standard error of bits per byte is then some percent
swarm = typer.Typer(
    help="Plan and train swarms, show them, give them one expert more or one fewer.", no_args_is_help=True
)


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(swarm, name="swarm")


@swarm.command("train")
def train(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006  typer copies it
    """Cluster a corpus, train a seed, one expert per cluster and the controls, and compare them.

    Running it again resumes. Example: ulm swarm train swarm.yaml --set experts=8

    The recipe's fields: docs/swarm.md. What it would come to, before: ulm swarm plan swarm.yaml
    """
    loaded = cast(SwarmRecipe, load_recipe("swarm train", recipe, overrides))
    root = runtime.root()
    from pipelines.swarm import job as swarm_job
    from pipelines.swarm.plan import whole_run

    whole = whole_run(loaded, root=root, near=recipe.parent)  # what is wrong is said before Ray starts
    with session(root, address), console.bars() as bars:
        result = swarm_job.train_swarm(
            loaded, root=root, near=recipe.parent, whole=whole, on_progress=bars.step, on_event=bars.event
        )
    if "bits_per_byte" in result:
        console.err.print(comparison(result["bits_per_byte"]))
        _warn_of_noise(result.get("scored_tokens", {}))
        console.err.print(swarm_tables.ending(loaded.name, result.get("perplexity_ratio", {})))
    console.finish_job(result)


@swarm.command("add")
def add(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006  typer copies it
    """Train one expert more from a swarm's seed, for the text of another corpus; the other members stay as they are.

    The recipe has swarm (a name), corpus, train, and if you like member (an id) and name (of the run). The corpus has
    the swarm's tokenizer: `tokenizer:` in its recipe takes the digest that `ulm swarm show` prints.

    Running it again resumes. Example: ulm swarm add poems.yaml --set swarm=mine
    """
    loaded = cast(SwarmAddRecipe, load_recipe("swarm add", recipe, overrides))
    root = runtime.root()
    from pipelines.swarm import add_job

    with session(root, address), console.bars() as bars:
        result = add_job.add(
            loaded, root=root, near=recipe.parent, on_progress=partial(bars.step, loaded.name), on_event=bars.event
        )
    if "shares" in result:
        console.err.print(swarm_tables.changed(f"{result['member']} is an expert of {loaded.swarm}", result))
    console.finish_job(result)


@swarm.command("drop")
def drop(
    name: Annotated[str, typer.Argument(metavar="SWARM", help="Its name.", show_default=False)],
    member: Annotated[str, typer.Argument(help="An expert's id.", show_default=False)],
) -> None:
    """Write a swarm anew without one of its experts. Its checkpoint stays; the old version keeps its digest.

    Example: ulm swarm drop mine e03
    """
    from pipelines.swarm import change

    result = change.drop(name, member, root=runtime.root())
    console.err.print(swarm_tables.changed(f"{member} is no longer an expert of {name}", result))
    console.finish(result)


@swarm.command("show")
def show(name: Annotated[str, typer.Argument(help="A name, a digest or a path.", show_default=False)]) -> None:
    """A swarm's manifest: members, router, strategy, what they were made from.

    Example: ulm swarm show mine
    """
    from ulm.swarm.manifest import Swarm

    found = Swarm.open(name, root=runtime.root(), verify=False)
    console.err.print(swarm_tables.manifest(found.manifest.model_dump()))
    console.finish({"swarm": str(found.folder), **found.manifest.model_dump()})


def _warn_of_noise(scored_tokens: dict[str, int]) -> None:
    few = [f"{domain}: {count}" for domain, count in scored_tokens.items() if count < FEW_TOKENS]
    if few:
        console.err.print(f"[yellow]few held-out tokens[/] ({', '.join(few)}): differences in this table are noise")


def comparison(bits_per_byte: dict[str, dict[str, float | None]]) -> Table:
    """The table of bits per byte by domain; the best of a row stands out."""
    columns = list(dict.fromkeys(key for row in bits_per_byte.values() for key in row))
    table = Table(title="bits per byte, lower is better", title_justify="left")
    table.add_column("domain")
    for column in columns:
        table.add_column(column, justify="right")
    for domain, row in bits_per_byte.items():
        best = min((v for v in row.values() if v is not None), default=None)
        table.add_row(domain, *(_cell(row.get(column), best) for column in columns))
    whole: dict[str, Any] = {c: [r.get(c) for r in bits_per_byte.values()] for c in columns}
    mean = {c: sum(v) / len(v) for c, v in whole.items() if v and None not in v}  # of other domains means nothing
    table.add_section()
    table.add_row("macro mean", *(_cell(mean.get(c), min(mean.values(), default=None)) for c in columns))
    return table


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "-"
    return f"[bold]{value:.3f}[/]" if value == best else f"{value:.3f}"


@swarm.command("plan")
def plan(recipe: Recipe, overrides: Overrides = []) -> None:  # noqa: B006  typer copies it
    """What a swarm by a recipe would come to: clusters, perplexity against one dense model, time, memory, disk.

    Nothing is trained. Example: ulm swarm plan swarm.yaml --set train.tokens_per_parameter=20
    """
    loaded = cast(SwarmRecipe, load_recipe("swarm train", recipe, overrides))
    from pipelines.swarm.forecast import forecast_swarm

    with console.bars() as bars:
        planned = forecast_swarm(
            loaded,
            root=runtime.root(),
            near=recipe.parent,
            progress=lambda stage, done, total, note: bars.step(stage, done, total or 1, {}),
        )
    console.err.print(swarm_tables.plan(planned))
    console.finish(planned)
