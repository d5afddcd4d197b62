"""How swarms and plans of swarms are shown, as rich renderables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Column, Table

from ulm.cli.corpus_tables import right
from ulm.cli.train_tables import duration, pairs, styled

NUM_WORDS = 5
COMPARED = ("route", "mixture", "seed")  # with dense, below the table of `swarm train`


def plan(planned: dict[str, Any]) -> RenderableType:
    """The answer of `swarm plan`; the verdict stands below, where the eye is."""
    memory, disk, ahead = planned["memory"], planned["disk"], planned["forecast"]
    how = "found before" if planned["clusters_found_before"] else "found now"
    starts = planned["pays_from_tokens_per_parameter"]
    ahead_from = f"; ahead of dense from about {starts:.2g}" if starts is not None else ""
    rows = {
        "clusters": f"{planned['experts']}, {how}; they say {planned['information']:.2f} nats about a token",
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
    for column in table.columns[:-1]:  # where it is narrow the words are cut, and nothing else
        column.no_wrap = True
    for cluster in found:
        said = styled(" ".join(cluster["words"][:NUM_WORDS]))
        said.no_wrap, said.overflow = True, "ellipsis"
        domain = styled(cluster["domain"] or "-")
        table.add_row(cluster["member"], domain, f"{cluster['train_tokens']:,}", f"{cluster['epochs']:.2g} times", said)
    return table


def ending(name: str, perplexity_ratio: dict[str, float]) -> RenderableType:
    """Below the table of `swarm train`: perplexity as a share of dense's, and what a person may do next."""
    ratios = ", ".join(f"{key} {perplexity_ratio[key]:.3f}" for key in COMPARED if key in perplexity_ratio)
    told = [styled(f"perplexity as a share of dense's: {ratios}")] if ratios else []
    return Group(*told, styled(f"see `ulm swarm show {name}`; a recipe with `swarm: {name}` serves it", "dim"))


def manifest(found: dict[str, Any]) -> RenderableType:
    """The answer of `swarm show`."""
    table = Table("member", "mostly", Column("checkpoint", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    for member, entry in found["members"].items():
        run = "/".join(Path(entry["checkpoint"]).parts[-2:])
        table.add_row(styled(member), styled(entry["domain"] or "-"), styled(run))
    strategy = dict(found["strategy"])
    settings = ", ".join(f"{key} {value}" for key, value in strategy.items() if key != "kind")
    budget = ", ".join(f"{key} {value}" for key, value in found["budget"].items() if value is not None)
    rows = {
        "digest": found["digest"][:12],
        "strategy": strategy["kind"] + (f": {settings}" if settings else ""),
        "budget": budget or "none",
        "controls": ", ".join(name for name, control in found["controls"].items() if control) or "none",
        "corpus": found["corpus_digest"][:12],
        "tokenizer": found["tokenizer_digest"][:12],
    }
    return Group(table, pairs(rows))


def changed(what: str, result: dict[str, Any]) -> RenderableType:
    """After `swarm add` and `swarm drop`: how the text at hand is shared out now."""
    shares = ", ".join(f"{member} {share:.0%}" for member, share in result["shares"].items())
    return styled(f"{what}, which is now {result['digest'][:12]}; shares of the training text: {shares}", "dim")
