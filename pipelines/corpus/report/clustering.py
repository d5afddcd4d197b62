"""A clustering on the page: its clusters with their domains, words and titles, and how they were found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.html import MAX_LABEL, Html, counted, fill, stack, table, text

NUM_COLOURS = 10  # --c0 … of the style


def clustering(shown: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The heading, notes and table of one clustering."""
    colour = {row["domain"]: n for n, row in enumerate(figures["domains"][:NUM_COLOURS])}
    key = "".join(
        f"<span><i style={fill(n)}></i><bdi>{text(name, MAX_LABEL)}</bdi></span>" for name, n in colour.items()
    )
    if len(figures["domains"]) > NUM_COLOURS:
        key += f"<span><i style={fill(None)}></i>others</span>"
    rows = []
    for number, cluster in enumerate(shown["clusters"]):
        tokens = sum(cluster["domains"].values()) or 1
        ordered = sorted(cluster["domains"].items(), key=lambda item: (-item[1], item[0]))
        composed = stack([(n / tokens, fill(colour.get(domain))) for domain, n in ordered])
        about = f"<bdi>{text(', '.join(cluster['words']))}</bdi>"
        if titles := cluster.get("titles"):
            listed = "".join(f"<div class=soft><bdi>{text(title, MAX_LABEL)}</bdi></div>" for title in titles)
            about += listed
        train = cluster["tokens"].get("train", 0)
        rows.append([f"{number:02d}", composed, cluster["documents"], train, Html(f"<div class=words>{about}</div>")])
    head = ("cluster", "domains", "documents", "train tokens", "words and titles")
    title = f"{counted(len(rows), 'cluster')}, {text(shown['kind'])} <code>{shown['digest'][:12]}</code>"
    notes = " ".join(["Each bar is a cluster's domains by tokens.", *_notes(shown, figures["total"]["documents"])])
    return f"<h3>{title}</h3><p>{notes}</p><div class=key>{key}</div>{table(head, rows)}"


def _notes(shown: Mapping[str, Any], num_documents: int) -> list[str]:
    """Sentences on the agreement with the domains, the number of clusters, and what is in none."""
    notes = []
    if agreement := shown["agreement"]:
        nmi = f"a normalised mutual information of {agreement['nmi']:.2f}"
        notes.append(f"They agree with the domains to {nmi}, purity {agreement['purity']:.2f}.")
    if choice := shown["choice"]:
        scores = ", ".join(f"{tried['score']:.3f} for {tried['num_clusters']:,}" for tried in choice["tried"])
        chosen = f"Their number was chosen by {text(choice['criterion'])}: {scores}."
        notes.append(chosen if scores else "There were too few documents to choose their number.")
    if merged := shown["merged"]:
        notes.append(f"{counted(merged, 'cluster')} too small, merged into the nearest.")
    if others := num_documents - sum(cluster["documents"] for cluster in shown["clusters"]):
        belong = "belongs" if others == 1 else "belong"
        notes.append(f"{counted(others, 'document')} without a word of the vocabulary {belong} to none.")
    return notes
