"""The table is what a slow, naive scorer gives, token by token."""

import asyncio
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import ulm
from pipelines.corpus.domains import cluster_corpus
from pipelines.swarm.evaluate import (
    CONTEXT,
    HeldOut,
    by_token,
    evaluate_swarm,
    far_tokens,
    held_out,
    score,
    window_weights,
    windows,
)  # fmt: skip
from serve.contracts import SwarmContext
from serve.strategies._account import Account
from serve.strategies._weighing import Weighing
from serve.strategies._windows import Text
from tests.written_corpus import write_corpus
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.errors import CorpusError
from ulm.recipes.clustering import Clustering
from ulm.recipes.serve import Budget
from ulm.recipes.train import Evaluation
from ulm.swarm.manifest import Part, Swarm, write_swarm
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer

CONTEXT_TOKENS = 48  # shorter than the documents, so that they are cut
FP32_SUM_ORDER = 1e-5  # batched and single float32 forward passes differ in the order of their sums
SPEC = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=257, context_tokens=CONTEXT_TOKENS)
KINDS = {"law": "court judge appeal statute verdict", "code": "def return import class lambda"}


def sharp(seed: int) -> torch.nn.Module:
    """A model whose answers differ by context: fresh weights alone are close to uniform."""
    model = ulm.build(SPEC, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() >= 2 else 1.0)
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    generator = random.Random(0)
    made = []
    for number in range(6):
        for domain, words in KINDS.items():
            text = " ".join(generator.choices(words.split(), k=generator.randint(10, 22)))
            made.append((domain, ("train", "train", "test")[number % 3], text))
    made += [("poems", "train", "court lambda verse " * 9), ("poems", "val", "return judge verse " * 3)]
    return write_corpus(tmp_path_factory.mktemp("home"), made)


@pytest.fixture(scope="module")
def swarm(corpus: Corpus) -> Swarm:
    root = corpus.folder.parent.parent
    runs = {}
    for seed, name in enumerate(("e00", "e01", "seed", "dense", "r00", "r01", "large", "soup")):
        runs[name] = store.save(sharp(seed), corpus.tokenizer, root / "runs" / name / "step-00000001", step=1)
    clusters, control = (cluster_corpus(corpus, 2, Clustering(), kind=kind) for kind in ("tf-idf", "random"))
    return write_swarm(
        root,
        "t",
        members={"e00": Part(runs["e00"], 0), "e01": Part(runs["e01"], 1), "seed": Part(runs["seed"])},
        router=clusters.folder,
        strategy={"kind": "mixture"},
        budget=Budget(),
        tokenizer_digest=corpus.tokenizer.digest,
        corpus_digest=corpus.digest,
        dense=runs["dense"],
        dense_flops=runs["large"],
        random=({"e00": Part(runs["r00"], 0), "e01": Part(runs["r01"], 1)}, control.folder),
    )


def naive_logprob(model: torch.nn.Module, tokens: list[int], index: int, eot_id: int) -> float:
    """Of tokens[index], by one forward pass over what its piece holds before it."""
    sequence = [eot_id, *tokens]
    piece = index // CONTEXT_TOKENS * CONTEXT_TOKENS
    with torch.no_grad():
        logits_V = model(torch.tensor([sequence[piece : index + 1]]))[0, -1].double()
    return float(logits_V.log_softmax(dim=-1)[tokens[index]])


def test_scores_are_those_of_plain_forward_passes_token_by_token(corpus):
    model = sharp(7)
    texts = held_out(corpus, None)[:4] + [HeldOut("long", [5] * (2 * CONTEXT_TOKENS + 1))]
    scored = score(model, texts, corpus.tokenizer.eot_id)
    for text, logprob_T in zip(texts, scored, strict=True):
        expected = [naive_logprob(model, text.tokens, t, corpus.tokenizer.eot_id) for t in range(len(text.tokens))]
        np.testing.assert_allclose(logprob_T, expected, atol=FP32_SUM_ORDER, rtol=0)


COLUMNS = (
    *("dense", "dense_flops", "seed", "soup", "route", "mixture", "mixture_likelihood", "mixture_product", "oracle"),
    *("random", "random_route"),
)


