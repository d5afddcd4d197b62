"""What a person should know of a corpus: its figures as report.json, and the same as one page, report.html.

Both are pure functions of the manifest, documents.parquet and the clusterings beside them, and no part of the corpus's
digest: they are written again when a clustering is added.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.corpus.report.page import page
from ulm import artefacts
from ulm.corpus.manifest import DOCUMENTS, REPORTS, SPLITS

PAGE, FIGURES = REPORTS
COLUMNS = ["source", "domain", "licence", "split", "num_tokens", "num_bytes"]


def write_report(folder: Path, manifest: dict[str, Any]) -> None:
    """Write report.json and report.html of the corpus in a folder, or replace them."""
    figures = corpus_figures(folder, manifest)
    artefacts.write_json(folder / FIGURES, figures)
    artefacts.write_text(folder / PAGE, page(figures, manifest))


def corpus_figures(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """All figures that the page shows, as JSON can hold them."""
    documents = pq.read_table(folder / DOCUMENTS, columns=COLUMNS)
    dropped = sum((Counter[str](stage["dropped"]) for stage in manifest["stages"]), Counter[str]())
    return {
        "name": manifest["name"],
        "digest": manifest["digest"],
        "created": manifest["created"],
        "documents": {key: manifest["documents"][key] for key in ("in", "kept")},
        "base": manifest.get("base"),
        "cut": manifest.get("cut"),
        "total": _sums(documents, None)[0],
        "splits": sorted(_sums(documents, "split"), key=lambda row: SPLITS.index(row["split"])),
        "domains": _sums(documents, "domain"),
        "sources": _sources(documents, manifest),
        "licences": _sums(documents, "licence"),
        "lengths": {unit: _lengths(documents, f"num_{unit}") for unit in ("bytes", "tokens")},
        "stages": manifest["stages"],
        "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
        "ignored": manifest.get("ignored_by_reason"),
        "near_duplicates": manifest.get("near_duplicates"),
        "tokenizer": manifest["tokenizer"],
        "padding": manifest.get("padding"),
        "clusterings": clusterings(folder),
        "seconds": manifest["seconds"],
    }


def clusterings(folder: Path) -> list[dict[str, Any]]:
    """The clusterings of the corpus in a folder, by digest: their settings, clusters and agreement with the domains."""
    places = sorted(path.parent for path in (folder / "domains").glob("*/manifest.json"))
    found = []
    for place in places:
        if not place.name.endswith(artefacts.PARTIAL):
            manifest = artefacts.read_manifest(place, "clustering")
            keys = ("digest", "kind", "config", "choice", "merged", "clusters", "agreement")
            found.append({key: manifest.get(key) for key in keys})
    return found


def _sums(documents: pa.Table, by: str | None) -> list[dict[str, Any]]:
    """Documents, tokens, bytes, share of tokens and bytes per token of each value of a column, most tokens first."""
    sums = documents.group_by([by] if by else [], use_threads=False).aggregate(
        [("num_tokens", "count"), ("num_tokens", "sum"), ("num_bytes", "sum")]
    )
    total = max(1, pc.sum(documents["num_tokens"]).as_py() or 0)
    rows = []
    for row in sums.to_pylist():
        tokens, size = row["num_tokens_sum"] or 0, row["num_bytes_sum"] or 0
        named = {by: row[by]} if by else {}
        counts = {"documents": row["num_tokens_count"], "tokens": tokens, "bytes": size}
        shares = {"share": tokens / total, "bytes_per_token": size / tokens if tokens else None}
        rows.append({**named, **counts, **shares})
    return sorted(rows, key=lambda row: (-row["tokens"], row[by] if by else ""))


def _sources(documents: pa.Table, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The sums of each source, those of which nothing is left too, and how many documents were read of it.

    None where a manifest does not say, as those of older corpora.
    """
    num_read = {source["name"]: source.get("documents", {}).get("in") for source in manifest["sources"]}
    rows = _sums(documents, "source")
    nothing = {"documents": 0, "tokens": 0, "bytes": 0, "share": 0.0, "bytes_per_token": None}
    rows += [{"source": name, **nothing} for name in sorted(num_read.keys() - {row["source"] for row in rows})]
    return [{**row, "in": num_read.get(row["source"])} for row in rows]


def _lengths(documents: pa.Table, column: str) -> dict[str, Any]:
    """Histogram of a length by split, in bins of half an octave, with median, 99th percentile and maximum."""
    values = documents[column].to_numpy()
    edges = np.unique(np.round(2.0 ** (np.arange(0, 96) / 2)))  # 1, 2, 3, 4, 6, 8, 11, …
    if len(values):
        first, last = np.searchsorted(edges, [max(1, values.min()), max(1, values.max())], side="right")
        edges = edges[first - 1 : last + 1]
    else:
        edges = edges[:2]
    counts, summary = {}, {}
    for split in SPLITS:
        mine = values[pc.equal(documents["split"], split).to_numpy(zero_copy_only=False)]
        if len(mine):
            counts[split] = np.histogram(np.maximum(mine, 1), edges)[0].tolist()
            median, p99 = np.percentile(mine, [50, 99], method="lower").tolist()
            summary[split] = {"median": median, "p99": p99, "max": int(mine.max())}
    return {"edges": edges.astype(np.int64).tolist(), "counts": counts, "summary": summary}
