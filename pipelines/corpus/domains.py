"""Clusterings: documents to clusters of like text, and the router that the same fit gives (c-BTM, arXiv 2303.14177).

tf-idf and SVD are scikit-learn's, the balanced assignment is ours: while k-means is fitted, every cluster takes about
the same number of training tokens; afterwards each document of every split goes to its nearest centroid, which is what
the router does when it serves.

Shape letters: N documents, C clusters, V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from ulm import artefacts
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.recipes.train import Clustering
from ulm.swarm.embed import Embedder, words
from ulm.swarm.router import Router

MAX_FIT_DOCUMENTS = 50_000  # of the training split, chosen by seed: c-BTM's minibatch of documents
MAX_DOCUMENT_TOKENS = 4_096  # of a document's beginning that are looked at
BALANCE_SLACK = 0.1  # a cluster is full when it has this much more than its even share of tokens
RESTARTS = 4  # of k-means, the best kept: one start in several ends in a poor optimum
ALGORITHM = 1  # part of the digest: raise it when the same input would give other clusters


@dataclass(frozen=True)
class Clusters:
    """A stored clustering."""

    folder: Path  # also the router's
    digest: str
    cluster_N: NDArray[np.int32]  # of each document in the corpus's order, -1 for none
    domains: list[str | None]  # each cluster's main domain; None for an empty one
    tokens: list[int]  # each cluster's training tokens

    def documents(self, cluster: int) -> Path:
        """The .npy file of a cluster's documents, as rows of documents.parquet."""
        return self.folder / f"documents-{cluster:02d}.npy"


def cluster_corpus(
    corpus: Corpus, num_clusters: int, config: Clustering, *, kind: Literal["tf-idf", "random"] = "tf-idf"
) -> Clusters:
    """The clustering of a corpus, made now or found as made before: the same input has the same digest.

    `random` is the control: clusters of even size drawn by seed, with the router that their centroids give.
    """
    identity = {
        "algorithm": ALGORITHM,
        "kind": kind,
        "corpus": corpus.digest,
        "num_clusters": num_clusters,
        "config": config.model_dump(),
    }
    digest = artefacts.digest_json(identity)
    place = corpus.folder / "domains" / digest
    if not place.is_dir():
        _make(corpus, num_clusters, config, kind, place, {"digest": digest, **identity})
    return load_clusters(place)


def load_clusters(folder: Path) -> Clusters:
    """A stored clustering, its files checked against its manifest."""
    manifest = artefacts.read_manifest(folder, "clustering")
    artefacts.verify_files(folder, manifest["files"])
    cluster_N = np.load(folder / "assignments.npy")[:, 0]
    main = [cluster["domain"] for cluster in manifest["clusters"]]
    tokens = [cluster["tokens"]["train"] for cluster in manifest["clusters"]]
    return Clusters(folder, manifest["digest"], cluster_N, main, tokens)


def _make(
    corpus: Corpus, num_clusters: int, config: Clustering, kind: str, place: Path, identity: dict[str, Any]
) -> None:
    documents = corpus.documents
    split_N = np.array(documents["split"].to_pylist())
    tokens_N = documents["num_tokens"].to_numpy()
    train = np.flatnonzero(split_N == "train")
    if len(train) < num_clusters:
        problem = f"{num_clusters} clusters of {len(train)} training documents"
        raise ConfigError(
            "experts", problem, "fewer experts, or sources cut into smaller documents (document: paragraph)"
        )
    embedder, h_ND = embed_documents(corpus, train, config)
    known_N = np.linalg.norm(h_ND, axis=1) > 0
    if kind == "random":
        cluster_N = _random_clusters(tokens_N, split_N, num_clusters, config.seed)
    else:
        fit = train[known_N[train]]
        centroids_CD = balanced_kmeans(h_ND[fit], tokens_N[fit], num_clusters, config.iterations, config.seed)
        cluster_N = np.where(known_N, _squared_distances(h_ND, centroids_CD).argmin(axis=1), -1).astype(np.int32)
    train_N = split_N == "train"
    weight_NC = (cluster_N[:, None] == np.arange(num_clusters)) * (tokens_N * train_N)[:, None]
    if kind == "random":
        centroids_CD = (weight_NC.T @ h_ND) / np.maximum(1, weight_NC.sum(axis=0))[:, None]
    tokens_C = weight_NC.sum(axis=0)
    router = Router(
        [f"e{c:02d}" for c in range(num_clusters)],
        embedder,
        centroids_CD.astype(np.float32),
        tokens_C / tokens_C.sum(),
        config.temperature,
    )
    with artefacts.new_folder(place) as folder:
        np.save(folder / "assignments.npy", cluster_N[:, None])
        for cluster in range(num_clusters):  # what the training of one expert reads
            np.save(folder / f"documents-{cluster:02d}.npy", np.flatnonzero(cluster_N == cluster))
        router.write(folder)
        clusters = [_describe(documents, cluster_N == c, router, c) for c in range(num_clusters)]
        manifest = {"format_version": artefacts.FORMAT_VERSION, **identity, "clusters": clusters}
        artefacts.write_json(folder / "manifest.json", {**manifest, "files": artefacts.digest_files(folder)})