def test_the_table_equals_a_naive_one(corpus, swarm):
    config = Evaluation(tokens_per_domain=None, every_tokens=16, top_k=2)
    soup = swarm.checkpoint("seed").parent.parent / "soup" / "step-00000001"
    table = evaluate_swarm(swarm, corpus, config, others={"soup": soup})
    models = {name: store.load(swarm.checkpoint(name))[0] for name in ("e00", "e01", "seed")}
    models["dense"] = store.load(swarm.path_of(swarm.manifest.controls.dense))[0]
    models["dense_flops"] = store.load(swarm.path_of(swarm.manifest.controls.dense_flops))[0]
    models["soup"] = store.load(soup)[0]
    control = swarm.manifest.controls.random
    models |= {f"r{name}": store.load(swarm.path_of(entry))[0] for name, entry in control.members.items()}
    routers = {"": swarm.router(), "r": swarm.open_router(control.router)}
    for domain in ("law", "code", "poems"):
        nats = dict.fromkeys(COLUMNS, 0.0)
        num_tokens = num_bytes = 0
        for text in (text for text in held_out(corpus, None) if text.domain == domain):
            of_document = dict.fromkeys(("e00", "e01"), 0.0)
            logprobs = [
                {name: naive_logprob(m, text.tokens, t, 256) for name, m in models.items()}
                for t in range(len(text.tokens))
            ]
            for t in range(CONTEXT, len(text.tokens)):
                p = {name: math.exp(x) for name, x in logprobs[t].items()}
                start = t - (t - CONTEXT) % 16
                before, seen = bytes(text.tokens[:start]).decode(), range(max(0, start - CONTEXT_TOKENS + 1), start)
                w, w_random = routers[""].weights(before), routers["r"].weights(before)
                for name in ("dense", "dense_flops", "soup", "seed"):
                    nats[name] -= math.log(p[name])
                far, far_random = (routers[of].is_far(before) for of in ("", "r"))
                nats["route"] -= math.log(p["seed"] if far else p["e00"] if w[0] >= w[1] else p["e01"])
                nats["random_route"] -= math.log(
                    p["seed"] if far_random else p["re00"] if w_random[0] >= w_random[1] else p["re01"]
                )
                nats["mixture"] -= math.log(w[0] * p["e00"] + w[1] * p["e01"])
                nats["random"] -= math.log(w_random[0] * p["re00"] + w_random[1] * p["re01"])
                likelihood = [math.exp(sum(logprobs[u][name] for u in seen)) for name in ("e00", "e01")]
                for name, prior in (("likelihood", routers[""].shares_N), ("product", w)):
                    both = [prior[0] * likelihood[0], prior[1] * likelihood[1]]
                    nats[f"mixture_{name}"] -= math.log((both[0] * p["e00"] + both[1] * p["e01"]) / sum(both))
                of_document = {name: total - math.log(p[name]) for name, total in of_document.items()}
                num_tokens, num_bytes = num_tokens + 1, num_bytes + 1
            nats["oracle"] += min(of_document.values())
        assert table["tokens"][domain] == num_tokens
        for column, total in nats.items():
            assert table["nats_per_token"][domain][column] == pytest.approx(total / num_tokens, abs=FP32_SUM_ORDER)
            bits_per_byte = total / num_bytes / math.log(2)
            assert table["bits_per_byte"][domain][column] == pytest.approx(bits_per_byte, abs=2 * FP32_SUM_ORDER)
    mean = {c: np.mean([table["nats_per_token"][d][c] for d in ("law", "code", "poems")]) for c in ("dense", "route")}
    assert table["macro"]["route"]["nats_per_token"] == pytest.approx(mean["route"])
    assert table["perplexity_ratio"]["route"] == pytest.approx(math.exp(mean["route"] - mean["dense"]))
    assert "dense" not in table["perplexity_ratio"]


def test_a_source_without_a_test_split_is_scored_on_val_and_others_never(corpus):
    texts = held_out(corpus, None)
    assert [bytes(t.tokens).decode() for t in texts if t.domain == "poems"] == ["return judge verse " * 3]
    held = {
        corpus.document_text(row)
        for row, document in enumerate(corpus.documents.to_pylist())
        if document["split"] == "test" and document["num_tokens"] > CONTEXT
    }
    assert {bytes(t.tokens).decode() for t in texts if t.domain != "poems"} == held


def test_a_bound_takes_documents_in_hash_order_and_a_tenth_from_each(corpus):
    texts = held_out(corpus, 200)
    for domain in KINDS:
        scored = [len(t.tokens) - CONTEXT for t in texts if t.domain == domain]
        assert max(scored) == 20 and sum(scored) <= 200
    assert held_out(corpus, 200) == texts
    whole = {tuple(t.tokens[:40]) for t in held_out(corpus, None)}
    assert all(tuple(t.tokens[:40]) in whole for t in texts)


