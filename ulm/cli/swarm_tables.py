"""How a swarm's plan is shown, as rich renderables."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from ulm.cli.console import printable
from ulm.cli.corpus_tables import right
from ulm.cli.train_tables import duration, pairs, styled

NUM_WORDS = 5


def plan(planned: dict[str, Any]) -> RenderableType:
    """The answer of `swarm plan`; the verdict stands below, where the eye is."""
    memory, disk, ahead = planned["memory"], planned["disk"], planned["forecast"]
    how = "found before" if planned["clusters_found_before"] else "found now"
    starts = planned["pays_from_tokens_per_parameter"]
    ahead_from = f"; ahead of dense from about {starts:.2g}" if starts is not None else ""
    rows = {
        "clusters": f"{planned['experts']}, {how}; they say {planned['information']:.2f} nats of a token",
        "parameters": f"{planned['parameters']:,} of each expert",
        "tokens": f"{planned['tokens']:,}, {planned['tokens_per_parameter']:.3g} per parameter{ahead_from}",
        "perplexity": f"{ahead['ratio']:.2f} of dense; nine of ten between {ahead['low']:.2f} and {ahead['high']:.2f}",
        "device": f"{planned['device']}; {planned['runs']} runs, {planned['side_by_side']} at a time",
        "time": f"about {duration(planned['seconds'])}: {planned['seconds_per_step']:.3g} s a step on this machine",
        "memory": f"{decimal(memory['total'])} of {decimal(memory['free'])} free",
        "disk": f"{decimal(disk['total'])} of {decimal(disk['free'])} free, if every run keeps all it may",
    }
    told = [*planned["advice"], *(f"note: {remark}" for remark in planned["remarks"])]
    return Group(
        _clusters(planned["clusters"]),
        pairs(rows),
        styled(planned["verdict"], "bold"),
        *(styled(line, "yellow") for line in told),
    )


def _clusters(found: list[dict[str, Any]]) -> Table:
    table = Table("expert", "mostly", *right("train tokens", "read"), "words", box=None, padding=(0, 2, 0, 0))
    for cluster in found:
        words = printable(" ".join(cluster["words"][:NUM_WORDS]))
        domain = printable(cluster["domain"] or "-")
        table.add_row(
            cluster["member"], domain, f"{cluster['train_tokens']:,}", f"{cluster['epochs']:.2g} times", words
        )
    return table
