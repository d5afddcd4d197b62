"""Clusterings: documents to clusters of like text, and the router that the same fit gives (c-BTM, arXiv 2303.14177).

tf-idf, SVD and balanced k-means are fitted on a sample of the training documents, in this process; all other documents
of every split then go to their nearest centroid. That second part goes through `over`, so that it may run on many
workers; a document's answer does not depend on those beside it. The router that serves learns from passages of the
sample which cluster a short text belongs to (clustering/head.py).

Shape letters: N documents, K clusters of a document (2 with overlap, else 1), C clusters, V words of the vocabulary,
D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

from pipelines.corpus.clustering import assign, kmeans
from pipelines.corpus.clustering.assign import first_texts, located
from pipelines.corpus.clustering.embedding import Sample, fit_embedder, in_training
from pipelines.corpus.clustering.head import fit_head
from pipelines.corpus.clustering.passages import far_distances
from pipelines.corpus.over import Over, Progress, one_by_one, silent
from ulm import artefacts
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.recipes.clustering import Clustering, CorpusClustering
from ulm.swarm.embed import Embedder
from ulm.swarm.router import Head, Router

MAX_CHOICE_DOCUMENTS = 5_000  # of the sample, on which numbers of clusters are compared
ITEM_DOCUMENTS = 2_048  # that a worker is handed at once
NUM_WORDS, NUM_TITLES, TITLE_CHARS = 12, 3, 80  # that a manifest gives of a cluster
ALGORITHM = 5  # part of the digest: raise it when the same input would give other clusters


@dataclass(frozen=True)
class Clusters:
    """A stored clustering."""

    folder: Path  # also the router's
    digest: str
    assigned_NK: NDArray[np.int32]  # of each document in the corpus's order its clusters, -1 for none
    domains: list[str | None]  # each cluster's main domain; None for an empty one
    tokens: list[int]  # each cluster's training tokens

    @property
    def cluster_N(self) -> NDArray[np.int32]:
        """Each document's own cluster; with overlap some are in a second one as well."""
        return self.assigned_NK[:, 0]

    def documents(self, cluster: int) -> Path:
        """The .npy file of a cluster's documents, as rows of documents.parquet."""
        return self.folder / f"documents-{cluster:02d}.npy"


def cluster_corpus(
    corpus: Corpus,
    num_clusters: int | Sequence[int],
    config: Clustering,
    *,
    kind: Literal["tf-idf", "random"] = "tf-idf",
    over: Over = one_by_one,
    progress: Progress | None = None,
    place: str = "experts",
) -> Clusters:
    """The clustering of a corpus, made now or found as made before: the same input has the same digest.

    Of several numbers of clusters the one with the best simplified silhouette is taken. `random` is the control:
    clusters of even size drawn by seed, with the router that their centroids give. ConfigError names `place` when
    there are too few documents.
    """
    identity = {
        "algorithm": ALGORITHM,
        "kind": kind,
        "corpus": corpus.digest,
        "num_clusters": num_clusters if isinstance(num_clusters, int) else list(num_clusters),
        "config": config.model_dump(include=set(Clustering.model_fields)),
    }
    digest = artefacts.digest_json(identity)
    folder = corpus.folder / "domains" / digest
    if not folder.is_dir():
        report = progress or silent
        with threadpool_limits(1):  # the last bits of a matrix product depend on the number of threads
            made = _fit(corpus, num_clusters, config, kind, over, report, place)
            write_clusters(corpus, made, {"digest": digest, **identity}, folder)
    return load_clusters(folder)


def cluster_after_build(
    corpus: Corpus, config: CorpusClustering, *, over: Over = one_by_one, progress: Progress | None = None
) -> Clusters:
    """The clustering that a corpus recipe asks for; with a number, the one that a swarm of so many experts finds."""
    number = kmeans.candidates(config.max_clusters) if config.clusters == "auto" else config.clusters
    return cluster_corpus(corpus, number, config, over=over, progress=progress, place="clustering.clusters")


def load_clusters(folder: Path) -> Clusters:
    """A stored clustering, its files checked against its manifest."""
    manifest = artefacts.read_manifest(folder, "clustering")
    artefacts.verify_files(folder, manifest["files"])
    assigned_NK = np.load(folder / "assignments.npy")
    main = [cluster["domain"] for cluster in manifest["clusters"]]
    tokens = [cluster["tokens"]["train"] for cluster in manifest["clusters"]]
    return Clusters(folder, manifest["digest"], assigned_NK, main, tokens)


