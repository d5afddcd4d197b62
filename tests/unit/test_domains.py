"""Clusterings: balanced while fitted, the same by seed and by any division of the work, made of like text."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from pipelines.corpus import domains
from pipelines.corpus.clustering import embedding
from pipelines.corpus.clustering.assign import embed_texts, nearest
from pipelines.corpus.clustering.embedding import fit_embedder
from pipelines.corpus.clustering.kmeans import (
    BALANCE_SLACK,
    assign_balanced,
    balanced_kmeans,
    candidates,
    merge_smallest,
    merge_tiny,
    simplified_silhouette,
)
from pipelines.corpus.domains import cluster_after_build, cluster_corpus
from tests.written_corpus import stdlib_docstrings, write_corpus
from ulm import artefacts, runtime
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.base import validate
from ulm.recipes.clustering import Clustering, CorpusClustering
from ulm.swarm.embed import words
from ulm.swarm.router import Router

CORPORA = runtime.variable("ULM_CORPORA")

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
        for domain, own in WORDS.items():
            text = " ".join(generator.choices(own, k=generator.randint(10, 60)))
            made.append((domain, "test" if number % 5 == 4 else "train", text))
    return made


def blobs(num_documents: int, num_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    h_ND = generator.normal(size=(num_documents, 8))
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
    corpus = write_corpus(tmp_path, [*documents(), ("law", "train", "a b c"), ("code", "test", "?!")])
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
    corpus = write_corpus(tmp_path, [*documents(2), ("law", "train", "a b c")])
    with pytest.raises(ConfigError, match="experts: 9 clusters of 6 training documents with words .*fewer of them"):
        cluster_corpus(corpus, 9, Clustering())
    with pytest.raises(ConfigError, match=r"clustering\.clusters: 9 clusters of 6 training documents"):
        cluster_after_build(corpus, CorpusClustering(clusters=9))


def test_text_without_words_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, [("letters", "train", "a b c"), ("letters", "train", "d e f")])
    with pytest.raises(ConfigError, match="no words to cluster by"):
        cluster_corpus(corpus, 2, Clustering())


def manifest_of(clusters: domains.Clusters) -> dict:
    return json.loads((clusters.folder / "manifest.json").read_text())


def files_of(clusters: domains.Clusters) -> dict[str, str]:
    return artefacts.digest_files(clusters.folder)


def in_any_order(task, items):
    return map(task, reversed(items))


@pytest.mark.parametrize("item_documents", [1, 7, 1_000])
def test_the_clustering_does_not_depend_on_how_documents_are_handed_to_workers(tmp_path, monkeypatch, item_documents):
    monkeypatch.setattr(embedding, "MAX_FIT_DOCUMENTS", 40)
    corpus, again = (write_corpus(tmp_path / name, documents()) for name in ("a", "b"))
    plain = cluster_corpus(corpus, 3, Clustering())
    assert len(set(plain.cluster_N.tolist())) == 3
    monkeypatch.setattr(domains, "ITEM_DOCUMENTS", item_documents)
    assert files_of(cluster_corpus(again, 3, Clustering(), over=in_any_order)) == files_of(plain)


def test_documents_outside_the_sample_are_embedded_and_assigned_as_if_they_were_in_it(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path, documents())
    whole = cluster_corpus(corpus, 3, Clustering())
    monkeypatch.setattr(embedding, "MAX_FIT_DOCUMENTS", 40)
    part = cluster_corpus(corpus, 3, Clustering(seed=1))
    names = [np.array(clusters.domains, dtype=object)[clusters.cluster_N] for clusters in (whole, part)]
    assert names[0].tolist() == names[1].tolist() == corpus.documents["domain"].to_pylist()


def test_the_clustering_does_not_depend_on_the_number_of_threads(tmp_path):
    texts = [("docs", "train", text) for text in stdlib_docstrings(40)]
    found = []
    for threads in (1, 2):
        corpus = write_corpus(tmp_path / str(threads), texts)
        with threadpool_limits(threads):
            found.append(files_of(cluster_corpus(corpus, 4, Clustering(iterations=3))))
    assert found[0] == found[1]


def test_texts_are_embedded_as_scikit_learn_embeds_them(tmp_path):
    made = documents()
    corpus = write_corpus(tmp_path, made)
    embedder, sample = fit_embedder(corpus, Clustering(dimensions=5), lambda *_: None)
    train = [text for _, split, text in made if split == "train"]
    tf_idf = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit(train)
    svd = TruncatedSVD(5, random_state=0).fit(tf_idf.transform(train))
    texts = [text for _, split, text in made if split == "test"]
    expected_ND = normalize(svd.transform(tf_idf.transform(texts)))
    np.testing.assert_allclose(embed_texts(embedder, texts), expected_ND, atol=1e-6)  # components are stored in float32
    np.testing.assert_allclose(embed_texts(embedder, train), sample.h_ND, atol=1e-12)
    for text, h_D in zip(texts, embed_texts(embedder, texts), strict=True):
        np.testing.assert_allclose(embedder(text), h_D, atol=1e-12)
    assert not embed_texts(embedder, ["a b c", ""]).any()


def test_numbers_that_are_tried_are_a_factor_of_sqrt_2_apart_and_bounded():
    assert candidates(32) == [2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert candidates(31) == candidates(24) == [2, 3, 4, 6, 8, 12, 16, 24]
    assert candidates(2) == [2]


@given(st.integers(1, 6), st.integers(0, 1_000))
def test_the_simplified_silhouette_is_its_definition_document_by_document(num_clusters, seed):
    generator = np.random.default_rng(seed)
    h_ND, centroids_CD = generator.normal(size=(12, 3)), generator.normal(size=(num_clusters, 3))
    tokens_N = generator.integers(1, 50, 12)
    members = [int(np.linalg.norm(centroids_CD - h_D, axis=1).argmin()) for h_D in h_ND]
    total = 0.0
    for h_D, cluster, tokens in zip(h_ND, members, tokens_N, strict=True):
        distances = sorted(float(np.linalg.norm(h_D - centroid_D)) for centroid_D in centroids_CD)
        if num_clusters > 1 and members.count(cluster) > 1:
            total += tokens * (1 - distances[0] / distances[1])
    assert simplified_silhouette(h_ND, tokens_N, centroids_CD) == pytest.approx(total / tokens_N.sum(), abs=1e-6)


def test_auto_finds_the_number_of_kinds_of_text_and_says_what_it_tried(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    clusters = cluster_after_build(corpus, CorpusClustering())
    assert sorted(clusters.domains) == sorted(WORDS)
    choice = manifest_of(clusters)["choice"]
    scores = {row["num_clusters"]: row["score"] for row in choice["tried"]}
    assert choice["best"] == 3 == max(scores, key=scores.get)
    assert list(scores) == [2, 3, 4, 6]  # of 72 training documents: ten a cluster are asked for
    assert choice["documents"] == 72 and "silhouette" in choice["criterion"]


def test_auto_leaves_a_handful_of_documents_together(tmp_path):
    corpus = write_corpus(tmp_path, documents(5))
    clusters = cluster_after_build(corpus, CorpusClustering())
    assert set(clusters.cluster_N.tolist()) == {0}
    assert manifest_of(clusters)["choice"]["tried"] == []


def test_a_corpus_recipe_with_a_number_finds_the_clustering_of_a_swarm_of_so_many_experts(tmp_path):
    corpus = write_corpus(tmp_path, documents())
    swarm = cluster_corpus(corpus, 3, Clustering(seed=2))
    assert cluster_after_build(corpus, CorpusClustering(clusters=3, seed=2)).digest == swarm.digest
    assert cluster_after_build(corpus, CorpusClustering(seed=2)).digest != swarm.digest


def test_a_bound_without_effect_is_refused():
    with pytest.raises(ConfigError, match="max_clusters bounds clusters: auto"):
        validate(CorpusClustering, {"clusters": 3, "max_clusters": 8})


def test_the_smallest_cluster_is_merged_into_its_nearest_at_their_mean_by_tokens():
    centroids_CD = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])
    merged_CD = merge_smallest(centroids_CD, np.array([30, 10, 50]))
    assert merged_CD.tolist() == [[1.0, 0.0], [0.0, 9.0]]


@given(st.integers(1, 8), st.integers(0, 6_000), st.integers(0, 100))
def test_after_merging_every_cluster_has_the_minimum_or_is_alone(num_clusters, min_tokens, seed):
    h_ND, tokens_N = blobs(40, num_clusters, seed)
    centroids_CD = h_ND[np.random.default_rng(seed).choice(40, num_clusters, replace=False)]
    merged_CD = merge_tiny(h_ND, tokens_N, centroids_CD, min_tokens)
    tokens_C = np.bincount(nearest(h_ND, merged_CD), weights=tokens_N, minlength=len(merged_CD))
    assert len(merged_CD) == 1 or tokens_C.min() >= min_tokens
    before_C = np.bincount(nearest(h_ND, centroids_CD), weights=tokens_N, minlength=num_clusters)
    if before_C.min() >= min_tokens:
        assert np.array_equal(merged_CD, centroids_CD)


@pytest.mark.parametrize("sample_documents", [30, 20_000])  # with a guess from a sample, and with all that there is
def test_tiny_clusters_are_merged_counted_and_numbered_without_gaps(tmp_path, monkeypatch, sample_documents):
    monkeypatch.setattr(embedding, "MAX_FIT_DOCUMENTS", sample_documents)
    corpus = write_corpus(tmp_path, documents())
    apart = cluster_corpus(corpus, 8, Clustering())
    clusters = cluster_corpus(corpus, 8, Clustering(min_cluster_tokens=5_000))
    num_left = len(clusters.tokens)
    assert min(apart.tokens) < 5_000 <= min(clusters.tokens)
    assert 1 < num_left < 8
    assert sum(clusters.tokens) == sum(apart.tokens)
    assert manifest_of(clusters)["merged"] == 8 - num_left
    assert manifest_of(apart)["merged"] == 0
    assert Router.load(clusters.folder).ids == tuple(f"e{c:02d}" for c in range(num_left))
    assert len(list(clusters.folder.glob("documents-*.npy"))) == num_left
    assert set(clusters.cluster_N.tolist()) == set(range(num_left))


def test_titles_are_the_first_lines_of_the_most_typical_documents(tmp_path):
    made = documents()
    titled = [(domain, split, f"\n  {n} {domain} {'x' * 90}\n{text}") for n, (domain, split, text) in enumerate(made)]
    corpus = write_corpus(tmp_path, titled)
    for row in manifest_of(cluster_corpus(corpus, 3, Clustering()))["clusters"]:
        assert len(row["titles"]) == 3 and len(row["words"]) == 12
        for title in row["titles"]:
            number, domain, _ = title.split()
            assert made[int(number)][:2] == (domain, "train") and domain == row["domain"]
            assert len(title) == 80


def test_agreement_is_one_where_clusters_are_the_domains_and_absent_where_there_is_one_domain(tmp_path):
    corpus = write_corpus(tmp_path / "three", documents())
    assert manifest_of(cluster_corpus(corpus, 3, Clustering()))["agreement"] == {"nmi": pytest.approx(1), "purity": 1}
    halves = manifest_of(cluster_corpus(corpus, 1, Clustering()))["agreement"]
    assert halves == {"nmi": pytest.approx(0), "purity": pytest.approx(1 / 3)}
    alike = write_corpus(tmp_path / "one", [("all", split, text) for _, split, text in documents()])
    assert manifest_of(cluster_corpus(alike, 3, Clustering()))["agreement"] is None


def test_progress_ends_with_all_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "MAX_FIT_DOCUMENTS", 40)
    seen: dict[str, list[tuple[int, int]]] = {}
    corpus = write_corpus(tmp_path, documents())
    cluster_after_build(
        corpus,
        CorpusClustering(),
        progress=lambda stage, done, total, note: seen.setdefault(stage, []).append((done, total)),
    )
    assert list(seen) == ["embed a sample", "choose the number of clusters", "fit clusters", "assign clusters"]
    assert seen["embed a sample"][-1] == (40, 40)
    assert seen["assign clusters"] == [(0, 50), (50, 50)]


@pytest.mark.slow
@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
def test_auto_lands_near_the_thirteen_domains_of_the_shared_corpora(tmp_path):
    made = []
    for folder in sorted(Path(CORPORA, "train").iterdir()):
        rows = folder / "val.jsonl"
        if rows.is_file():
            texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").split("\n") if line]
        else:
            texts = (folder / "val.txt").read_text(encoding="utf-8").split("\n\n")
        made += [(folder.name, "train", text) for text in texts]
    assert len({domain for domain, _, _ in made}) == 13
    found = manifest_of(cluster_after_build(write_corpus(tmp_path, made), CorpusClustering()))
    assert found["choice"]["best"] in (12, 16)
    assert found["agreement"]["nmi"] > 0.7
