"""The page of a corpus report: one file without scripts or links to elsewhere, for any width and for dark mode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.corpus.report.clustering import clustering
from pipelines.corpus.report.plots import cluster_size_plot, length_plot
from pipelines.report.html import (
    MAX_LABEL,
    Html,
    bar,
    count,
    counted,
    details,
    document,
    fill,
    plural,
    ratio,
    section,
    size,
    stack,
    table,
    text,
    tiles,
)

MAX_ROWS = 50  # of a table of reasons, domains, sources or licences
MAX_SAMPLES = 8  # texts shown of one reason
MAX_LISTED = 100  # dropped and ignored files shown by name


def page(figures: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The whole page; `manifest` gives what is no figure: texts, paths, settings."""
    body = [
        _head(figures, manifest),
        section("Lengths", *_lengths(figures)),
        section("Stages", *_stages(figures)),
        section("Dropped", *_dropped(figures, manifest)),
        section("Near duplicates", *_near_duplicates(figures)),
        section("Domains", *_shares(figures)),
        section("Clusters", *(clustering(c, figures) for c in figures["clusterings"])),
        section("How it was made", *_made(figures, manifest)),
    ]
    return document(figures["name"], "".join(body))


def _more(found: int, shown: int) -> str:
    """That a table leaves rows out, if it does."""
    return f"<p>and {found - shown:,} more, in report.json and the manifest</p>" if found > shown else ""


def _head(figures: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    documents, total, tokenizer = figures["documents"], figures["total"], figures["tokenizer"]
    kept = 100 * documents["kept"] / max(1, documents["in"])
    shown = [
        (f"{documents['kept']:,}", f"{plural(documents['kept'], 'document')}, {kept:.1f} % of {documents['in']:,}"),
        (count(total["tokens"]), "tokens"),
        (size(total["bytes"]), "of text"),
        (ratio(total["bytes_per_token"]), "bytes per token"),
        (f"{tokenizer['vocab_size']:,}", f"{text(tokenizer['kind'])} vocabulary"),
    ]
    if padding := figures["padding"]:
        shown.append((f"{100 * padding['share']:.1f} %", f"padding in rows of {padding['context_tokens']:,} tokens"))
    splits = table(
        ("split", "documents", "tokens", "share of tokens", "text", "bytes per token"),
        [[s["split"], s["documents"], s["tokens"], bar(s["share"]), size(s["bytes"]), s["bytes_per_token"]]
         for s in figures["splits"]],
    )  # fmt: skip
    made = f"{text(figures['created'])} by µLM {text(manifest['code_version'])}"
    name = text(figures["name"], MAX_LABEL)
    return (
        f"<h1><bdi>{name}</bdi></h1><p>Corpus <code>{text(figures['digest'])}</code><br>{made}</p>"
        f"{tiles(shown)}<h3>Splits</h3>{splits}"
    )


def _lengths(figures: Mapping[str, Any]) -> list[str]:
    lengths = figures["lengths"]
    if not lengths["bytes"]["counts"]:
        return []
    plots = "".join(f"<figure>{length_plot(lengths[unit], unit)}</figure>" for unit in ("bytes", "tokens"))
    rows = []
    for split in lengths["bytes"]["summary"]:
        in_bytes, in_tokens = (lengths[unit]["summary"][split] for unit in ("bytes", "tokens"))
        at = ("median", "p99", "max")
        rows.append([split, *(size(in_bytes[key]) for key in at), *(in_tokens[key] for key in at)])
    head = ("split", "median", "99 % are below", "longest", "median tokens", "99 % are below", "most tokens")
    return [f"<div class=plots>{plots}</div>", "<h3>In figures</h3>", table(head, rows)]


def _stages(figures: Mapping[str, Any]) -> list[str]:
    whole = max([stage["in"] for stage in figures["stages"]], default=0) or 1
    rows = []
    left = 0
    for stage in figures["stages"]:
        reasons = ", ".join(
            f"{reason.removeprefix(stage['stage'] + ': ')} {n:,}" for reason, n in stage["dropped"].items()
        )
        lost = stage["in"] - stage["out"]
        before = max(left, stage["in"])
        left = before - lost
        drawn = stack([(left / whole, fill(0)), (lost / whole, "background:var(--bad)")])
        if stage["in"] < before:  # as html, which is for some formats alone
            drawn = Html(f"<span class=soft>saw {stage['in']:,} of {before:,}</span>")
        row = [stage["stage"], left, drawn, lost or "", stage.get("changed") or ""]
        seconds = stage.get("cpu_seconds")
        rows.append([*row, "" if seconds is None else f"{seconds:,.1f} s", Html(text(reasons))])
    head = ("stage", "left", "", "dropped", "changed", "CPU", "reasons")
    of = f", of the {counted(_num_new(figures), 'document')} that this version adds" if figures["base"] else ""
    note = f"In the order they ran{of}: documents left after each stage, and those whose text it altered."
    return [f"<p>{note}</p>", table(head, rows)]


def _num_new(figures: Mapping[str, Any]) -> int:
    """Documents that were read for this version; stages and reasons are of these."""
    base = figures["base"]
    num_in: int = figures["documents"]["in"]
    return num_in - (base["documents"] if base else 0)


def _dropped(figures: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    dropped, samples = figures["dropped"], manifest.get("samples", {})
    parts = []
    if dropped:
        of = max(1, _num_new(figures))
        rows = [[reason, n, f"{100 * n / of:.2f} %", bar(n / of, "--bad")] for reason, n in dropped.items()]
        head = ("reason", "documents", "of those added" if figures["base"] else "of all", "")
        parts += [table(head, rows[:MAX_ROWS]), _more(len(rows), MAX_ROWS)]
    parts += [
        _samples(reason, samples[reason]) for reason in dict.fromkeys([*dropped, *samples]) if samples.get(reason)
    ]
    if listed := manifest["dropped"]:
        rows = [[row["source"], _place(row), row["reason"]] for row in listed[:MAX_LISTED]]
        parts.append(details(f"Where they stood (the first {len(rows)})", table(("source", "path", "reason"), rows)))
    if ignored := manifest["ignored"]:
        rows = [[row["source"], row["path"], row["reason"]] for row in ignored[:MAX_LISTED]]
        parts.append(details(_not_read(figures["ignored"], len(rows)), table(("source", "path", "reason"), rows)))
    if (cut := figures["cut"]) and cut["documents"]:
        long, added = counted(cut["documents"], "long document"), counted(cut["pieces_added"], "document")
        parts.append(f"<p>{long} cut, which made {added} more.</p>")
    return parts


def _not_read(by_reason: Mapping[str, int] | None, num_shown: int) -> str:
    """How many files were not read and why; a manifest of before it was counted has the first of them alone."""
    if not by_reason:
        return f"Files not read (the first {num_shown:,})"
    total = sum(by_reason.values())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(by_reason.items(), key=lambda item: -item[1]))
    shown = f" (the first {num_shown:,} below)" if num_shown < total else ""
    return f"{counted(total, 'file')} not read: {text(reasons)}{shown}"


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['path']} row {row['row']}" if "row" in row else str(row["path"])


