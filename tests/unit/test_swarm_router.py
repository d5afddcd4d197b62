"""The served embedding and router: equal to scikit-learn's, weights that sum to one, verified files."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import Normalizer

from ulm import artefacts
from ulm.errors import ArtefactError
from ulm.swarm.embed import MAX_CHARS, Embedder, words
from ulm.swarm.router import FAR_CHARS, FILES, Head, Router, nearest_squared, top_k

FAR = (1.95, 1.9, 1.875, 1.8, 1.75)

TEXTS = [
    "The court shall hear the appeal within 30 days of the judgment; the court may extend the days.",
    "def parse(path): return json.loads(open(path).read())  # parse a file of 12 rows",
    "Take two tablets of the medicine with water; the doctor may give 3 tablets.",
    "The judge and the court read the appeal and the judgment twice.",
    "import json; class Parser: path = open file rows return self",
    "A doctor gives water and medicine to the patient for 2 days.",
]


@pytest.fixture(scope="module")
def fitted() -> tuple[TfidfVectorizer, TruncatedSVD]:
    """scikit-learn's own tf-idf and SVD; what is a word and what a number is ours to say."""

    def tokens(text: str) -> list[str]:
        found = re.findall(r"(?u)\b\w\w+\b|[^\w\s]", text)
        return ["#NUMBER" if token[0].isdigit() else token for token in found]

    vectorizer = TfidfVectorizer(tokenizer=tokens, token_pattern=None, sublinear_tf=True)
    svd = TruncatedSVD(4, random_state=0).fit(vectorizer.fit_transform(TEXTS))
    return vectorizer, svd


@pytest.fixture(scope="module")
def embedder(fitted: tuple[TfidfVectorizer, TruncatedSVD]) -> Embedder:
    vectorizer, svd = fitted
    return Embedder(dict(vectorizer.vocabulary_), vectorizer.idf_, svd.components_.T.astype(np.float32))


def router_of(embedder: Embedder) -> Router:
    centroids_ND = np.stack([embedder(text) for text in TEXTS[:3]]).astype(np.float32)
    return Router(["e00", "e01", "e02"], embedder, centroids_ND, np.array([0.5, 0.3, 0.2]), 0.1)


def stored(router: Router, place) -> None:
    with artefacts.new_folder(place) as folder:
        router.write(folder)
        artefacts.write_json(folder / "manifest.json", {"format_version": 1, "files": artefacts.digest_files(folder)})


@pytest.mark.parametrize("text", [*TEXTS, "Court, COURT and the 77 doctors: unknown words too. naïve_name x"])
def test_the_served_transform_equals_scikit_learns(text, fitted, embedder):
    vectorizer, svd = fitted
    expected = Normalizer().transform(svd.transform(vectorizer.transform([text])))[0]
    assert np.abs(embedder(text) - expected).max() < 1e-6  # components are stored in float32
    assert np.linalg.norm(embedder(text)) == pytest.approx(1.0, abs=1e-12)


def test_words_are_lower_case_two_letters_or_more_or_marks_and_numbers_are_one_word():
    assert words("A naïve Test: x_1 4th 1999, z 7") == ["naïve", "test", ":", "x_1", "#NUMBER", "#NUMBER", ","]


def test_only_the_end_of_a_long_text_is_looked_at(embedder):
    end = (TEXTS[0] + " ") * 50
    end = end[-MAX_CHARS:]
    np.testing.assert_array_equal(embedder("medicine doctor water " * 10_000 + end), embedder(end))


def test_weights_sum_to_one_and_follow_the_nearest_centroid(embedder):
    router = router_of(embedder)
    for nearest, text in enumerate(TEXTS[:3]):
        weight_N = router.weights(text)
        assert weight_N.sum() == pytest.approx(1.0, abs=1e-12)
        assert weight_N.argmax() == nearest


