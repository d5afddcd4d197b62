"""What a worker does for a clustering: documents to the centroids they are nearest to.

No scikit-learn here: importing it takes a worker 1.5 s, as long as assigning ten thousand documents.

Shape letters: N documents, C clusters, V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from pipelines.corpus.over import Item, Task
from ulm.corpus.manifest import Corpus
from ulm.swarm.embed import Embedder

MAX_DOCUMENT_TOKENS = 4_096  # of a document's beginning that are looked at


def task(folder: Path, embedder: Embedder, centroids_CD: NDArray[np.float64]) -> Task:
    """A function that takes documents of the corpus in `folder`, as `located` gives them, to their rows and clusters.

    With each come its second cluster and its margin, as `two_nearest` has them. The clusters are -1 where no word is
    known. A document's answer does not depend on those beside it.
    """

    def assign_clusters(documents: Item) -> Item:
        h_ND = embed_texts(embedder, first_texts(_opened(folder), documents))
        two_N2, margin_N = two_nearest(h_ND, centroids_CD)
        return {"row": documents["row"], "clusters": two_N2.tolist(), "margin": margin_N.tolist()}

    return assign_clusters


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Corpus:
    """The corpus that a worker reads item after item; whoever asked has verified it."""
    return Corpus.read(folder, verify=False)


def located(corpus: Corpus, rows: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Columns row, split, first_token and num_tokens of some documents: all that reading their tokens takes."""
    columns = corpus.documents.select(["split", "first_token", "num_tokens"]).take(rows)
    return {"row": rows.tolist(), **columns.to_pydict()}


def first_texts(corpus: Corpus, documents: Mapping[str, list[Any]]) -> Iterator[str]:
    """The beginnings of documents that were `located`, decoded from their tokens."""
    columns = (documents["split"], documents["first_token"], documents["num_tokens"])
    for split, first_token, num_tokens in zip(*columns, strict=True):
        tokens = corpus.tokens(split).read(first_token, min(num_tokens, MAX_DOCUMENT_TOKENS))
        yield corpus.tokenizer.decode(tokens.tolist())


def embed_texts(embedder: Embedder, texts: Iterable[str]) -> NDArray[np.float64]:
    """Unit vectors h_ND of whole texts, zero where no word is known: `embedder` itself looks at a text's end alone."""
    return unit(project_texts(embedder, texts))


def project_texts(embedder: Embedder, texts: Iterable[str]) -> NDArray[np.float64]:
    """What the SVD sees of whole texts' unit tf-idf vectors, as p_ND, zero where no word is known."""
    rows, tf_idf, ends = [], [], [0]
    for text in texts:
        own_rows, own_tf_idf, length = embedder.weighted(text)
        rows.append(own_rows)
        tf_idf.append(own_tf_idf / (length or 1.0))
        ends.append(ends[-1] + len(own_rows))
    if not rows:
        return np.zeros((0, embedder.components_VD.shape[1]))
    shape = (len(rows), len(embedder.idf_V))
    tf_idf_NV = csr_matrix((np.concatenate(tf_idf), np.concatenate(rows), ends), shape=shape)
    return np.asarray(tf_idf_NV @ embedder.components_VD)


def unit(x_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1, those of zeros left as they are."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return np.asarray(np.divide(x_ND, length_N1, out=np.zeros_like(x_ND), where=length_N1 > 0))


def nearest(h_ND: NDArray[np.float64], centroids_CD: NDArray[np.float64]) -> NDArray[np.int64]:
    """The nearest centroid of each document, as the router finds it; no document's answer depends on another's."""
    return np.asarray(squared_distances(h_ND, centroids_CD).argmin(axis=1))


def two_nearest(
    h_ND: NDArray[np.float64], centroids_CD: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest and the second nearest centroid of each document, and by how much the second is farther (squared).

    -1 where there is no second, -1 for both where no word is known; no margin counts there.
    """
    distance_NC = squared_distances(h_ND, centroids_CD)
    two_N2 = np.full((len(h_ND), 2), -1, dtype=np.int64)
    margin_N = np.zeros(len(h_ND))
    known_N = h_ND.any(axis=1)
    order_NC = np.argsort(distance_NC, axis=1, kind="stable")[:, :2]
    two_N2[known_N, : order_NC.shape[1]] = order_NC[known_N]
    if order_NC.shape[1] == 2:
        near_N2 = np.take_along_axis(distance_NC, order_NC, axis=1)
        margin_N[known_N] = (near_N2[:, 1] - near_N2[:, 0])[known_N]
    return two_N2, margin_N


def squared_distances(h_ND: NDArray[np.float64], centroids_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    """||h - c||^2 as distance_NC, each row by itself: a matrix product's last bits depend on the rows beside it."""
    distance_NC = np.empty((len(h_ND), len(centroids_CD)))
    for cluster, centroid_D in enumerate(centroids_CD):
        distance_NC[:, cluster] = np.square(h_ND - centroid_D).sum(axis=1)
    return distance_NC
