"""What `ulm corpus` shows of a corpus, as tables; whatever comes from outside is text, never markup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from ulm.cli.console import printable

if TYPE_CHECKING:
    from ulm.corpus.manifest import Corpus

MAX_ROWS = 20  # of each part of a comparison; the JSON line has all


def plan(planned: dict[str, Any]) -> RenderableType:
    """The estimate of `corpus build --plan`."""
    minutes, seconds = divmod(round(planned["seconds"]), 60)
    rows = {
        "files": f"{planned['files']:,} of {decimal(planned['source_bytes'])}",
        "documents": f"about {planned['documents']:,}",
        "tokens": f"about {planned['tokens']:,}",
        "time": f"about {minutes} min {seconds} s with {planned['workers']} workers",
        "memory": f"about {decimal(planned['memory_bytes'])}",
        "disk": f"about {decimal(planned['disk_bytes'])}",
        "from a sample of": decimal(planned["sample_bytes"]),
        "files not read": _count(planned["ignored"]),
    }
    return _pairs(rows)


def summary(corpus: Corpus) -> RenderableType:
    """A corpus in a few lines."""
    manifest = corpus.manifest
    documents = manifest.get("documents")
    rows = {"corpus": f"{corpus.name}  {corpus.digest[:12]}", "created": str(manifest.get("created", "-"))}
    if documents:
        rows["documents"] = f"{documents['kept']:,} of {documents['in']:,}"
    rows["tokens"] = ", ".join(f"{split} {corpus.num_tokens(split):,}" for split in corpus.splits)
    rows["sources"] = ", ".join(source["name"] for source in manifest["sources"][:MAX_ROWS])
    if ignored := manifest.get("ignored_by_reason"):
        rows["files not read"] = ", ".join(f"{reason} {count:,}" for reason, count in ignored.items())
    return _pairs(rows)


def token_place(found: dict[str, Any]) -> RenderableType:
    """A token in its text, and the document it stands in."""
    about = found["document"]
    shown = Text.assemble(_text(found["before"]), _text(found["text"], "bold reverse"), _text(found["after"]))
    place = f"{found['token_in_document']:,} of {about['num_tokens']:,}, in the document's tokens"
    return Group(shown, _text(""), _pairs({"token": place, **_about(found)}))


def document(found: dict[str, Any]) -> RenderableType:
    """A document, its beginning, and which corpora, models and swarms have it."""
    held = Table("corpus", "digest", "split", title="held by", title_justify="left")
    for row in found["corpora"]:
        held.add_row(_text(row["name"]), row["digest"][:12], row["split"])
    seen = Table("model", "step", "how", "passes", title="seen by", title_justify="left")
    for row in found["models"]:
        seen.add_row(_text(row["model"]), f"{row['step']:,}", row["how"], str(row.get("passes", "")))
    swarms = [f"{', '.join(row['names']) or row['swarm'][:12]}: {', '.join(row['members'])}" for row in found["swarms"]]
    parts: list[RenderableType] = [_text(found["text"]), _text(""), _pairs(_about(found)), held]
    parts.append(seen if found["models"] else _text("no model in this root was trained on it"))
    parts += [_text(f"swarm {line}") for line in swarms]
    parts += [_text(f"not readable, it may have seen it too: {line}", "yellow") for line in found["unreadable"]]
    return Group(*parts)


def comparison(found: dict[str, Any]) -> RenderableType:
    """What differs between two corpora."""
    if found["same"]:
        return _text("the same corpus")
    a, b = found["a"], found["b"]
    parts: list[RenderableType] = [_text(f"A  {a['name']}  {a['digest'][:12]}\nB  {b['name']}  {b['digest'][:12]}\n")]
    documents = found["documents"]
    counts = {
        "documents": f"{documents['a']:,} to {documents['b']:,}: {documents['added']:,} added, "
        f"{documents['removed']:,} removed, {documents['common']:,} in both",
        **{f"sources {what}".replace("_", " "): ", ".join(names) for what, names in found["sources"].items() if names},
    }
    if documents["moved"]:
        counts["other split"] = ", ".join(f"{count:,} from {way}" for way, count in documents["moved"].items())
    tokenizer = found["tokenizer"]
    size = tokenizer["vocab_size"]
    counts["tokenizer"] = (
        "the same"
        if tokenizer["same"]
        else f"{size['a']:,} to {size['b']:,} tokens: {tokenizer['added']:,} added, {tokenizer['removed']:,} removed"
    )
    for what in ("added", "removed"):
        if tokenizer[what]:
            counts[f"tokens {what}"] = " ".join(repr(token) for token in tokenizer[f"{what}_examples"][:10]) + " …"
    parts.append(_pairs(counts))
    for part in ("splits", "domains", "licences"):
        changed = {name: row for name, row in found[part].items() if row["a"] != row["b"]}
        if changed:
            parts.append(_before_and_after(part, changed))
    if stages := [row for row in found["stages"] if row["a"] != row["b"]]:
        table = Table(
            "stage",
            *right("left in A", "left in B", "dropped in A", "dropped in B"),
            title="stages",
            title_justify="left",
        )
        for row in stages:
            left = ["-" if row[side] is None else f"{row[side]['out']:,}" for side in "ab"]
            gone = ["-" if row[side] is None else f"{row[side]['in'] - row[side]['out']:,}" for side in "ab"]
            table.add_row(_text(row["stage"]), *left, *gone)
        parts.append(table)
    if found["settings"]:
        table = Table("setting", "A", "B", title="settings", title_justify="left")
        for row in found["settings"][:MAX_ROWS]:
            table.add_row(*(_text(str(row[key])) for key in ("setting", "a", "b")))
        parts.append(table)
    return Group(*parts)


def _before_and_after(title: str, rows: dict[str, Any]) -> Table:
    titles = ("documents A", "documents B", "tokens A", "tokens B", "share A", "share B")
    table = Table(title.removesuffix("s"), *right(*titles), title=title, title_justify="left")
    largest = sorted(rows.items(), key=lambda item: -abs(item[1]["a"]["tokens"] - item[1]["b"]["tokens"]))
    for name, row in largest[:MAX_ROWS]:
        cells = [f"{row[side][key]:,}" for key in ("documents", "tokens") for side in "ab"]
        cells += [f"{100 * row[side]['share']:.1f} %" for side in "ab"]
        table.add_row(_text(name), *cells)
    return table


def _about(found: dict[str, Any]) -> dict[str, str]:
    about = found["document"]
    return {
        "document": about["id"],
        "from": f"{about['source']}: {about['path']}, offset {about['offset']:,}",
        "domain, licence": f"{about['domain']}, {about['licence']}",
        "split": f"{about['split']}, {about['num_tokens']:,} tokens from {about['first_token']:,} on",
    }


def _pairs(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(_text(name, "dim"), _text(value))
    return table


def right(*titles: str) -> list[Column]:
    """Columns of figures."""
    return [Column(title, justify="right") for title in titles]


def _count(value: Any) -> str:
    return f"{value if isinstance(value, int) else len(value):,}"


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)
