"""Near duplicates that are planted in real text, found by the corpus pipeline and judged by exact similarity."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pipelines.corpus.near import band_pairs, bands, clusters, signatures
from tests.benchmarks._planted import jaccard, planted_pairs
from ulm.recipes.corpus import NearDuplicates

SHARES = (0.01, 0.02, 0.03, 0.05, 0.15, 0.3)  # of words changed: of 0.05 and more hardly any pair is like enough
MIN_CHARS, MAX_CHARS = 500, 20_000
MARGIN = 0.1  # of Jaccard similarity around the threshold, where either answer will do


def quality(texts: Sequence[str], num_texts: int, seed: int) -> dict[str, float]:
    """Recall, precision, and the share of planted pairs that is found by share of words changed ("found 0.05").

    Each share has a build of its own, of texts and one copy each, so that no copy is found through another one.
    """
    config = NearDuplicates()
    long_enough = [text for text in texts if MIN_CHARS <= len(text) <= MAX_CHARS]
    originals = random.Random(seed).sample(long_enough, min(num_texts, len(long_enough)))
    signature_NE = signatures(originals, config)
    due, good, figures = [], [], {}
    for share in SHARES:
        copies = planted_pairs(originals, share, seed)
        both = [*originals, *copies]
        both_NE = np.concatenate([signature_NE, signatures(copies, config)])
        pairs = np.unique(np.concatenate([band_pairs(both_NE, b, config) for b in range(bands(config)[0])]), axis=0)
        cluster = clusters(len(both), pairs)
        found = cluster[: len(originals)] == cluster[len(originals) :]
        similarity = np.array([jaccard(a, b, config.ngram_words) for a, b in zip(originals, copies, strict=True)])
        due.append(found[similarity >= config.threshold + MARGIN])
        reported = np.array([jaccard(both[i], both[j], config.ngram_words) for i, j in pairs])
        good.append(reported >= config.threshold - MARGIN)
        figures[f"found {share}"] = float(found.mean())
    all_due, all_good = np.concatenate(due), np.concatenate(good)
    counts = {"due": len(all_due), "reported": len(all_good)}
    return {"recall": float(all_due.mean()), "precision": float(all_good.mean()), **counts, **figures}
