"""Near duplicates against exact Jaccard similarity by plain sets, and that clusters do not depend on any order."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.corpus.dedup import content_key
from pipelines.corpus.near import NUM_HASHES, band_pairs, bands, clusters, lowest_estimate, signatures
from tests.benchmarks._planted import jaccard, planted_pairs
from tests.written_corpus import stdlib_docstrings
from ulm import runtime
from ulm.recipes.corpus import NearDuplicates

CORPORA = runtime.variable("ULM_CORPORA")
DEFAULT = NearDuplicates()


def pairs_of(signature_NE: NDArray[np.uint32], config: NearDuplicates = DEFAULT) -> NDArray[np.int64]:
    num_bands, _ = bands(config)
    return np.unique(np.concatenate([band_pairs(signature_NE, band, config) for band in range(num_bands)]), axis=0)


def clusters_of(texts: list[str], config: NearDuplicates = DEFAULT) -> list[int]:
    return clusters(len(texts), pairs_of(signatures(texts, config), config)).tolist()


def invented(num_documents: int, num_words: int, seed: int) -> list[str]:
    words = np.random.default_rng(seed).integers(0, 5_000, (num_documents, num_words))
    return [" ".join(f"w{word}" for word in row) for row in words]


@pytest.fixture(scope="module")
def docstrings() -> list[str]:
    return [text for text in stdlib_docstrings(60) if len(text.split()) > 60][:100]


@pytest.mark.parametrize(("threshold", "ngram_words"), [(0.7, 5), (0.5, 5), (0.7, 2), (0.2, 3)])
def test_planted_pairs_are_found_and_what_is_found_is_alike(
    docstrings: list[str], threshold: float, ngram_words: int
) -> None:
    """The goals of issue 3: pairs 0.1 above the threshold are found, what is found is at most 0.1 below it."""
    config = NearDuplicates(threshold=threshold, ngram_words=ngram_words)
    texts = docstrings
    everything = texts + [c for share in (0.01, 0.02, 0.05, 0.15, 0.3) for c in planted_pairs(texts, share, seed=0)]
    found = pairs_of(signatures(everything, config), config)
    cluster = clusters(len(everything), found)
    planted = [(n % len(texts), n) for n in range(len(texts), len(everything))]
    similar = [(i, j) for i, j in planted if jaccard(everything[i], everything[j], ngram_words) >= threshold + 0.1]
    reported = [jaccard(everything[i], everything[j], ngram_words) for i, j in found]
    assert len(similar) >= 100
    assert np.mean([cluster[i] == cluster[j] for i, j in similar]) >= 0.95
    assert np.mean(np.array(reported) >= threshold - 0.1) >= 0.95


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.3, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_what_is_well_above_any_threshold(threshold: float) -> None:
    num_bands, rows = bands(NearDuplicates(threshold=threshold))
    above = min(threshold + 0.1, (1 + threshold) / 2)
    assert num_bands * rows <= NUM_HASHES
    assert 1 - (1 - above**rows) ** num_bands >= 0.98
    longer = rows + 1
    assert 1 - (1 - above**longer) ** (NUM_HASHES // longer) < 0.98  # with candidates as few as can be


def test_the_default_threshold_has_18_bands_of_7() -> None:
    assert bands(DEFAULT) == (18, 7)
    assert lowest_estimate(DEFAULT) == pytest.approx(0.6796, abs=1e-4)


@given(st.lists(st.text(st.sampled_from("ab \u6f22.")), max_size=12), st.integers(0, 12))
def test_a_signature_depends_on_its_text_alone(texts: list[str], cut: int) -> None:
    together = signatures(texts, DEFAULT)
    assert together.shape == (len(texts), NUM_HASHES)
    assert np.array_equal(
        np.concatenate([signatures(texts[:cut], DEFAULT), signatures(texts[cut:], DEFAULT)]), together
    )


def test_signatures_are_blind_to_case_space_and_punctuation() -> None:
    plain, dressed, other = signatures(
        ["one two three four five six", '"One, two:\n  THREE four -- five (six)."', "two one three four five six"],
        DEFAULT,
    )
    assert np.array_equal(plain, dressed)
    assert (plain == other).mean() < 0.7  # one of three n-grams in common is gone: J = 1/3


def test_texts_shorter_than_an_ngram_are_alike_only_as_a_whole_and_texts_without_words_never() -> None:
    texts = ["Yes, sir", "", "yes sir!", "yes", "...", " ", "sir yes", "-- ?!", "the yes sir of it"]
    assert clusters_of(texts) == [0, 1, 0, 3, 4, 5, 6, 7, 8]


def test_no_documents_have_no_clusters() -> None:
    assert clusters_of([]) == []
    assert clusters(3, np.zeros((0, 2), dtype=np.int64)).tolist() == [0, 1, 2]


def test_a_cluster_is_named_by_its_lowest_document_whatever_the_order_of_pairs() -> None:
    links = [(4, 7), (2, 4), (1, 3), (7, 8), (2, 8)]
    for order in itertools.permutations(links):
        assert clusters(9, np.array(order)).tolist() == [0, 1, 2, 1, 2, 5, 6, 2, 2]


def test_the_order_of_documents_does_not_change_what_is_together() -> None:
    texts = invented(60, 80, seed=1)
    texts += planted_pairs(texts[:30], 0.02, seed=2) + planted_pairs(texts[:20], 0.03, seed=3)
    order = np.random.default_rng(4).permutation(len(texts))
    there = np.array(clusters_of(texts))
    shuffled = np.array(clusters_of([texts[n] for n in order]))
    together = there[order]
    assert len(set(there.tolist())) < 70
    assert np.array_equal(together[:, None] == together, shuffled[:, None] == shuffled)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.6, 0.95))
def test_clusters_are_those_of_all_pairs_compared_one_by_one(seed: int, kept: float) -> None:
    chance = np.random.default_rng(seed)
    base = chance.integers(0, 1_000, (3, NUM_HASHES))[chance.integers(0, 3, 30)]
    signature_NE = np.where(chance.random(base.shape) < kept, base, chance.integers(0, 1_000, base.shape)).astype(
        np.uint32
    )
    rows = bands(DEFAULT)[1]
    slow = []
    for i, j in itertools.combinations(range(len(base)), 2):
        equal = signature_NE[i] == signature_NE[j]
        if equal.reshape(-1, rows).all(axis=1).any() and equal.mean() >= lowest_estimate(DEFAULT):
            slow.append((i, j))
    assert {(i, j) for i, j in pairs_of(signature_NE).tolist()} <= set(slow)
    expected = clusters(len(base), np.array(slow, dtype=np.int64).reshape(-1, 2))
    assert clusters(len(base), pairs_of(signature_NE)).tolist() == expected.tolist()


def test_thousands_of_nearly_the_same_document_are_one_cluster_in_moments() -> None:
    text = invented(1, 400, seed=5)[0]
    signature_NE = signatures([text + f" copy {number}" for number in range(5_000)], DEFAULT)
    start_s = time.process_time()
    pairs = pairs_of(signature_NE)
    assert time.process_time() - start_s < 5  # 0.1 s; all pairs would take a minute
    assert set(clusters(5_000, pairs).tolist()) == {0}


def test_copies_stand_side_by_side_in_a_bucket_of_any_size() -> None:
    half = np.random.default_rng(10).integers(0, 2**32, (1_000, NUM_HASHES), dtype=np.uint32)
    half[:, :7] = 0  # the first band
    found = band_pairs(np.concatenate([half, half]), 0, DEFAULT)
    assert sorted(found.tolist()) == [[n, 1_000 + n] for n in range(1_000)]


def test_copies_are_found_among_thousands_that_share_half_their_text() -> None:
    boilerplate = invented(1, 200, seed=6)[0]
    texts = [f"{boilerplate} {own}" for own in invented(2_000, 100, seed=7)]
    copies = planted_pairs(texts[:100], 0.01, seed=8)
    assert 0.48 < jaccard(texts[0], texts[1], 5) < 0.5  # alike in some bands, buckets of a hundred among them
    assert min(map(jaccard, texts, copies, itertools.repeat(5, 100))) > 0.8
    cluster = clusters_of(texts + copies)
    assert np.mean([cluster[n] == cluster[2_000 + n] for n in range(100)]) >= 0.95
    assert cluster[:2_000] == list(range(2_000))


def test_signatures_may_lie_in_a_file(tmp_path: Path) -> None:
    texts = invented(50, 60, seed=9)
    signature_NE = signatures(texts + texts[10:20], DEFAULT)
    np.save(tmp_path / "signatures.npy", signature_NE)
    mapped = np.load(tmp_path / "signatures.npy", mmap_mode="r")
    assert pairs_of(mapped).tolist() == [[10 + n, 50 + n] for n in range(10)]


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
def test_the_planted_near_copies_of_the_dirty_corpus_are_found_and_their_originals_stay() -> None:
    lines = Path(f"{CORPORA}/dirty/duplicates/dups.jsonl").read_text(encoding="utf-8").splitlines()
    first = {content_key(row["text"]): row for row in reversed([json.loads(line) for line in lines])}
    rows = list(first.values())[::-1]
    cluster = clusters_of([row["text"] for row in rows])
    number = [int("".join(filter(str.isdigit, row["id"]))) for row in rows]
    near = {n for n, row in zip(number, rows, strict=True) if row["id"].startswith("near")}
    assert (len(rows), len(near), len(set(cluster))) == (80, 20, 60)
    for n, lowest in enumerate(cluster):
        if lowest != n:  # always a near copy and another form of the text it was made from
            assert number[lowest] == number[n]
            assert "near" in rows[n]["id"] + rows[lowest]["id"]
    texts_left = {number[n] for n, row in enumerate(rows) if cluster[n] == n and not row["id"].startswith("boiler")}
    assert texts_left == set(number)  # each of the original texts has a form that stays
