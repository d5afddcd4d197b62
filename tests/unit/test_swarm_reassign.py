"""The second pass: documents go to the expert that likes them best, the router learns who that is."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import ulm
from pipelines.corpus.clustering.head import INVERSE_PENALTY, fit_head
from pipelines.corpus.domains import Clusters, cluster_corpus
from pipelines.swarm.evaluate import CONTEXT
from pipelines.swarm.plan import plan_swarm
from pipelines.swarm.reassign import SCORED_TOKENS, reassign, second_pass
from pipelines.train.loop import train
from tests.written_corpus import write_corpus
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.recipes.base import validate
from ulm.recipes.clustering import Clustering
from ulm.recipes.train import SwarmRecipe
from ulm.swarm.router import Router

WORDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section",
    "code": "def return import class self lambda yield parser",
    "medicine": "patient dose tablet symptom fever clinic nurse therapy",
}
SPEC = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=257, context_tokens=64)
SOLVER = 2e-2  # the tolerance at which scikit-learn's optimizer stops, on weights of about 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    generator = random.Random(0)
    documents = [
        (domain, ("train", "train", "val")[number % 3], " ".join(generator.choices(words.split(), k=5 + number * 2)))
        for number in range(24)
        for domain, words in WORDS.items()
    ]
    documents += [("law", "train", "court"), ("law", "train", "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9")]
    return write_corpus(tmp_path_factory.mktemp("home"), documents)


@pytest.fixture(scope="module")
def experts(corpus: Corpus) -> list[Path]:
    """Models that like different documents: sharp, and never trained."""
    folders = []
    for seed in range(3):
        model = ulm.build(SPEC, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.dim() >= 2 else 1.0)
        folder = corpus.folder.parent.parent / "runs" / f"x-e{seed:02d}-first" / "step-00000001"
        folders.append(store.save(model, corpus.tokenizer, folder, step=1))
    return folders


@pytest.fixture(scope="module")
def first(corpus: Corpus) -> Clusters:
    return cluster_corpus(corpus, 3, Clustering())


def likes(corpus: Corpus, experts: list[Path]) -> dict[int, list[float]]:
    """What each expert gives each training document that is long enough, by plain forward passes over whole pieces."""
    models = [store.load(folder)[0] for folder in experts]
    found = {}
    for row, document in enumerate(corpus.documents.to_pylist()):
        if document["split"] != "train" or document["num_tokens"] <= CONTEXT:
            continue
        count = min(document["num_tokens"], CONTEXT + SCORED_TOKENS)
        tokens = [256, *corpus.tokens("train").read(document["first_token"], count).tolist()]
        found[row] = []
        for model in models:
            total = []
            for start in range(0, count, SPEC.context_tokens):
                piece = torch.tensor([tokens[start : start + SPEC.context_tokens + 1]])
                with torch.no_grad():
                    logprob_TV = model(piece[:, :-1])[0].double().log_softmax(-1)
                total += logprob_TV.gather(-1, piece[0, 1:, None])[:, 0].tolist()
            found[row].append(float(np.mean(total[CONTEXT:])))
    return found


def test_each_training_document_goes_to_the_expert_that_gives_its_beginning_the_best_likelihood(corpus, experts, first):
    clusters = reassign(corpus, first, experts, Clustering(), 0)
    liked = likes(corpus, experts)
    known = {row for row in liked if first.cluster_N[row] >= 0}
    assert len(known) > 40
    assert [clusters.cluster_N[row] for row in known] == [int(np.argmax(liked[row])) for row in known]
    assert clusters.cluster_N.tolist() != first.cluster_N.tolist()
    for cluster in range(3):
        own = np.load(clusters.documents(cluster))
        assert own.tolist() == np.flatnonzero(clusters.cluster_N == cluster).tolist()


def test_other_documents_go_where_the_new_router_sends_them_and_those_without_words_stay(corpus, experts, first):
    clusters = reassign(corpus, first, experts, Clustering(), 0)
    router, liked = Router.load(clusters.folder), likes(corpus, experts)
    others = [row for row in range(corpus.documents.num_rows) if row not in liked and first.cluster_N[row] >= 0]
    assert len(others) > 20
    sent = [int(router.weights(corpus.document_text(row)).argmax()) for row in others]
    assert [clusters.cluster_N[row] for row in others] == sent
    assert router.head is not None and router.ids == ("e00", "e01", "e02")
    assert router.far is not None and not router.is_far(WORDS["law"])


def test_a_cluster_that_would_be_too_small_is_left_as_it_was(corpus, experts, first):
    free = reassign(corpus, first, experts, Clustering(), 0)
    smallest = int(np.argmin(free.tokens))
    assert first.tokens[smallest] > free.tokens[smallest] + 1
    clusters = reassign(corpus, first, experts, Clustering(), free.tokens[smallest] + 1)
    was = np.flatnonzero(first.cluster_N == smallest)
    assert np.flatnonzero(clusters.cluster_N == smallest).tolist() == was.tolist()
    assert min(clusters.tokens) > free.tokens[smallest]
    assert clusters.cluster_N.tolist() != first.cluster_N.tolist()


def test_with_overlap_the_documents_that_two_experts_like_most_alike_are_in_both(corpus, experts):
    config = Clustering(overlap=0.25)
    clusters = reassign(corpus, cluster_corpus(corpus, 3, config), experts, config, 0)
    liked = {row: sorted(x) for row, x in likes(corpus, experts).items() if clusters.cluster_N[row] >= 0}
    in_two = {row for row in liked if clusters.assigned_NK[row, 1] >= 0}
    assert len(in_two) == pytest.approx(0.25 * len(liked), abs=1)
    leads = {row: x[-1] - x[-2] for row, x in liked.items()}
    assert max(leads[row] for row in in_two) <= min(leads[row] for row in leads.keys() - in_two)


def test_the_same_experts_find_the_same_clustering_and_others_another(corpus, experts, first):
    config = Clustering()
    once = reassign(corpus, first, experts, config, 0)
    assert reassign(corpus, first, experts, config, 0).folder == once.folder
    assert reassign(corpus, first, experts[::-1], config, 0).digest != once.digest


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 2], [1]])
def test_the_head_is_multinomial_logistic_regression_and_a_label_that_none_has_gets_nothing(labels):
    generator = np.random.default_rng(0)
    h_MD = generator.normal(size=(60, 4))
    h_MD /= np.linalg.norm(h_MD, axis=1, keepdims=True)
    label_M = np.array(labels)[
        (h_MD[:, 0] > 0).astype(int) * (len(labels) > 1) + (h_MD[:, 1] > 0.5) * (len(labels) > 2)
    ]
    head = fit_head(h_MD, label_M, 3)
    score_MC = h_MD @ head.matrix_ND.T + head.bias_N
    p_MC = np.exp(score_MC) / np.exp(score_MC).sum(axis=1, keepdims=True)
    if len(labels) > 1:
        peer = LogisticRegression(C=INVERSE_PENALTY, max_iter=5_000, tol=1e-8).fit(h_MD, label_M)
        np.testing.assert_allclose(p_MC[:, labels], peer.predict_proba(h_MD), atol=SOLVER)
    missing = [c for c in range(3) if c not in labels]
    assert p_MC[:, missing].max(initial=0) < 1e-6


def test_the_second_pass_goes_on_with_each_experts_weights_over_its_new_documents(corpus):
    root = corpus.folder.parent.parent
    fields = {"corpus": "tiny", "model": {"preset": "nano", "num_layers": 1}, "experts": 2, "reassign": True}
    train_fields = {"steps": 12, "batch_tokens": 256, "context_tokens": 64, "eval_tokens": 256}
    rest = {"train": train_fields, "controls": [], "warmup_steps": 1, "samples": {"prompts": []}}
    recipe = validate(SwarmRecipe, {"name": "two", **fields, **rest})
    plan = plan_swarm(recipe, root=root)
    for task in plan.tasks():
        train(task)
    second = second_pass(plan, recipe)
    assert second.clusters.digest != plan.clusters.digest and second.second_steps == 0
    for cluster, (member, task) in enumerate(second.experts.items()):
        before = plan.experts[member]
        assert task.run == f"two-{member}"
        assert task.init_from == store.newest(before.folder)
        assert before.num_steps + task.num_steps == 3
        assert (task.schedule.decay_share, task.schedule.final_share) == (1.0, 0.1)
        assert task.documents == second.clusters.documents(cluster)
        train(task)
        assert read_manifest(store.newest(task.folder)).init_from == read_manifest(task.init_from).digest
    assert second_pass(plan, recipe).experts == second.experts