def _describe(documents: Any, chosen_N: NDArray[np.bool_], router: Router, cluster: int) -> dict[str, Any]:
    """What a reader wants to know of a cluster: its domains by training tokens, its size, its characteristic words."""
    members = documents.filter(chosen_N)
    by_split = members.group_by("split").aggregate([("num_tokens", "sum")])
    tokens = dict(zip(by_split["split"].to_pylist(), by_split["num_tokens_sum"].to_pylist(), strict=True))
    by_domain = members.group_by("domain").aggregate([("num_tokens", "sum")])
    domains = dict(zip(by_domain["domain"].to_pylist(), by_domain["num_tokens_sum"].to_pylist(), strict=True))
    names = sorted(router.embedder.vocabulary, key=router.embedder.vocabulary.__getitem__)
    typical_V = router.embedder.components_VD @ (router.centroids_ND[cluster] - router.centroids_ND.mean(axis=0))
    return {
        "domain": max(sorted(domains), key=domains.__getitem__) if domains else None,
        "domains": domains,
        "documents": members.num_rows,
        "tokens": {"train": 0, **tokens},
        "words": [names[row] for row in np.argsort(-typical_V, kind="stable")[:8]],
    }


def embed_documents(
    corpus: Corpus, train: NDArray[np.int64], config: Clustering
) -> tuple[Embedder, NDArray[np.float32]]:
    """The fitted transform, and unit vectors h_ND of all documents (zero where no word is known)."""
    chosen = train
    if len(train) > MAX_FIT_DOCUMENTS:
        chosen = np.sort(np.random.default_rng(config.seed).choice(train, MAX_FIT_DOCUMENTS, replace=False))
    vectorizer = TfidfVectorizer(analyzer=content_words, max_features=config.max_features)
    try:
        tf_idf_NV = vectorizer.fit_transform(_texts(corpus, chosen))
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise ConfigError("corpus", f"no words to cluster by: {error}", "experts need text with words") from None
    num_documents, num_words = tf_idf_NV.shape
    dimensions = max(1, min(config.dimensions, num_words - 1, num_documents - 1))
    svd = TruncatedSVD(dimensions, random_state=config.seed)
    h_ND = np.zeros((corpus.documents.num_rows, dimensions), dtype=np.float32)
    h_ND[chosen] = _unit(svd.fit_transform(tf_idf_NV))
    others = np.setdiff1d(np.arange(len(h_ND)), chosen)
    for start in range(0, len(others), 4_096):
        batch = others[start : start + 4_096]
        h_ND[batch] = _unit(svd.transform(vectorizer.transform(_texts(corpus, batch))))
    components_VD = np.ascontiguousarray(svd.components_.T, dtype=np.float32)
    vocabulary = {word: int(row) for word, row in vectorizer.vocabulary_.items()}
    return Embedder(vocabulary, np.asarray(vectorizer.idf_, dtype=np.float64), components_VD), h_ND


def content_words(text: str) -> list[str]:
    """Words of a text without English stop words."""
    return [word for word in words(text) if word not in ENGLISH_STOP_WORDS]


def _texts(corpus: Corpus, documents: NDArray[np.int64]) -> Iterator[str]:
    """The beginnings of documents, decoded from their tokens."""
    columns = corpus.documents.select(["split", "first_token", "num_tokens"])
    for row in columns.take(documents).to_pylist():
        tokens = corpus.tokens(row["split"]).read(row["first_token"], min(row["num_tokens"], MAX_DOCUMENT_TOKENS))
        yield corpus.tokenizer.decode(tokens.tolist())


def _unit(x_ND: NDArray[Any]) -> NDArray[Any]:
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return np.asarray(np.divide(x_ND, length_N1, out=np.zeros_like(x_ND), where=length_N1 > 0))


def _squared_distances(h_ND: NDArray[Any], centroids_CD: NDArray[Any]) -> NDArray[np.float64]:
    """||h - c||^2 as distance_NC."""
    squares_N1 = np.square(h_ND, dtype=np.float64).sum(axis=1, keepdims=True)
    products_NC = h_ND.astype(np.float64) @ centroids_CD.T.astype(np.float64)
    return np.asarray(squares_N1 - 2 * products_NC + np.square(centroids_CD, dtype=np.float64).sum(axis=1))


