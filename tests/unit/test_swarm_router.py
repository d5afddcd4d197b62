"""The served embedding and router: equal to scikit-learn's, weights that sum to one, verified files."""

import json

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import Normalizer

from ulm import artefacts
from ulm.errors import ArtefactError
from ulm.swarm.embed import MAX_CHARS, Embedder, words
from ulm.swarm.router import FILES, Head, Router, top_k

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
    """scikit-learn's own tokens, stop words, tf-idf and SVD; only what is a number is ours to say."""

    def tokens(text: str) -> list[str]:
        found = TfidfVectorizer().build_tokenizer()(text)
        return ["#NUMBER" if token[0].isdigit() else token for token in found]

    vectorizer = TfidfVectorizer(tokenizer=tokens, token_pattern=None, stop_words="english")
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


def test_words_are_lower_case_two_letters_or_more_and_numbers_are_one_word():
    assert words("A naïve Test: x_1 4th 1999, z 7") == ["naïve", "test", "x_1", "#NUMBER", "#NUMBER"]


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


@pytest.mark.parametrize("text", ["", " \n", "the of and", "zzz qqq"])
def test_weights_are_the_clusters_shares_where_no_word_is_known(text, embedder):
    assert router_of(embedder).weights(text).tolist() == [0.5, 0.3, 0.2]


def test_text_is_far_beyond_the_distance_and_where_it_has_words_but_none_that_is_known(embedder):
    router = router_of(embedder)
    assert not any(router.is_far(text) for text in [*TEXTS, "zzz qqq"])  # no distance was calibrated
    router.far = np.nextafter(np.square(embedder(TEXTS[3]) - router.centroids_ND).sum(axis=1).min(), 0)
    assert router.is_far(TEXTS[3]) and not router.is_far(TEXTS[0])
    router.far = np.nextafter(router.far, 9, dtype=np.float64) + 1e-12
    assert not router.is_far(TEXTS[3])
    assert router.is_far("zzz qqq")
    assert not any(router.is_far(text) for text in ("", " \n", "a . ;"))  # no words at all


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
    router.far, router.head = 0.875, Head(np.eye(3, 4), np.arange(3.0))
    stored(router, tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.far == 0.875
    np.testing.assert_array_equal(loaded.weights(TEXTS[1]), router.weights(TEXTS[1]))
    assert loaded.weights(TEXTS[1]).tolist() != router_of(embedder).weights(TEXTS[1]).tolist()


@pytest.mark.parametrize(
    ("far", "head", "message"),
    [
        (0.5, Head(np.eye(2, 4), np.zeros(3)), "head and centroids differ in size"),
        (0.5, Head(np.eye(4, 4), np.zeros(4)), "head and centroids differ in size"),
        (0.5, Head(np.eye(3, 4), np.zeros(2)), "head and centroids differ in size"),
        (0.5, Head(np.full((3, 4), np.nan), np.zeros(3)), "the head must be finite"),
        (-1.0, None, "far must be a finite squared distance"),
        (np.inf, None, "far must be a finite squared distance"),
    ],
)
def test_a_router_whose_parts_do_not_fit_is_refused(far, head, message, embedder, tmp_path):
    router = router_of(embedder)
    router.far, router.head = far, head
    stored(router, tmp_path / "router")
    with pytest.raises(ArtefactError, match=message):
        Router.load(tmp_path / "router")


def test_a_router_of_before_has_no_distance(embedder, tmp_path):
    folder = tmp_path / "router"
    stored(router_of(embedder), folder)
    fields = json.loads((folder / "router.json").read_text())
    del fields["far"]
    artefacts.write_json(folder / "router.json", fields)
    artefacts.write_json(folder / "manifest.json", {"format_version": 1, "files": artefacts.digest_files(folder)})
    assert Router.load(folder).far is None


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
