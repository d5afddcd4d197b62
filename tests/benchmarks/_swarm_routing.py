"""How often the router finds the domain of a short text: accuracy on passages of held-out documents.

The clusters are found without a label; each is then mapped to the domain of most of its training text. The peer is a
unigram naive Bayes with labels, on the same 13 domains: 96.9 % (README of the corpora, section 6).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus.domains import cluster_corpus
from tests.written_corpus import write_corpus
from ulm.corpus.manifest import Corpus
from ulm.recipes.clustering import Clustering
from ulm.swarm.router import Router

NAIVE_BAYES = 0.969  # supervised, from the README of the corpora
NUM_CLUSTERS, SNIPPETS_PER_DOMAIN = 32, 500
SNIPPET_CHARS = 300
PIECE_CHARS = 4_000  # of a document: what the fit looks at of one
FOREIGN = ("german_law", "scripture_kjv")  # domains that the swarm of the far figure has never seen


def documents(train: Path, domains: list[str]) -> Iterator[tuple[str, str, str]]:
    """(domain, split, text) of the corpora, long documents in pieces, so that the fit sees all of them."""
    for domain in domains:
        for split in ("train", "val", "test"):
            for text in _texts(train / domain, split):
                for start in range(0, len(text), PIECE_CHARS):
                    yield domain, split, text[start : start + PIECE_CHARS]


def _texts(folder: Path, split: str) -> Iterator[str]:
    if (lines := folder / f"{split}.jsonl").is_file():
        with lines.open(encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)
    elif (plain := folder / f"{split}.txt").is_file():
        yield plain.read_text(encoding="utf-8")


def held_out_snippets(train: Path, domain: str, seed: int = 0) -> list[str]:
    """Passages of a domain's val and test text, from documents drawn in proportion to their length."""
    texts = [text for split in ("val", "test") for text in _texts(train / domain, split)]
    generator = np.random.default_rng(seed)
    lengths = np.array([len(text) for text in texts])
    drawn = generator.multinomial(SNIPPETS_PER_DOMAIN, lengths / lengths.sum())
    return [passage for text, count in zip(texts, drawn, strict=True) for passage in _cut(text, count, generator)]


def _cut(text: str, count: int, generator: np.random.Generator) -> list[str]:
    starts = generator.integers(0, max(1, len(text) - SNIPPET_CHARS + 1), count)
    return [text[start : start + SNIPPET_CHARS] for start in starts]


def routing_accuracy(home: Path, train: Path, num_clusters: int = NUM_CLUSTERS) -> dict[str, Any]:
    """Accuracy over the domains of `train`, in all and for each, with the time that one text takes in ms.

    {"accuracy", "by_domain", "ms_per_text", "clusters", "naive_bayes"}; `home` keeps the corpus and its clustering.
    """
    domains = sorted(path.name for path in train.iterdir() if path.is_dir())
    router, names = _clustered(home, train, "routing", domains, num_clusters)
    right, seconds = {}, []
    for domain in domains:
        hits = 0
        for passage in held_out_snippets(train, domain):
            started = time.perf_counter()
            weight_N = router.weights(passage)
            seconds.append(time.perf_counter() - started)
            hits += names[int(weight_N.argmax())] == domain
        right[domain] = hits / SNIPPETS_PER_DOMAIN
    return {
        "accuracy": float(np.mean(list(right.values()))),
        "by_domain": right,
        "ms_per_text": 1e3 * float(np.median(seconds)),
        "clusters": len(router.ids),
        "snippet_chars": SNIPPET_CHARS,
        "naive_bayes": NAIVE_BAYES,
    }


def far_share(home: Path, train: Path, foreign: tuple[str, ...] = FOREIGN, num_clusters: int = 8) -> dict[str, float]:
    """How often held-out passages of each domain are far, for a router that has never seen the `foreign` ones."""
    domains = sorted(path.name for path in train.iterdir() if path.is_dir())
    known = [domain for domain in domains if domain not in foreign]
    router, _ = _clustered(home, train, "known", known, num_clusters)
    return {d: float(np.mean([router.is_far(text) for text in held_out_snippets(train, d)])) for d in domains}


def _clustered(
    home: Path, train: Path, name: str, domains: list[str], num_clusters: int
) -> tuple[Router, list[str | None]]:
    """A router over the domains' training text, and the domain of most of each cluster's."""
    pointer = home / "corpora" / "names" / name
    corpus = (
        Corpus.open(name, root=home) if pointer.is_file() else write_corpus(home, documents(train, domains), name=name)
    )
    clusters = cluster_corpus(corpus, num_clusters, Clustering())
    return Router.load(clusters.folder), clusters.domains