def balanced_kmeans(
    h_ND: NDArray[np.float32], tokens_N: NDArray[np.int64], num_clusters: int, iterations: int, seed: int
) -> NDArray[np.float64]:
    """Centroids_CD of clusters with about equal tokens; the same input and seed give the same clusters.

    k-means where a document weighs its tokens and the assignment is `assign_balanced`; clusters are numbered by the
    first document they hold.
    """
    best_cost, best_N = np.inf, np.zeros(len(h_ND), dtype=np.int64)
    for restart in range(RESTARTS):
        start = kmeans_plusplus(h_ND, num_clusters, sample_weight=tokens_N, random_state=seed + restart)
        centroids_CD = start[0].astype(np.float64)
        cluster_N = np.full(len(h_ND), -1)
        for _ in range(iterations):
            distance_NC = _squared_distances(h_ND, centroids_CD)
            previous_N, cluster_N = cluster_N, assign_balanced(distance_NC, tokens_N)
            if np.array_equal(previous_N, cluster_N):
                break
            centroids_CD = _means(h_ND, tokens_N, cluster_N, centroids_CD)
        cost = float((tokens_N * _squared_distances(h_ND, centroids_CD)[np.arange(len(h_ND)), cluster_N]).sum())
        if cost < best_cost:
            best_cost, best_N, best_CD = cost, cluster_N, centroids_CD
    first_C = [int(np.argmax(best_N == c)) if (best_N == c).any() else len(best_N) for c in range(num_clusters)]
    return np.asarray(best_CD[np.argsort(first_C, kind="stable")])


def _means(
    h_ND: NDArray[np.float32], tokens_N: NDArray[np.int64], cluster_N: NDArray[Any], previous_CD: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means of the clusters' documents, weighed by tokens; an empty cluster keeps its centroid."""
    weight_NC = (cluster_N[:, None] == np.arange(len(previous_CD))) * tokens_N[:, None].astype(np.float64)
    total_C1 = weight_NC.sum(axis=0)[:, None]
    return np.where(total_C1 > 0, (weight_NC.T @ h_ND) / np.maximum(total_C1, 1), previous_CD)


def assign_balanced(distance_NC: NDArray[np.float64], tokens_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """A cluster for each document, near it, no cluster above its even share of tokens + slack + one document.

    Greedy by regret: each document asks for the nearest cluster that is still open; a cluster takes those who would
    lose most by going elsewhere, until it is full, and closes; the others ask again. At most C rounds, all vectorised.
    """
    num_documents, num_clusters = distance_NC.shape
    tokens_N = np.maximum(tokens_N, 1)  # so that a full cluster holds something
    capacity = tokens_N.sum() / num_clusters * (1 + BALANCE_SLACK)
    load_C = np.zeros(num_clusters)
    cluster_N = np.full(num_documents, -1, dtype=np.int64)
    cost_NC = distance_NC.copy()  # inf once a cluster is full
    while (left := np.flatnonzero(cluster_N < 0)).size:
        choice = cost_NC[left].argmin(axis=1)
        sorted_NC = np.sort(cost_NC[left], axis=1)
        order = np.argsort(sorted_NC[:, 0] - sorted_NC[:, -1 if num_clusters == 1 else 1], kind="stable")  # by regret
        for cluster in np.unique(choice):
            asking = order[choice[order] == cluster]
            before = load_C[cluster] + np.cumsum(tokens_N[left[asking]]) - tokens_N[left[asking]]
            taken = asking[before < capacity]
            cluster_N[left[taken]] = cluster
            load_C[cluster] += tokens_N[left[taken]].sum()
            if load_C[cluster] >= capacity:
                cost_NC[:, cluster] = np.inf
    return cluster_N


def _random_clusters(
    tokens_N: NDArray[np.int64], split_N: NDArray[Any], num_clusters: int, seed: int
) -> NDArray[np.int32]:
    """Clusters drawn by seed, of even token counts within each split."""
    generator = np.random.default_rng(seed)
    cluster_N = np.zeros(len(tokens_N), dtype=np.int32)
    for split in sorted(set(split_N.tolist())):
        shuffled = generator.permutation(np.flatnonzero(split_N == split))
        middle = np.cumsum(tokens_N[shuffled]) - tokens_N[shuffled] / 2
        cluster_N[shuffled] = np.minimum(num_clusters * middle // max(1, tokens_N[shuffled].sum()), num_clusters - 1)
    return cluster_N
