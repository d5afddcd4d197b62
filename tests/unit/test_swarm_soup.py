"""Soups: the experts' weights averaged, uniformly and by the router."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import ulm
from pipelines.corpus.domains import cluster_corpus
from pipelines.swarm import soup
from tests.written_corpus import write_corpus
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.recipes.clustering import Clustering
from ulm.swarm.router import Router

SPEC = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=257, context_tokens=32)
WORDS = {"law": "court judge appeal statute", "code": "def return import class lambda"}
FLOAT32_ROUNDING = 1e-6  # of weights below 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    generator = random.Random(0)
    texts = [
        (d, "train", " ".join(generator.choices(w.split(), k=5 + 3 * n))) for n in range(9) for d, w in WORDS.items()
    ]
    return write_corpus(tmp_path_factory.mktemp("home"), [*texts, ("law", "test", "court " * 90)])


@pytest.fixture(scope="module")
def router(corpus: Corpus) -> Router:
    return Router.load(cluster_corpus(corpus, 2, Clustering()).folder)


def experts(root: Path, corpus: Corpus, first_seed: int) -> dict[str, Path]:
    return {
        f"e0{n}": store.save(
            ulm.build(SPEC, seed=first_seed + n), corpus.tokenizer, root / f"e0{n}" / "step-00000007", step=7
        )
        for n in range(2)
    }


def test_a_soups_weights_are_the_weighted_means_of_the_experts(corpus, router, tmp_path):
    of = experts(tmp_path / "parts", corpus, 0)
    written = soup.write(tmp_path, "t", of, router, corpus)
    assert {name: path.parent.name for name, path in written.items()} == {
        "soup_uniform": "t-soup-uniform",
        "soup_router": "t-soup-router",
    }
    parts = [store.read_weights(path) for path in of.values()]
    posterior_N = soup.mean_posterior(router, corpus)
    for name, (first, second) in {"soup_uniform": (0.5, 0.5), "soup_router": posterior_N}.items():
        model, tokenizer = store.load(written[name])
        assert tokenizer.digest == corpus.tokenizer.digest
        for key, tensor in store.tensors(model).items():
            expected = first * parts[0][key] + second * parts[1][key]
            torch.testing.assert_close(tensor, expected, atol=FLOAT32_ROUNDING, rtol=0)


def test_the_mean_posterior_is_over_training_documents_by_their_tokens(corpus, router):
    train = [row for row in corpus.documents.to_pylist() if row["split"] == "train"]
    weights = [router.weights(corpus.document_text(row)) for row in range(len(train))]
    expected = np.average(weights, axis=0, weights=[row["num_tokens"] for row in train])
    np.testing.assert_allclose(soup.mean_posterior(router, corpus), expected, rtol=1e-12)


def test_a_soup_is_found_again_and_replaced_where_the_experts_are_others(corpus, router, tmp_path):
    of = experts(tmp_path / "one", corpus, 0)
    path = soup.write(tmp_path, "t", of, router, corpus)["soup_uniform"]
    before = (path / "manifest.json").stat().st_mtime_ns
    assert soup.write(tmp_path, "t", of, router, corpus)["soup_uniform"] == path
    assert (path / "manifest.json").stat().st_mtime_ns == before
    others = experts(tmp_path / "other", corpus, 5)
    soup.write(tmp_path, "t", others, router, corpus)
    parts = [store.read_weights(folder) for folder in others.values()]
    weights = store.read_weights(path)
    key = next(iter(weights))
    torch.testing.assert_close(weights[key], (parts[0][key] + parts[1][key]) / 2, atol=FLOAT32_ROUNDING, rtol=0)