def _samples(reason: str, samples: Sequence[Mapping[str, Any]]) -> str:
    shown = "".join(
        f"<div class=soft><bdi>{text(sample['source'], MAX_LABEL)}</bdi> · "
        f"<bdi>{text(sample['path'], MAX_LABEL)}</bdi></div><pre dir=auto>{text(sample['text'])}</pre>"
        for sample in samples[:MAX_SAMPLES]
    )
    return details(f"Read some: <bdi>{text(reason, MAX_LABEL)}</bdi>", f"<div>{shown}</div>")


def _near_duplicates(figures: Mapping[str, Any]) -> list[str]:
    near = figures["near_duplicates"]
    if not near:
        return []
    found = (
        f"{counted(near['clusters'], 'cluster')} of {counted(near['documents'], 'document')} that are nearly the same"
    )
    parts = [f"<p>{found}; {counted(near['dropped'], 'document')} dropped.</p>"]
    if near["sizes"]:
        parts.append(f"<div class=plots><figure>{cluster_size_plot(near['sizes'])}</figure></div>")
    for cluster in near["largest"]:
        paths = "<br>".join(f"<bdi>{text(path, MAX_LABEL)}</bdi>" for path in cluster["paths"][:MAX_SAMPLES])
        shown = f"<pre dir=auto>{text(cluster['text'])}</pre><div class=soft>{paths}</div>"
        parts.append(details(counted(cluster["documents"], "document"), shown))
    return parts


def _shares(figures: Mapping[str, Any]) -> list[str]:
    parts = []
    for title, kind in (("", "domain"), ("Sources", "source"), ("Licences", "licence")):
        found = figures[kind + "s"]
        if kind == "source" and _says_no_more(found, figures["domains"]):
            continue
        columns = {"in": "in", "kept": "documents"} if kind == "source" else {"documents": "documents"}
        empty = sum(row["documents"] == 0 for row in found)  # only sources can be
        note = f"<p>Nothing is left of {empty:,} of {counted(len(found), 'source')}.</p>" if empty else ""
        rows = [
            [row[kind], *(row[key] for key in columns.values()), row["tokens"], f"{100 * row['share']:.1f} %",
             bar(row["share"]), size(row["bytes"]), row["bytes_per_token"]]
            for row in found[:MAX_ROWS]
        ]  # fmt: skip
        head = (kind, *columns, "tokens", "of tokens", "", "text", "bytes per token")
        parts += [f"<h3>{title}</h3>" if title else "", note, table(head, rows), _more(len(found), MAX_ROWS)]
    return parts


def _says_no_more(sources: Sequence[Mapping[str, Any]], domains: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each source is its own domain and whole, as far as is known."""
    whole = all(row["in"] in (None, row["documents"]) for row in sources)
    return whole and [row["source"] for row in sources] == [row["domain"] for row in domains]


def _made(figures: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    content = manifest["content"]
    settings = {key: content[key] for key in ("clean", "split", "sources") if key in content}
    as_json = json.dumps(settings, indent=2, ensure_ascii=False)
    seconds = [[stage, f"{value:,.1f} s"] for stage, value in figures["seconds"].items()]
    origins = [[s["name"], s["origin"], s["licence"], s["weight"]] for s in manifest["sources"]]
    return [
        table(("source", "from", "licence", "weight"), origins[:MAX_ROWS]),
        _more(len(origins), MAX_ROWS),
        details("Time", table(("part", "wall clock"), seconds)) if seconds else "",
        details("Settings", f"<pre class=whole>{text(as_json, 20_000)}</pre>"),
    ]