@dataclass(frozen=True)
class Fit:
    """A clustering before it is written."""

    router: Router
    assigned_NK: NDArray[np.int32]
    sample: Sample
    choice: dict[str, Any] | None = None  # how the number of clusters was found; None: it was given
    merged: int = 0  # clusters that were too small


def _fit(
    corpus: Corpus,
    num_clusters: int | Sequence[int],
    config: Clustering,
    kind: str,
    over: Over,
    progress: Progress,
    place: str,
) -> Fit:
    embedder, sample = fit_embedder(corpus, config, progress)
    choice = None
    if not isinstance(num_clusters, int):
        progress("choose the number of clusters", 0, 1, "")
        choice, num_clusters = _choose(sample, num_clusters, config)
        progress("choose the number of clusters", 1, 1, "")
    if len(sample.rows) < num_clusters:
        problem = f"{num_clusters} clusters of {len(sample.rows)} training documents with words"
        raise ConfigError(place, problem, "fewer of them, or sources cut into smaller documents (document: paragraph)")
    merged = 0
    if kind == "random":
        assigned_NK = _random_clusters(corpus, num_clusters, config)
        zeros_CD = np.zeros((num_clusters, sample.h_ND.shape[1]))
        cluster_N = assigned_NK[sample.rows, 0]
        centroids_CD = stored(kmeans.means(sample.h_ND, sample.tokens_N, cluster_N, zeros_CD))
    else:
        progress("fit clusters", 0, 1, "")
        fitted_CD = kmeans.balanced_kmeans(sample.h_ND, sample.tokens_N, num_clusters, config.iterations, config.seed)
        progress("fit clusters", 1, 1, "")
        estimate_N = sample.tokens_N / sample.share
        centroids_CD = stored(kmeans.merge_tiny(sample.h_ND, estimate_N, fitted_CD, config.min_cluster_tokens))
        while True:  # again only where the sample has misjudged a cluster near the limit
            two_N2, margin_N = _assign_all(corpus, embedder, centroids_CD, sample, over, progress)
            tokens_C = train_tokens(corpus, two_N2[:, :1], len(centroids_CD))
            if len(centroids_CD) == 1 or tokens_C.min() >= config.min_cluster_tokens:
                break
            centroids_CD = stored(kmeans.merge_smallest(centroids_CD, tokens_C))
        merged = num_clusters - len(centroids_CD)
        assigned_NK = with_overlap(two_N2, margin_N, config.overlap)
    router = router_of(corpus, embedder, centroids_CD, assigned_NK, sample, config)
    return Fit(router, assigned_NK, sample, choice, merged)


def router_of(
    corpus: Corpus,
    embedder: Embedder,
    centroids_CD: NDArray[np.float64],
    assigned_NK: NDArray[np.int32],
    sample: Sample,
    config: Clustering,
) -> Router:
    """The router of clusters, from the sample's documents and passages and the documents' own clusters."""
    tokens_C = train_tokens(corpus, assigned_NK[:, :1], len(centroids_CD))
    ids = [f"e{c:02d}" for c in range(len(centroids_CD))]
    shares_C = tokens_C / tokens_C.sum()
    far, head = far_distances(sample.snippet_p_LMD, centroids_CD), None
    if config.router == "linear":
        head = head_of(sample, assigned_NK[sample.rows, 0], len(centroids_CD))
    return Router(ids, embedder, centroids_CD.astype(np.float32), shares_C, config.temperature, far=far, head=head)


def head_of(sample: Sample, cluster_N: NDArray[Any], num_clusters: int) -> Head:
    """The head that sends the sample's documents, and passages of them, to the documents' clusters."""
    h_MD = np.concatenate([sample.h_ND, sample.passage_h_MD])
    return fit_head(h_MD, np.concatenate([cluster_N, cluster_N[sample.document_M]]), num_clusters)


def with_overlap(two_N2: NDArray[Any], margin_N: NDArray[np.float64], share: float) -> NDArray[np.int32]:
    """Each document's clusters: the first of its two, and for that share of the documents the second as well.

    Those are the documents of the smallest margin, the first of equals (DiPaCo, arXiv 2403.10616, section 2).
    """
    if not share:
        return two_N2[:, :1].astype(np.int32)
    has_two = np.flatnonzero(two_N2[:, 1] >= 0)
    number = min(round(share * len(two_N2)), len(has_two))
    nearest_border = has_two[np.argsort(margin_N[has_two], kind="stable")[:number]]
    assigned_N2 = two_N2.astype(np.int32)
    assigned_N2[np.setdiff1d(np.arange(len(two_N2)), nearest_border), 1] = -1
    return assigned_N2


