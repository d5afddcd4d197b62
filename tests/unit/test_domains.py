"""Clusterings: balanced while fitted, the same by seed, made of like text, stored once."""

import json
import random

import numpy as np
import pytest

from pipelines.corpus.domains import BALANCE_SLACK, assign_balanced, balanced_kmeans, cluster_corpus
from tests.written_corpus import write_corpus
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.train import Clustering
from ulm.swarm.router import Router

WORDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section liable contract".split(),
    "code": "def return import class self lambda yield parser buffer index".split(),
    "medicine": "patient dose tablet symptom fever clinic nurse therapy vaccine blood".split(),
}


def documents(per_domain: int = 30) -> list[tuple[str, str, str]]:
    """Three obviously different kinds of text, of uneven lengths, a fifth of it held out."""
    generator = random.Random(0)
    made = []
    for number in range(per_domain):
        for domain, words in WORDS.items():
            text = " ".join(generator.choices(words, k=generator.randint(10, 60)))
            made.append((domain, "test" if number % 5 == 4 else "train", text))
    return made


def blobs(num_documents: int, num_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    h_ND = generator.normal(size=(num_documents, 8)).astype(np.float32)
    h_ND[:, 0] += generator.integers(0, num_clusters, num_documents) ** 2  # uneven groups
    return h_ND / np.linalg.norm(h_ND, axis=1, keepdims=True), generator.integers(1, 500, num_documents)


@pytest.mark.parametrize("num_clusters", [1, 2, 5, 16])
def test_no_cluster_exceeds_its_even_share_by_more_than_the_slack_and_one_document(num_clusters):
    h_ND, tokens_N = blobs(400, num_clusters)
    distance_NC = np.random.default_rng(1).random((400, num_clusters)) + np.arange(num_clusters)  # all prefer the first
    cluster_N = assign_balanced(distance_NC, tokens_N)
    load_C = np.bincount(cluster_N, weights=tokens_N, minlength=num_clusters)
    assert cluster_N.min() >= 0
    assert load_C.sum() == tokens_N.sum()
    assert load_C.max() <= tokens_N.sum() / num_clusters * (1 + BALANCE_SLACK) + tokens_N.max()


def test_documents_get_their_nearest_cluster_where_there_is_room():
    distance_NC = np.array([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.2]])
    assert assign_balanced(distance_NC, np.ones(4, dtype=np.int64)).tolist() == [0, 0, 1, 1]


def test_a_full_cluster_keeps_those_who_would_lose_most():
    distance_NC = np.array([[0.0, 0.1], [0.0, 5.0], [0.0, 9.0], [0.0, 0.2]])
    assert assign_balanced(distance_NC, np.full(4, 10)).tolist() == [1, 0, 0, 0]  # slack and one document: three fit


def test_one_document_longer_than_all_others_together_is_placed():
    distance_NC = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert sorted(assign_balanced(distance_NC, np.array([1_000, 1, 1])).tolist()) == [0, 1, 1]


def test_the_same_seed_gives_the_same_centroids_and_another_may_not():
    h_ND, tokens_N = blobs(300, 4)
    first, again = (balanced_kmeans(h_ND, tokens_N, 4, iterations=10, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, balanced_kmeans(h_ND, tokens_N, 4, iterations=10, seed=50))


def test_three_kinds_of_text_become_three_clusters_in_every_split(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    clusters = cluster_corpus(corpus, 3, Clustering())
    domains = np.array(corpus.documents["domain"].to_pylist())
    for domain in WORDS:
        assert len(set(clusters.cluster_N[domains == domain])) == 1
    assert sorted(clusters.domains) == sorted(WORDS)
    assert clusters.domains[clusters.cluster_N[0]] == "law"
    train = np.array(corpus.documents["split"].to_pylist()) == "train"
    tokens_N = corpus.documents["num_tokens"].to_numpy()
    assert clusters.tokens == [tokens_N[train & (clusters.cluster_N == c)].sum() for c in range(3)]
    for c in range(3):
        assert np.load(clusters.documents(c)).tolist() == np.flatnonzero(clusters.cluster_N == c).tolist()


def test_its_router_sends_each_document_where_the_clustering_put_it(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    clusters = cluster_corpus(corpus, 3, Clustering())
    router = Router.load(clusters.folder)
    assert router.ids == ("e00", "e01", "e02")
    for row, cluster in enumerate(clusters.cluster_N):
        assert router.weights(corpus.document_text(row)).argmax() == cluster
    np.testing.assert_allclose(router.weights(""), np.array(clusters.tokens) / sum(clusters.tokens))


def test_a_document_without_a_known_word_has_no_cluster(tmp_path):
    corpus = write_corpus(tmp_path, [*documents(), ("law", "train", "the of and"), ("code", "test", "?!")])
    assert cluster_corpus(corpus, 3, Clustering()).cluster_N[-2:].tolist() == [-1, -1]


def test_the_same_input_is_clustered_once_and_another_config_apart(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    first = cluster_corpus(corpus, 3, Clustering())
    before = (first.folder / "manifest.json").stat().st_mtime_ns
    assert cluster_corpus(corpus, 3, Clustering()).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == before
    others = [
        cluster_corpus(corpus, 2, Clustering()),
        cluster_corpus(corpus, 3, Clustering(seed=1)),
        cluster_corpus(corpus, 3, Clustering(), kind="random"),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_random_clusters_are_even_and_blind_to_the_text(tmp_path):
    corpus = write_corpus(tmp_path, documents(100))
    clusters = cluster_corpus(corpus, 3, Clustering(), kind="random")
    assert max(clusters.tokens) - min(clusters.tokens) < 2 * corpus.documents["num_tokens"].to_numpy().max()
    domains = np.array(corpus.documents["domain"].to_pylist())
    for domain in WORDS:  # of 100 documents each cluster has about a third: 18 is 4 sigma below
        assert np.bincount(clusters.cluster_N[domains == domain]).min() > 18


def test_assignments_are_int32_one_column_in_corpus_order_and_the_manifest_names_domains_and_words(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    folder = cluster_corpus(corpus, 3, Clustering()).folder
    assignments = np.load(folder / "assignments.npy")
    assert assignments.dtype == np.int32 and assignments.shape == (corpus.documents.num_rows, 1)
    for cluster in json.loads((folder / "manifest.json").read_text())["clusters"]:
        assert cluster["words"][0] in WORDS[cluster["domain"]]
        assert set(cluster["tokens"]) == {"train", "test"}


def test_a_damaged_clustering_is_refused_by_file(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    folder = cluster_corpus(corpus, 3, Clustering()).folder
    (folder / "assignments.npy").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"assignments.npy: content does not match"):
        cluster_corpus(corpus, 3, Clustering())


def test_more_clusters_than_documents_is_refused_with_a_remedy(tmp_path):
    corpus = write_corpus(tmp_path, documents(2))
    with pytest.raises(ConfigError, match="experts: 9 clusters of 6 training documents .*fewer experts"):
        cluster_corpus(corpus, 9, Clustering())


def test_text_without_words_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, [("marks", "train", "? ! ."), ("marks", "train", "; : -")])
    with pytest.raises(ConfigError, match="no words to cluster by"):
        cluster_corpus(corpus, 2, Clustering())
