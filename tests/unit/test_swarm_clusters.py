"""What a clustering gives a swarm: documents in two clusters, a router that knows short text, and text that is far."""

import random
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus.clustering.assign import embed_texts, squared_distances
from pipelines.corpus.clustering.embedding import in_training
from pipelines.corpus.clustering.passages import MAX_CHARS, MIN_CHARS, MIN_PASSAGES, NUM_SNIPPETS, Passages
from pipelines.corpus.domains import cluster_corpus
from tests.written_corpus import stdlib_docstrings, write_corpus
from ulm.corpus.manifest import Corpus
from ulm.recipes.clustering import Clustering
from ulm.swarm.router import FAR_CHARS, Router

WORDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section liable contract",
    "code": "def return import class self lambda yield parser buffer index",
    "medicine": "patient dose tablet symptom fever clinic nurse therapy vaccine blood",
}
SAMPLING = 0.01  # the 99th percentile of 1,000 snippets; of others the share beyond it differs by less than as much


def mixed_documents(count: int = 90) -> list[tuple[str, str, str]]:
    """Documents of three kinds, some of which have words of another kind."""
    generator, kinds = random.Random(0), list(WORDS)
    made = []
    for number in range(count):
        kind, other = kinds[number % 3], kinds[(number + 1) % 3]
        strange = number % 7 if number % 2 else 0
        words = generator.choices(WORDS[kind].split(), k=20 - strange) + generator.choices(
            WORDS[other].split(), k=strange
        )
        made.append((kind, ("train", "train", "test")[number % 3 if number > 8 else 0], " ".join(words)))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("home"), mixed_documents())


def test_with_overlap_the_documents_nearest_to_a_border_are_in_both_of_their_two_nearest_clusters(corpus):
    plain, both = (cluster_corpus(corpus, 3, Clustering(overlap=share)) for share in (0.0, 0.2))
    assert plain.assigned_NK.shape == (90, 1) and both.assigned_NK.shape == (90, 2)
    np.testing.assert_array_equal(both.cluster_N, plain.cluster_N)
    router = Router.load(both.folder)
    h_ND = embed_texts(router.embedder, [corpus.document_text(row) for row in range(90)])
    distance_NC = np.sort(squared_distances(h_ND, router.centroids_ND), axis=1)
    nearest_border = set(np.argsort(distance_NC[:, 1] - distance_NC[:, 0])[:18].tolist())
    assert set(np.flatnonzero(both.assigned_NK[:, 1] >= 0).tolist()) == nearest_border
    order_NC = np.argsort(squared_distances(h_ND, router.centroids_ND), axis=1)
    for row in nearest_border:
        assert both.assigned_NK[row].tolist() == order_NC[row, :2].tolist()


def test_documents_in_two_clusters_are_trained_on_and_counted_in_both(corpus):
    both = cluster_corpus(corpus, 3, Clustering(overlap=0.2))
    tokens_N, train_N = corpus.documents["num_tokens"].to_numpy(), in_training(corpus)
    for cluster in range(3):
        inside = (both.assigned_NK == cluster).any(axis=1)
        assert np.load(both.documents(cluster)).tolist() == np.flatnonzero(inside).tolist()
        assert both.tokens[cluster] == tokens_N[inside & train_N].sum()
    assert sum(both.tokens) > tokens_N[train_N].sum()
    assert Router.load(both.folder).shares_N.sum() == pytest.approx(1)


def test_the_random_control_overlaps_by_as_much(corpus):
    both = cluster_corpus(corpus, 3, Clustering(overlap=0.2), kind="random")
    in_two = both.assigned_NK[both.assigned_NK[:, 1] >= 0]
    assert len(in_two) == 18
    assert (in_two[:, 0] != in_two[:, 1]).all() and set(in_two[:, 1].tolist()) == {0, 1, 2}


def test_with_all_documents_overlapping_every_one_is_in_two(corpus):
    assert (cluster_corpus(corpus, 3, Clustering(overlap=1.0)).assigned_NK >= 0).all()


def test_far_is_beyond_the_99th_percentile_of_training_snippets_of_every_length(tmp_path: Path):
    texts = [text for text in stdlib_docstrings(40) if len(text) > FAR_CHARS[2]]
    assert len(texts) > 100
    corpus = write_corpus(tmp_path, [("docs", "train", text) for text in texts])
    router = Router.load(cluster_corpus(corpus, 4, Clustering()).folder)
    passages = Passages(corpus.documents["num_tokens"].to_numpy(), seed=7)
    list(passages.of(texts))
    for length, snippets in zip(FAR_CHARS[:3], passages.snippets, strict=False):
        assert {len(snippet) for snippet in snippets} == {length}
        assert np.mean([router.is_far(snippet) for snippet in snippets]) == pytest.approx(0.01, abs=SAMPLING)
    assert router.is_far("der die das und ist nicht ein eine wurde zwischen vom zum") and not router.is_far("")


def test_passages_are_beginnings_and_inner_parts_of_their_documents():
    texts = [f"{n} " * 2_000 for n in range(100, 140)] + ["short"]
    passages = Passages(np.full(len(texts), 500), seed=0)
    assert list(passages.of(texts)) == texts
    for length, snippets in zip(FAR_CHARS, passages.snippets, strict=True):
        assert len(snippets) == NUM_SNIPPETS and {len(s) for s in snippets} <= {length, 5}
    assert len(passages.texts) == len(passages.document) == MIN_PASSAGES
    assert all(passage in texts[document] for passage, document in zip(passages.texts, passages.document, strict=True))
    lengths = [
        len(p) for p, document in zip(passages.texts, passages.document, strict=True) if texts[document] != "short"
    ]
    assert min(lengths) >= MIN_CHARS and max(lengths) <= MAX_CHARS and len(set(lengths)) > 500
    begin = [texts[d].startswith(p) for p, d in zip(passages.texts, passages.document, strict=True)]
    assert 0.5 < np.mean(begin) < 0.75  # and those inner parts of a text of one word again and again that look like it
    again = Passages(np.full(len(texts), 500), seed=0)
    list(again.of(texts))
    assert again.texts == passages.texts


def test_the_linear_router_sends_short_text_of_a_narrow_kind_home_where_centroids_send_it_to_a_wide_one(tmp_path: Path):
    """A wide cluster's centroid lies near the origin, and so nearer to whatever is noisy."""
    generator = random.Random(1)
    kinds = {"narrow": [f"narrow{n}" for n in range(8)], "wide": [f"wide{n}" for n in range(400)]}
    common = [f"common{n}" for n in range(60)]

    def text(kind: str, count: int) -> str:
        return " ".join(generator.choice(kinds[kind] if generator.random() < 0.3 else common) for _ in range(count))

    corpus = write_corpus(tmp_path, [(kind, "train", text(kind, 150)) for _ in range(60) for kind in kinds])
    asked = [text("narrow", 8) for _ in range(300)]
    right = {}
    for router in ("linear", "centroids"):
        clusters = cluster_corpus(corpus, 2, Clustering(router=router))
        assert sorted(clusters.domains) == ["narrow", "wide"]
        served = Router.load(clusters.folder)
        assert (served.head is not None) == (router == "linear")
        right[router] = np.mean([clusters.domains[served.weights(t).argmax()] == "narrow" for t in asked])
    assert right["linear"] > right["centroids"]