def stored(centroids_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centroids as the router's file will have them."""
    return centroids_CD.astype(np.float32).astype(np.float64)


def _choose(sample: Sample, numbers: Sequence[int], config: Clustering) -> tuple[dict[str, Any], int]:
    """The number with the best simplified silhouette on a part of the sample, the smallest of equals, and its account.

    1 where there are too few documents to try any.
    """
    part = np.arange(len(sample.rows))
    if len(part) > MAX_CHOICE_DOCUMENTS:
        part = np.sort(np.random.default_rng(config.seed).choice(part, MAX_CHOICE_DOCUMENTS, replace=False))
    scores = kmeans.try_numbers(sample.h_ND[part], sample.tokens_N[part], numbers, config.iterations, config.seed)
    best = max(scores, key=scores.__getitem__, default=1)
    tried = [{"num_clusters": number, "score": score} for number, score in scores.items()]
    criterion = "simplified silhouette, mean over tokens"
    return {"criterion": criterion, "documents": len(part), "tried": tried, "best": best}, best


def _assign_all(
    corpus: Corpus,
    embedder: Embedder,
    centroids_CD: NDArray[np.float64],
    sample: Sample,
    over: Over,
    progress: Progress,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The two nearest centroids of every document and its margin; what the sample holds is not read again."""
    num_documents = corpus.documents.num_rows
    two_N2, margin_N = np.full((num_documents, 2), -1, dtype=np.int64), np.zeros(num_documents)
    two_N2[sample.rows], margin_N[sample.rows] = assign.two_nearest(sample.h_ND, centroids_CD)
    others = np.setdiff1d(np.arange(num_documents), sample.rows)
    items = [located(corpus, others[at : at + ITEM_DOCUMENTS]) for at in range(0, len(others), ITEM_DOCUMENTS)]
    done = 0
    progress("assign clusters", done, len(others), "")
    for assigned in over(assign.task(corpus.folder, embedder, centroids_CD), items):
        two_N2[assigned["row"]], margin_N[assigned["row"]] = assigned["clusters"], assigned["margin"]
        done += len(assigned["row"])
        progress("assign clusters", done, len(others), "")
    assert done == len(others), "documents were lost on their way"
    return two_N2, margin_N


def train_tokens(corpus: Corpus, assigned_NK: NDArray[Any], num_clusters: int) -> NDArray[np.int64]:
    """Training tokens of each cluster, those of a document in two clusters in both."""
    tokens_N, in_training_N = corpus.documents["num_tokens"].to_numpy(), in_training(corpus)
    total_C = np.zeros(num_clusters, dtype=np.int64)
    for cluster_N in assigned_NK.T:
        placed_N = in_training_N & (cluster_N >= 0)
        np.add.at(total_C, cluster_N[placed_N], tokens_N[placed_N])
    return total_C


def _random_clusters(corpus: Corpus, num_clusters: int, config: Clustering) -> NDArray[np.int32]:
    """Clusters drawn by seed, of even token counts within each split; as many documents in two as the recipe says."""
    split_N, tokens_N = np.array(corpus.documents["split"].to_pylist()), corpus.documents["num_tokens"].to_numpy()
    generator = np.random.default_rng(config.seed)
    two_N2 = np.full((len(tokens_N), 2), -1)
    for split in sorted(set(split_N.tolist())):
        shuffled = generator.permutation(np.flatnonzero(split_N == split))
        middle = np.cumsum(tokens_N[shuffled]) - tokens_N[shuffled] / 2
        even = num_clusters * middle // max(1, tokens_N[shuffled].sum())
        two_N2[shuffled, 0] = np.minimum(even, num_clusters - 1)
    if num_clusters > 1:
        two_N2[:, 1] = (two_N2[:, 0] + generator.integers(1, num_clusters, len(two_N2))) % num_clusters
    return with_overlap(two_N2, generator.random(len(two_N2)), config.overlap)


def write_clusters(corpus: Corpus, made: Fit, identity: dict[str, Any], place: Path) -> None:
    """The folder of a clustering: each document's clusters, one list of documents a cluster, the router."""
    num_clusters = len(made.router.ids)
    with artefacts.new_folder(place) as folder:
        np.save(folder / "assignments.npy", made.assigned_NK)
        for cluster in range(num_clusters):  # what the training of one expert reads
            np.save(folder / f"documents-{cluster:02d}.npy", np.flatnonzero(_within(made, cluster)))
        made.router.write(folder)
        manifest = {
            "format_version": artefacts.FORMAT_VERSION,
            **identity,
            "choice": made.choice,
            "merged": made.merged,
            "agreement": _agreement(corpus, made.assigned_NK[:, 0]),
            "clusters": _describe(corpus, made),
        }
        artefacts.write_json(folder / "manifest.json", {**manifest, "files": artefacts.digest_files(folder)})


def _within(made: Fit, cluster: int) -> NDArray[np.bool_]:
    """Which documents are in a cluster, be it their first or their second."""
    inside: NDArray[np.bool_] = (made.assigned_NK == cluster).any(axis=1)
    return inside


def _agreement(corpus: Corpus, cluster_N: NDArray[np.int32]) -> dict[str, float] | None:
    """How clusters agree with the given domains, over training documents; None where there are not two domains.

    Normalised mutual information (by the arithmetic mean of the entropies), and the share of documents whose domain is
    the most frequent one of their cluster.
    """
    placed_N = in_training(corpus) & (cluster_N >= 0)
    names, domain_N = np.unique(corpus.documents["domain"].to_pylist(), return_inverse=True)
    domain_N, cluster_N = domain_N[placed_N], cluster_N[placed_N]
    if len(set(domain_N.tolist())) < 2:
        return None
    count_CM = np.zeros((cluster_N.max() + 1, len(names)), dtype=np.int64)  # M domains
    np.add.at(count_CM, (cluster_N, domain_N), 1)
    purity = float(count_CM.max(axis=1).sum() / len(cluster_N))
    return {"nmi": float(normalized_mutual_info_score(domain_N, cluster_N)), "purity": purity}


def _describe(corpus: Corpus, made: Fit) -> list[dict[str, Any]]:
    """What a reader wants to know of each cluster: its domains by tokens, its size, typical words, example titles."""
    embedder, centroids_CD = made.router.embedder, made.router.centroids_ND
    names = sorted(embedder.vocabulary, key=embedder.vocabulary.__getitem__)
    telling_V = np.array([any(map(str.isalpha, name)) and name not in ENGLISH_STOP_WORDS for name in names])
    middle_D = centroids_CD.mean(axis=0) if len(centroids_CD) > 1 else 0
    documents = corpus.documents.select(["split", "domain", "num_tokens"])
    described = []
    for cluster, centroid_D in enumerate(centroids_CD):
        members = documents.filter(_within(made, cluster))
        domains, typical_V = _sums(members, "domain"), embedder.components_VD @ (centroid_D - middle_D)
        typical_V = np.where(telling_V, typical_V, -np.inf)
        described.append(
            {
                "domain": max(sorted(domains), key=domains.__getitem__, default=None),
                "domains": domains,
                "documents": members.num_rows,
                "tokens": {"train": 0, **_sums(members, "split")},
                "words": [names[row] for row in np.argsort(-typical_V, kind="stable")[:NUM_WORDS] if telling_V[row]],
                "titles": _titles(corpus, made, cluster),
            }
        )
    return described


def _sums(documents: Any, column: str) -> dict[str, int]:
    """Tokens by the values of a column, in the order of their names."""
    found = documents.group_by(column).aggregate([("num_tokens", "sum")]).sort_by(column)
    return dict(zip(found[column].to_pylist(), found["num_tokens_sum"].to_pylist(), strict=True))


def _titles(corpus: Corpus, made: Fit, cluster: int) -> list[str]:
    """The first lines of those documents of the sample that are nearest to a cluster's centroid."""
    own = np.flatnonzero(made.assigned_NK[made.sample.rows, 0] == cluster)
    distance_N = np.square(made.sample.h_ND[own] - made.router.centroids_ND[cluster]).sum(axis=1)
    closest = made.sample.rows[own[np.argsort(distance_N, kind="stable")[:NUM_TITLES]]]
    return [text.strip().split("\n", 1)[0][:TITLE_CHARS] for text in first_texts(corpus, located(corpus, closest))]
