"""The documents of a corpus that is extended, fingerprinted from its shards: new ones are held against them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.corpus.dedup import KEY_BYTES, content_key
from pipelines.corpus.near import NUM_HASHES, signatures
from ulm import artefacts
from ulm.corpus.manifest import Corpus
from ulm.recipes.corpus import NearDuplicates

RANGE_TOKENS = 2_000_000  # of the documents that are fingerprinted at once


def base_of(corpus: Corpus) -> list[tuple[int, int]]:
    """Ranges of documents, first and end, of about RANGE_TOKENS each."""
    after = np.cumsum(corpus.documents["num_tokens"].to_numpy())
    total = int(after[-1]) if len(after) else 0
    ends = np.searchsorted(after, np.arange(RANGE_TOKENS, total + RANGE_TOKENS, RANGE_TOKENS))
    edges = np.unique(np.concatenate([[0], np.minimum(ends + 1, len(after))])).tolist()
    return list(zip(edges, edges[1:], strict=False))


def fingerprint(place: Path, folder: str, first: int, end: int, config: NearDuplicates | None) -> None:
    """keys.npy and signatures.npy of documents first … end - 1 of the corpus in `folder`."""
    corpus = Corpus.read(Path(folder), verify=False)
    texts = [corpus.document_text(row) for row in range(first, end)]
    keys = np.frombuffer(b"".join(map(content_key, texts)), dtype=f"S{KEY_BYTES}")
    with artefacts.new_folder(place) as partial:
        np.save(partial / "keys.npy", keys, allow_pickle=False)
        found = np.zeros((0, NUM_HASHES), np.uint32) if config is None else signatures(texts, config)
        (partial / "signatures.bin").write_bytes(found.tobytes())
