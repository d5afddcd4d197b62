"""The comparison that decides: bits per byte by domain for dense, route, mixture, and what stands beside them.

How it is scored, the same for every column: the first 32 tokens of a document are context and never scored, neither is
<|endoftext|>. A document is scored in pieces of the context's length, as training cuts it. Route and mixtures weigh the
experts anew every W tokens from the text before the window alone, by the same functions as the endpoint
(ulm/swarm/routing.py); p = sum_j w_j p_j in probability space.

Shape letters: T tokens of a document, N experts, W windows, B pieces, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ulm import artefacts
from ulm.checkpoints import store
from ulm.components.loss import nats_per_target
from ulm.corpus.manifest import Corpus
from ulm.errors import CorpusError
from ulm.recipes.train import Evaluation
from ulm.swarm.embed import MAX_CHARS
from ulm.swarm.manifest import SEED, Swarm
from ulm.swarm.mixture import mix_logprobs
from ulm.swarm.router import Router
from ulm.swarm.routing import By, chosen, weigh
from ulm.tokenizers.tokenizer import Tokenizer

PROTOCOL = 2  # raise it when the same swarm would get another table
CONTEXT = 32  # tokens of a document's beginning that nobody is scored on
MAX_DOCUMENT_SHARE = 10  # a document gives at most a tenth of its domain's tokens, so that no single one decides
BATCH_TOKENS = 4_096  # of one forward pass: more does not get faster on a CPU
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """A held-out document, or its beginning."""

    domain: str
    tokens: list[int]


def held_out(corpus: Corpus, tokens_per_domain: int | None) -> list[HeldOut]:
    """Documents to score: of each source its test split, its val split where it has no test.

    With a bound, documents are taken in the order of their ids' SHA-256 until a domain has that many scored tokens; one
    document gives at most a tenth of them, from its beginning.
    """
    rows = corpus.documents.select(["id", "source", "domain", "split", "first_token", "num_tokens"]).to_pylist()
    with_test = {row["source"] for row in rows if row["split"] == "test"}
    rows = [row for row in rows if row["split"] == ("test" if row["source"] in with_test else "val")]
    rows.sort(key=lambda row: artefacts.digest_bytes(str(row["id"]).encode()))
    left: dict[str, float] = {}
    chosen = []
    for row in rows:
        room = left.setdefault(row["domain"], tokens_per_domain or math.inf)
        share = math.inf if tokens_per_domain is None else max(1, tokens_per_domain // MAX_DOCUMENT_SHARE)
        num_scored = int(min(row["num_tokens"] - CONTEXT, room, share))
        if num_scored > 0:
            left[row["domain"]] -= num_scored
            tokens = corpus.tokens(row["split"]).read(row["first_token"], CONTEXT + num_scored)
            chosen.append(HeldOut(row["domain"], tokens.tolist()))
    missing = set(corpus.documents["domain"].unique().to_pylist()) - {text.domain for text in chosen}
    if missing:
        log.warning("no held-out document longer than %d tokens: %s", CONTEXT, ", ".join(sorted(missing)))
    return sorted(chosen, key=lambda text: text.domain)


@torch.no_grad()
def score(model: nn.Module, texts: Sequence[HeldOut], eot_id: int) -> list[NDArray[np.float64]]:
    """The model's logprob of every token of every text, as logprob_T each; float32 forward passes.

    A text is [EOT] t1 … tn; its piece j feeds positions jC … jC+C-1 and predicts the one after each (C: the context).
    """
    context: int = model.spec.context_tokens  # type: ignore[union-attr,assignment]
    device = next(model.parameters()).device
    model.eval()
    pieces = [
        (index, start, [eot_id, *text.tokens][start : start + context + 1])
        for index, text in enumerate(texts)
        for start in range(0, len(text.tokens), context)
    ]
    pieces.sort(key=lambda piece: -len(piece[2]))  # like lengths together: little padding
    result = [np.empty(len(text.tokens)) for text in texts]
    for batch in _batches(pieces):
        width = len(batch[0][2])
        tokens_BT = torch.tensor([tokens + [eot_id] * (width - len(tokens)) for *_, tokens in batch], device=device)
        x_BTD = model.hidden(tokens_BT[:, :-1])  # type: ignore[operator]
        nats_BT = nats_per_target(x_BTD, tokens_BT[:, 1:], model.head, model.spec.vocab_size).cpu()  # type: ignore[arg-type,union-attr]
        for (index, start, tokens), nats_T in zip(batch, nats_BT.double().numpy(), strict=True):
            result[index][start : start + len(tokens) - 1] = -nats_T[: len(tokens) - 1]
    return result


def _batches(pieces: list[tuple[int, int, list[int]]]) -> Iterator[list[tuple[int, int, list[int]]]]:
    start = 0
    while start < len(pieces):
        size = max(1, BATCH_TOKENS // len(pieces[start][2]))
        yield pieces[start : start + size]
        start += size


def windows(text: HeldOut, every_tokens: int) -> range:
    """Where each window of a text begins; the router is asked with what stands before."""
    return range(CONTEXT, len(text.tokens), every_tokens)


def text_before(tokenizer: Tokenizer, text: HeldOut, start: int) -> str:
    """The text before a window, or as much of its end as the router looks at."""
    # A character has at most 4 bytes and a token at least one, so this much surely holds it.
    return tokenizer.decode(text.tokens[max(0, start - 4 * MAX_CHARS) : start])


def window_weights(
    router: Router,
    tokenizer: Tokenizer,
    text: HeldOut,
    every_tokens: int,
    by: By = "clusterer",
    logprob_TN: NDArray[np.float64] | None = None,
    context_tokens: int = 1,
) -> NDArray[np.float64]:
    """Weights of the experts for each window, as weight_WN, each from the text before it.

    By likelihood or product, `logprob_TN` is what the experts gave every token of the text; as at the endpoint, those
    count that a model sees at once, which is the last `context_tokens` with <|endoftext|> at the text's beginning.
    """
    nats_TN = None if logprob_TN is None else np.concatenate([np.zeros_like(logprob_TN[:1]), logprob_TN]).cumsum(axis=0)
    found = []
    for start in windows(text, every_tokens):
        nats_N = None if nats_TN is None else nats_TN[start] - nats_TN[max(0, start - context_tokens + 1)]
        found.append(weigh(router, router.weights(text_before(tokenizer, text, start)), by, nats_N))
    return np.stack(found)


def by_token(window_WN: NDArray[np.float64], text: HeldOut, every_tokens: int) -> NDArray[np.float64]:
    """Weights of windows as weights of their scored tokens: weight_TN."""
    return window_WN.repeat(every_tokens, axis=0)[: len(text.tokens) - CONTEXT]


def mixed(logprob_TN: NDArray[np.float64], weight_TN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mixture's logprob of each token."""
    return np.asarray(mix_logprobs(torch.from_numpy(logprob_TN)[..., None], torch.from_numpy(weight_TN))[:, 0])