def test_weights_are_the_softmax_of_squared_distances_over_temperature(embedder):
    router = router_of(embedder)
    h_D = embedder(TEXTS[3])
    expected = np.array([np.exp(-((h_D - c_D) ** 2).sum() / 0.1) for c_D in router.centroids_ND])
    np.testing.assert_allclose(router.weights(TEXTS[3]), expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("text", ["", " \n", "a b c", "zzz qqq"])
def test_weights_are_the_clusters_shares_where_no_word_is_known(text, embedder):
    assert router_of(embedder).weights(text).tolist() == [0.5, 0.3, 0.2]


def far_distance(vectorizer: TfidfVectorizer, router: Router, text: str) -> float:
    """The slow way: the whole tf-idf vector with a place for each unknown word, the centroids lifted to as many."""
    counts = Counter(vectorizer.build_analyzer()(text))
    names = [*vectorizer.vocabulary_, *(word for word in counts if word not in vectorizer.vocabulary_)]
    idf = {word: vectorizer.idf_[row] for word, row in vectorizer.vocabulary_.items()}
    x = np.array([(1 + np.log(counts[n])) * idf.get(n, vectorizer.idf_.max()) if n in counts else 0.0 for n in names])
    x /= np.linalg.norm(x)
    lifted = [router.embedder.components_VD[vectorizer.vocabulary_[n]] if n in idf else np.zeros(4) for n in names]
    centroids = [np.array(lifted, dtype=float) @ c_D for c_D in router.centroids_ND]
    return min(float(np.square(x - c / np.linalg.norm(c)).sum()) for c in centroids)


@pytest.mark.parametrize("text", [TEXTS[3], "the judge reads of zebras, zebras and quaggas!"])
def test_text_is_far_beyond_the_distance_to_the_nearest_centroid_unknown_words_included(text, fitted, embedder):
    router = router_of(embedder)
    text = f"{text} " * 10
    assert len(text) > FAR_CHARS[-2]
    distance = far_distance(fitted[0], router, text)
    router.far = [0.0, 0.0, 0.0, distance + 1e-5, distance + 1e-5]
    assert not router.is_far(text)
    router.far = [9.0, 9.0, 9.0, distance - 1e-5, distance - 1e-5]  # components are stored in float32
    assert router.is_far(text)


def test_how_far_is_far_depends_on_a_texts_length_and_less_than_fifty_characters_tell_nothing(embedder):
    router = router_of(embedder)
    router.far = [2.0, 1.9, 1.0, 0.0, 0.0]
    words_of = "court judge appeal "
    assert router.is_far(words_of * 22) and not router.is_far(words_of * 4)
    router.far = [0.0] * 5
    assert router.is_far(words_of * 3) and not router.is_far(words_of)
    limits = [nearest_squared(embedder.project(words_of * n)[None], router.centroids_ND)[0] for n in (3, 7, 15, 50)]
    assert max(limits) - min(limits) < 1e-6  # the same words in the same shares: only the limits differ


def test_text_of_unknown_words_alone_is_far_and_text_without_words_is_not(embedder):
    router = router_of(embedder)
    assert not router.is_far("zzz qqq")  # no distance was calibrated
    router.far = [1.9] * 5
    assert router.is_far("zzz qqq") and not router.is_far(TEXTS[0])
    assert not any(router.is_far(text) for text in ("", " \n", "a b c"))


def test_a_router_of_before_counts_words_as_they_are(fitted, embedder, tmp_path):
    router = router_of(embedder)
    stored(router, tmp_path / "router")
    fields = json.loads((tmp_path / "router" / "router.json").read_text())
    del fields["sublinear"], fields["far"]
    artefacts.write_json(tmp_path / "router" / "router.json", fields)
    files = artefacts.digest_files(tmp_path / "router")
    artefacts.write_json(tmp_path / "router" / "manifest.json", {"format_version": 1, "files": files})
    loaded = Router.load(tmp_path / "router")
    plain = TfidfVectorizer(analyzer=words, vocabulary=fitted[0].vocabulary_)
    plain.idf_ = fitted[0].idf_
    expected = Normalizer().transform(fitted[1].transform(plain.transform([TEXTS[0]])))[0]
    assert np.abs(loaded.embedder(TEXTS[0]) - expected).max() < 1e-6
    assert loaded.far is None


def test_a_head_weighs_in_the_centroids_place(embedder):
    generator = np.random.default_rng(0)
    head = Head(generator.normal(size=(3, 4)), generator.normal(size=3))
    router = router_of(embedder)
    router.head = head
    score_N = np.array([row_D @ embedder(TEXTS[4]) for row_D in head.matrix_ND]) + head.bias_N
    np.testing.assert_allclose(router.weights(TEXTS[4]), np.exp(score_N) / np.exp(score_N).sum(), rtol=1e-12)
    assert router.weights("zzz").tolist() == [0.5, 0.3, 0.2]


def test_a_head_shares_out_among_the_experts_that_it_knows_what_centroids_give_them(embedder):
    centroids_only, router = router_of(embedder), router_of(embedder)
    router.head = Head(np.eye(2, 4), np.array([0.0, 1.0]))
    weight_N, was_N = router.weights(TEXTS[4]), centroids_only.weights(TEXTS[4])
    assert weight_N[2] == pytest.approx(was_N[2], rel=1e-12)
    assert weight_N[1] / weight_N[0] == pytest.approx(np.exp(1 + embedder(TEXTS[4])[1] - embedder(TEXTS[4])[0]))
    assert weight_N.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_router_comes_back_with_its_head_and_its_distance(embedder, tmp_path):
    router = router_of(embedder)
    router.far, router.head = FAR, Head(np.eye(3, 4), np.arange(3.0))
    stored(router, tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.far == FAR
    np.testing.assert_array_equal(loaded.weights(TEXTS[1]), router.weights(TEXTS[1]))
    assert loaded.weights(TEXTS[1]).tolist() != router_of(embedder).weights(TEXTS[1]).tolist()


@pytest.mark.parametrize(
    ("far", "head", "message"),
    [
        (FAR, Head(np.eye(2, 4), np.zeros(3)), "head and centroids differ in size"),
        (FAR, Head(np.eye(4, 4), np.zeros(4)), "head and centroids differ in size"),
        (FAR, Head(np.eye(3, 4), np.zeros(2)), "head and centroids differ in size"),
        (FAR, Head(np.full((3, 4), np.nan), np.zeros(3)), "the head must be finite"),
        ((-1.0, *FAR[1:]), None, "far must be 5 finite squared distances"),
        ((np.inf, *FAR[1:]), None, "far must be 5 finite squared distances"),
        (FAR[1:], None, "far must be 5 finite squared distances"),
    ],
)
def test_a_router_whose_parts_do_not_fit_is_refused(far, head, message, embedder, tmp_path):
    router = router_of(embedder)
    router.far, router.head = far, head
    stored(router, tmp_path / "router")
    with pytest.raises(ArtefactError, match=message):
        Router.load(tmp_path / "router")


def test_top_k_keeps_the_largest_made_to_sum_to_one():
    weight_N = np.array([0.1, 0.4, 0.1, 0.4])
    assert top_k(weight_N, 1).tolist() == [0, 1.0, 0, 0]
    assert top_k(weight_N, 3).tolist() == pytest.approx([0.1 / 0.9, 0.4 / 0.9, 0, 0.4 / 0.9])
    assert top_k(weight_N, 9).tolist() == weight_N.tolist()
    assert top_k(np.stack([weight_N, weight_N[::-1]]), 1).tolist() == [[0, 1.0, 0, 0], [1.0, 0, 0, 0]]


def test_a_stored_router_comes_back_with_the_same_weights(embedder, tmp_path):
    router = router_of(embedder)
    stored(router, tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.ids == ("e00", "e01", "e02")
    assert len(loaded.digest) == 64
    for text in (*TEXTS, ""):
        np.testing.assert_array_equal(loaded.weights(text), router.weights(text))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_a_router_is_refused(name, embedder, tmp_path):
    stored(router_of(embedder), tmp_path / "router")
    path = tmp_path / "router" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=f"{name}: content does not match its digest"):
        Router.load(tmp_path / "router")


def test_a_router_without_its_fields_is_refused_by_place(embedder, tmp_path):
    folder = tmp_path / "router"
    stored(router_of(embedder), folder)
    artefacts.write_json(folder / "router.json", {"format_version": 1})
    artefacts.write_json(folder / "manifest.json", {"format_version": 1, "files": artefacts.digest_files(folder)})
    with pytest.raises(ArtefactError, match="not a readable router: KeyError"):
        Router.load(folder)
