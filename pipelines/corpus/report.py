"""A corpus on one page: what went in, what was dropped and why, what is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}"


def write_report(path: Path, manifest: dict[str, Any]) -> None:
    """The manifest's figures as HTML."""
    documents, tokenizer = manifest["documents"], manifest["tokenizer"]
    stages = [(s["stage"], s["in"], s["out"], _reasons(s["dropped"])) for s in manifest["stages"]]
    domains = [(d["domain"], d["split"], d["documents"], d["tokens"], d["bytes"]) for d in manifest["domains"]]
    dropped = [(d["source"], d["path"], d["reason"]) for d in manifest["dropped"][:100]]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(manifest['name'])}</title><style>{_STYLE}</style>",
        f"<h1>Corpus {escape(manifest['name'])}</h1><p><code>{manifest['digest']}</code></p>",
        f"<p>{documents['in']:,} documents in, {documents['kept']:,} kept. ",
        f"Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens.</p>",
        _table("Domains", ("domain", "split", "documents", "tokens", "bytes"), domains),
        _table("Stages", ("stage", "in", "out", "dropped"), stages),
        _table("Dropped (the first hundred)", ("source", "path", "reason"), dropped),
        "</html>\n",
    ]
    path.write_text("".join(parts), encoding="utf-8")


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<h2>{title}</h2><table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table>"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