def evaluate_swarm(
    swarm: Swarm,
    corpus: Corpus,
    config: Evaluation,
    *,
    others: Mapping[str, Path] | None = None,
    device: torch.device | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The table of a swarm on its corpus: see `table`.

    Columns: dense, dense_flops, seed, those of `swarm_columns`, random (the mixture of the random control) and
    random_route (its route), and a model of its own for each step directory of `others`. A control that the swarm
    lacks has no column. `on_progress(model, done, models)` tells the caller how far it is.
    """
    router = swarm.router()
    assert router is not None, "a swarm that swarm train wrote has a router"
    texts = held_out(corpus, config.tokens_per_domain)
    if not texts:
        raise CorpusError(f"{corpus.folder}: no held-out document is longer than {CONTEXT} tokens; raise split.test")
    controls = swarm.manifest.controls
    dense = {"dense": controls.dense, "dense_flops": controls.dense_flops}
    alone = {name: swarm.path_of(entry) for name, entry in dense.items() if entry} | dict(others or {})
    if SEED in swarm.members:
        alone[SEED] = swarm.checkpoint(SEED)
    paths = {f"expert {name}": swarm.checkpoint(name) for name in router.ids} | alone
    if controls.random:
        paths |= {f"random {name}": swarm.path_of(entry) for name, entry in controls.random.members.items()}
    logprobs = {}
    for done, (name, path) in enumerate(paths.items(), start=1):
        model, _ = store.load(path, device)
        logprobs[name] = score(model, texts, corpus.tokenizer.eot_id)
        if on_progress:
            on_progress(name.removeprefix("expert "), done, len(paths))
    columns = {name: [logprob_T[CONTEXT:] for logprob_T in logprobs[name]] for name in alone}
    context_tokens = store.read_spec(swarm.checkpoint(router.ids[0])).context_tokens

    def of_swarm(of: str, router: Router) -> dict[str, list[NDArray[np.float64]]]:
        experts = [logprobs[f"{of} {name}"] for name in router.ids]
        return swarm_columns(texts, experts, router, corpus.tokenizer, config, context_tokens, columns.get(SEED))

    columns |= of_swarm("expert", router)
    if controls.random:
        control = of_swarm("random", swarm.open_router(controls.random.router))
        columns |= {"random": control["mixture"], "random_route": control["route"]}
    return table(texts, columns, corpus.tokenizer)


def swarm_columns(
    texts: Sequence[HeldOut],
    experts: Sequence[Sequence[NDArray[np.float64]]],
    router: Router,
    tokenizer: Tokenizer,
    config: Evaluation,
    context_tokens: int,
    seed: Sequence[NDArray[np.float64]] | None = None,
) -> dict[str, list[NDArray[np.float64]]]:
    """Logprobs of the scored tokens for route, mixtures and oracle, by the strategies' defaults at the endpoint.

    `route` is the router's best, or the seed where the text before is far from every cluster; `mixture` the top k by
    the clusterer, `mixture_likelihood` and `mixture_product` by what the experts made of the text; `oracle` the best
    expert of each document by its true loss. `experts` holds each expert's logprobs of all tokens, in router order,
    `seed` the seed's of the scored ones.
    """
    mixtures: dict[str, By] = {"mixture": "clusterer", "mixture_likelihood": "likelihood", "mixture_product": "product"}
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("route", *mixtures, "oracle")}
    for index, text in enumerate(texts):
        logprob_TN = np.stack([expert[index] for expert in experts], axis=1)
        scored_TN = logprob_TN[CONTEXT:]
        for name, by in mixtures.items():
            window_WN = window_weights(router, tokenizer, text, config.every_tokens, by, logprob_TN, context_tokens)
            most_WN = np.stack([chosen(weight_N, config.top_k) for weight_N in window_WN])
            columns[name].append(mixed(scored_TN, by_token(most_WN, text, config.every_tokens)))
            if by == "clusterer":
                best_WN = np.stack([chosen(weight_N, 1) for weight_N in window_WN])
                routed_T = mixed(scored_TN, by_token(best_WN, text, config.every_tokens))
                if seed is not None:
                    is_far_T = far_tokens(router, tokenizer, text, config.every_tokens)
                    routed_T = np.where(is_far_T, seed[index], routed_T)
                columns["route"].append(routed_T)
        columns["oracle"].append(scored_TN[:, scored_TN.sum(axis=0).argmax()])
    return columns


def far_tokens(router: Router, tokenizer: Tokenizer, text: HeldOut, every_tokens: int) -> NDArray[np.bool_]:
    """Which scored tokens lie in a window before which the text is far from every cluster."""
    is_far = [router.is_far(text_before(tokenizer, text, start)) for start in windows(text, every_tokens)]
    return np.array(is_far).repeat(every_tokens)[: len(text.tokens) - CONTEXT]


def table(
    texts: Sequence[HeldOut], columns: Mapping[str, Sequence[NDArray[np.float64]]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Figures of each column: by domain in bits per byte and nats per token, macro means, perplexity ratio to dense.

    {"bits_per_byte": {domain: {column: x}}, "nats_per_token": {…}, "macro": {column: {"bits_per_byte": x, …}},
    "perplexity_ratio": {column: exp(difference of macro-mean nats per token)}, "tokens": {domain: n}}
    """
    token_bytes = np.array([len(piece) for piece in tokenizer.token_bytes])
    domains = sorted({text.domain for text in texts})
    chosen = {domain: [i for i, text in enumerate(texts) if text.domain == domain] for domain in domains}
    tokens = {domain: sum(len(texts[i].tokens) - CONTEXT for i in chosen[domain]) for domain in domains}
    num_bytes = {d: sum(int(token_bytes[texts[i].tokens[CONTEXT:]].sum()) for i in chosen[d]) for d in domains}
    nats = {
        d: {name: -float(sum(column[i].sum() for i in chosen[d])) for name, column in columns.items()} for d in domains
    }
    per_token = {d: {name: total / tokens[d] for name, total in row.items()} for d, row in nats.items()}
    per_byte = {
        d: {name: total / (math.log(2) * num_bytes[d]) for name, total in row.items()} for d, row in nats.items()
    }
    macro = {
        name: {
            "bits_per_byte": float(np.mean([per_byte[d][name] for d in domains])),
            "nats_per_token": float(np.mean([per_token[d][name] for d in domains])),
        }
        for name in columns
    }
    ratios = {
        name: math.exp(macro[name]["nats_per_token"] - macro["dense"]["nats_per_token"])
        for name in columns
        if "dense" in columns and name != "dense"
    }
    return {
        "bits_per_byte": per_byte,
        "nats_per_token": per_token,
        "macro": macro,
        "perplexity_ratio": ratios,
        "tokens": tokens,
    }