def test_weights_change_only_between_windows_and_see_only_the_text_before(corpus, swarm):
    router = Router.load(swarm.router_folder())
    tokens = list(("court judge appeal verdict statute court " + "lambda import class def return " * 5).encode())
    text = HeldOut("x", tokens)
    weight_TN = by_token(window_weights(router, corpus.tokenizer, text, 64), text, 64)
    assert weight_TN.shape == (len(tokens) - CONTEXT, 2)
    assert (weight_TN[:64] == weight_TN[0]).all() and (weight_TN[64:128] == weight_TN[64]).all()
    np.testing.assert_array_equal(weight_TN[0], router.weights(bytes(tokens[:CONTEXT]).decode()))
    assert weight_TN[0].argmax() != weight_TN[-1].argmax()


class Scored:
    """A member whose engine scores by one plain forward pass."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.context_tokens, self.engine = (
            store.load(path)[0],
            tokenizer,
            CONTEXT_TOKENS,
            self,
        )

    async def score(self, member: str, tokens: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            logprob_TV = self.model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
        return logprob_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("by", ["clusterer", "likelihood", "product"])
def test_the_endpoint_weighs_experts_as_the_table_does(corpus, swarm, by):
    router, eot_id = swarm.router(), corpus.tokenizer.eot_id
    members = {name: Scored(swarm.checkpoint(name), corpus.tokenizer) for name in ("e00", "e01")}
    texts = [HeldOut(t.domain, t.tokens[:CONTEXT_TOKENS]) for t in held_out(corpus, None)[:5]]
    scores = [score(member.model, texts, eot_id) for member in members.values()]

    async def weighed(text: HeldOut, start: int) -> list[float]:
        weighing = Weighing(SwarmContext(router), by, most=2)
        so_far = Text(corpus.tokenizer, (eot_id, *text.tokens[: start - 1]), (text.tokens[start - 1],))
        weights = (await weighing(so_far, members, Account("mixture", Budget()))).weights
        return [weights.get(name, 0.0) for name in router.ids]

    for index, text in enumerate(texts):
        logprob_TN = np.stack([of[index] for of in scores], axis=1)
        table_WN = window_weights(router, corpus.tokenizer, text, 8, by, logprob_TN, CONTEXT_TOKENS)
        served_WN = [asyncio.run(weighed(text, start)) for start in windows(text, 8)]
        np.testing.assert_allclose(served_WN, table_WN, atol=FP32_SUM_ORDER * CONTEXT_TOKENS)


def test_the_endpoint_and_the_table_send_the_same_text_to_the_seed(corpus, swarm):
    router = swarm.router()
    members = {name: Scored(swarm.checkpoint(name), corpus.tokenizer) for name in ("e00", "e01", "seed")}
    text = HeldOut("x", list(("court judge appeal verdict court judge " + "xyz uvw " * 12).encode()))
    router.far = [1.0] * 5  # which text that has as many unknown words as this is beyond
    table = far_tokens(router, corpus.tokenizer, text, 16)[::16]

    async def is_seed(start: int) -> bool:
        so_far = Text(corpus.tokenizer, tuple(text.tokens[:start]))
        weighing = Weighing(SwarmContext(router), "clusterer", most=1, seed=True)
        return set((await weighing(so_far, members, Account("route", Budget()))).weights) == {"seed"}

    assert [asyncio.run(is_seed(start)) for start in windows(text, 16)] == table.tolist()
    assert set(table.tolist()) == {True, False}


def test_a_swarm_without_controls_has_no_such_columns(corpus, swarm):
    lone = swarm.manifest.model_copy(update={"controls": type(swarm.manifest.controls)()})
    table = evaluate_swarm(Swarm(swarm.folder, lone), corpus, Evaluation(tokens_per_domain=300))
    mixtures = {"mixture", "mixture_likelihood", "mixture_product"}
    assert set(table["macro"]) == {"seed", "route", "oracle", *mixtures}
    assert table["perplexity_ratio"] == {}


def test_a_corpus_with_nothing_held_out_is_refused(tmp_path: Path, swarm):
    corpus = write_corpus(tmp_path, [("a", "train", "word " * 50), ("a", "test", "short")])
    with pytest.raises(CorpusError, match="no held-out document is longer than 32 tokens"):
        evaluate_swarm(swarm, corpus, Evaluation())
