"""One expert more or fewer: the others stay as they are, to the byte, and the router weighs those that are left."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ulm
from pipelines.corpus.clustering.assign import embed_texts
from pipelines.corpus.domains import cluster_corpus
from pipelines.swarm import change
from pipelines.train import alone
from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.recipes.base import validate
from ulm.recipes.clustering import Clustering
from ulm.recipes.serve import Budget
from ulm.recipes.train import SwarmAddRecipe, TrainRecipe
from ulm.swarm.manifest import Part, Swarm, write_swarm
from ulm.tokenizers.bpe import train_bpe

WORDS = {
    "law": "court judge appeal statute verdict contract section counsel",
    "code": "def return import class lambda yield parser buffer",
}
NEW = "court yield poem verse rhyme stanza court yield"  # words of which the old router knows some
SPEC = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=257, context_tokens=32)
FLOAT32_CENTROIDS = 1e-6  # as which the router stores them


def texts(words: str, domain: str, seed: int = 0) -> list[tuple[str, str, str]]:
    generator = random.Random(seed)
    splits = ("train", "train", "val", "test")
    return [(domain, splits[n % 4], " ".join(generator.choices(words.split(), k=40))) for n in range(24)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    made = write_corpus(tmp_path, [row for domain, words in WORDS.items() for row in texts(words, domain)], name="old")
    write_corpus(tmp_path, texts(NEW, "poems"), name="new")
    return made


@pytest.fixture
def swarm(corpus: Corpus, tmp_path: Path) -> Swarm:
    paths: dict[str, Path] = {}
    for seed, name in enumerate(("e00", "e01", "seed", "dense")):
        model = ulm.build(SPEC, seed=seed)
        paths[name] = store.save(model, corpus.tokenizer, tmp_path / "runs" / f"t-{name}" / "step-00000001", step=1)
    clusters = cluster_corpus(corpus, 2, Clustering())
    return write_swarm(
        tmp_path,
        "t",
        members={f"e0{c}": Part(paths[f"e0{c}"], c, clusters.domains[c]) for c in range(2)}
        | {"seed": Part(paths["seed"])},
        router=clusters.folder,
        strategy={"kind": "mixture", "top_k": 2},
        budget=Budget(max_tokens=99),
        tokenizer_digest=corpus.tokenizer.digest,
        corpus_digest=corpus.digest,
        dense=paths["dense"],
    )


def recipe(**changes: Any) -> SwarmAddRecipe:
    fields = {"name": "poems", "swarm": "t", "corpus": "new", "samples": {"prompts": []}, **changes}
    return validate(SwarmAddRecipe, {"train": {"steps": 2, "batch_tokens": 64, "eval_tokens": 64}, **fields})


def add(root: Path, **changes: Any) -> dict[str, Any]:
    def run(training: TrainRecipe) -> dict[str, Any]:
        return alone.run(training, root=root)

    return change.add(recipe(**changes), root=root, run=run)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): artefacts.digest_file(path) for path in folder.rglob("*") if path.is_file()}


def test_a_new_expert_begins_with_the_seed_and_the_others_stay_as_they_are_to_the_byte(corpus, swarm, tmp_path):
    before = {name: contents(swarm.checkpoint(name)) for name in swarm.members}
    line = add(tmp_path)
    after = Swarm.open("t", root=tmp_path)
    assert (line["member"], line["domain"], line["digest"]) == ("e02", "poems", after.digest)
    assert set(after.members) == {"e00", "e01", "e02", "seed"}
    for name, was in before.items():
        assert contents(after.checkpoint(name)) == was
        assert after.members[name].digest == swarm.members[name].digest
    new = read_manifest(after.checkpoint("e02"))
    assert (
        new.init_from == swarm.members["seed"].digest and new.corpus_digest == Corpus.open("new", root=tmp_path).digest
    )
    assert (after.members["e02"].cluster, after.manifest.budget.max_tokens) == (2, 99)
    assert after.path_of(after.manifest.controls.dense) == swarm.path_of(swarm.manifest.controls.dense)
    assert Swarm.open(swarm.digest, root=tmp_path).manifest == swarm.manifest  # the version before is still there


def test_the_new_experts_centroid_is_the_mean_embedding_and_shares_are_of_all_training_text(corpus, swarm, tmp_path):
    old, new_corpus = swarm.router(), Corpus.open("new", root=tmp_path)
    add(tmp_path)
    router = Swarm.open("t", root=tmp_path).router()
    rows = [row for row, document in enumerate(new_corpus.documents.to_pylist()) if document["split"] == "train"]
    tokens = [new_corpus.documents["num_tokens"][row].as_py() for row in rows]
    h_ND = embed_texts(old.embedder, [new_corpus.document_text(row) for row in rows])
    np.testing.assert_allclose(router.centroids_ND[2], np.average(h_ND, axis=0, weights=tokens), atol=FLOAT32_CENTROIDS)
    np.testing.assert_array_equal(router.centroids_ND[:2], old.centroids_ND)
    total = corpus.num_tokens("train") + new_corpus.num_tokens("train")
    assert router.shares_N[2] == pytest.approx(new_corpus.num_tokens("train") / total)
    assert router.shares_N.sum() == pytest.approx(1)
    assert all(now >= was for now, was in zip(router.far, old.far, strict=True))
    assert router.weights("court yield poem").argmax() == 2
    assert not router.is_far("court yield poem verse")


def test_adding_again_answers_at_once_with_the_same_swarm(corpus, swarm, tmp_path):
    first = add(tmp_path)
    assert add(tmp_path) == first
    assert add(tmp_path, member="e02") == first


def test_a_dropped_expert_is_gone_and_places_and_shares_close_up(corpus, swarm, tmp_path):
    add(tmp_path, member="poet")
    before = Swarm.open("t", root=tmp_path)
    line = change.drop("t", "e00", root=tmp_path)
    after = Swarm.open("t", root=tmp_path)
    assert (line["member"], line["digest"], line["checkpoint"]) == ("e00", after.digest, str(before.checkpoint("e00")))
    assert {name: entry.cluster for name, entry in after.members.items()} == {"e01": 0, "poet": 1, "seed": None}
    assert {n: e.digest for n, e in after.members.items()} == {n: before.members[n].digest for n in after.members}
    router, was = after.router(), before.router()
    assert router.ids == ("e01", "poet")
    np.testing.assert_allclose(router.shares_N, was.shares_N[1:] / was.shares_N[1:].sum(), rtol=1e-12)
    assert router.far == was.far
    router.head = was.head = None  # which shares out by itself: the next tests
    for text in ("court", "yield return", "poem court"):
        weight_N = was.weights(text)[1:]
        np.testing.assert_allclose(router.weights(text), weight_N / weight_N.sum(), rtol=1e-6)


def test_a_swarm_that_loses_its_new_expert_weighs_as_before(corpus, swarm, tmp_path):
    add(tmp_path)
    change.drop("t", "e02", root=tmp_path)
    router, old = Swarm.open("t", root=tmp_path).router(), swarm.router()
    for text in ("court", "yield return", "", "zzz"):
        np.testing.assert_allclose(router.weights(text), old.weights(text), rtol=1e-12)


def test_the_routers_head_knows_those_of_before_and_loses_the_row_of_one_that_goes(corpus, swarm, tmp_path):
    head = swarm.router().head
    add(tmp_path)
    router = Swarm.open("t", root=tmp_path).router()
    np.testing.assert_array_equal(router.head.matrix_ND, head.matrix_ND)
    change.drop("t", "e00", root=tmp_path)
    router = Swarm.open("t", root=tmp_path).router()
    np.testing.assert_array_equal(router.head.matrix_ND, head.matrix_ND[1:])
    change.drop("t", "e01", root=tmp_path)
    router = Swarm.open("t", root=tmp_path).router()
    assert router.ids == ("e02",) and router.head is None
    assert router.weights("court").tolist() == [1.0]


def test_what_cannot_be_added_or_dropped_is_refused_by_place(corpus, swarm, tmp_path):
    other = train_bpe([text for _, _, text in texts(NEW, "poems")], vocab_size=300)
    write_corpus(tmp_path, texts(NEW, "poems"), other, name="other")
    write_corpus(tmp_path, texts("zzz qqq xxx", "noise"), name="noise")
    for changes, message in (
        ({"corpus": "other"}, "corpus: .* has another tokenizer than the swarm t"),
        ({"corpus": "noise"}, "corpus: the swarm's router knows no word of"),
        ({"member": "e01"}, "member: the swarm t has a member e01 .*e02"),
        ({"model": "nano"}, "model: the expert's model is the seed's"),
        ({"swarm": "tt"}, "swarm: no swarm 'tt'"),
    ):
        with pytest.raises(ConfigError, match=message):
            add(tmp_path, **changes)
    change.drop("t", "e01", root=tmp_path)
    for member, message in (
        ("seed", "member: seed is not an expert"),
        ("e07", "member: the swarm t has no member 'e07'"),
        ("e00", "member: e00 is the swarm's last expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            change.drop("t", member, root=tmp_path)


def test_an_expert_that_the_strategy_names_is_not_dropped(corpus, swarm, tmp_path):
    parts = {name: Part(swarm.path_of(entry), entry.cluster, entry.domain) for name, entry in swarm.members.items()}
    named = swarm.manifest.model_copy(update={"strategy": {"kind": "fallback", "members": ["e01", "e00"]}})
    change._write(tmp_path, "t", Swarm(swarm.folder, named), parts, swarm.router(), change._tokens(swarm))
    with pytest.raises(ConfigError, match="member: the swarm's strategy names e01 in members"):
        change.drop("t", "e01", root=tmp_path)
