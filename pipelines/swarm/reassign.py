"""The second pass: each training document goes to the expert that likes it best, and the router learns who that is.

DiPaCo (arXiv 2403.10616, section 2): clusters of words are where experts begin; what they have learned since says
better than words do which of them a text is for. The experts' first pass ends at a constant rate; the documents are
scored, a linear head over the router's embedding learns the answers, and the second pass goes on with each expert's
weights over its new documents, falling to a tenth.

Shape letters: N documents that are scored, M passages the head learns from, C clusters, K clusters of a document,
D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipelines.corpus import domains
from pipelines.corpus.clustering import kmeans
from pipelines.corpus.clustering.assign import embed_texts, first_texts, located
from pipelines.corpus.clustering.embedding import MAX_FIT_DOCUMENTS, Sample, in_training
from pipelines.corpus.clustering.passages import Passages
from pipelines.corpus.domains import Clusters, Fit
from pipelines.corpus.over import Progress, silent
from pipelines.swarm.evaluate import CONTEXT, HeldOut, score
from pipelines.swarm.plan import Plan, protocol_run
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.recipes.clustering import Clustering
from ulm.recipes.train import SwarmRecipe
from ulm.swarm.router import Router

SCORED_TOKENS = 256  # of a document, after the CONTEXT that nobody is scored on
ALGORITHM = 1  # part of the digest: raise it when the same experts would give other clusters


def second_pass(
    plan: Plan, recipe: SwarmRecipe, *, progress: Progress | None = None, device: torch.device | None = None
) -> Plan:
    """The plan whose experts are the second pass, over documents re-assigned by the trained experts of `plan`.

    The new clustering is stored beside the first one, and found there the next time.
    """
    trained = [store.step_folder(task.folder, task.num_steps) for task in plan.experts.values()]
    at_least = max(recipe.clustering.min_cluster_tokens, plan.seed.batch_tokens)
    clusters = reassign(plan.corpus, plan.clusters, trained, recipe.clustering, at_least, progress or silent, device)
    experts = {}
    for cluster, ((member, first), checkpoint) in enumerate(zip(plan.experts.items(), trained, strict=True)):
        experts[member] = protocol_run(
            first,
            recipe,
            member,
            plan.second_steps,
            1.0,
            recipe=first.recipe.model_copy(update={"early_stopping": recipe.early_stopping}),
            documents=clusters.documents(cluster),
            init_from=checkpoint,
            start_cursor=first.num_steps * first.rows_per_batch,  # an expert whose documents stay reads on
        )
    return replace(plan, clusters=clusters, experts=experts, second_steps=0)


def reassign(
    corpus: Corpus,
    first: Clusters,
    experts: Sequence[Path],
    config: Clustering,
    min_cluster_tokens: int,
    progress: Progress = silent,
    device: torch.device | None = None,
) -> Clusters:
    """The clustering by what the experts (their step directories, in cluster order) make of the documents.

    A training document goes to the expert that gives its first SCORED_TOKENS after CONTEXT the highest likelihood; of
    more than MAX_FIT_DOCUMENTS a part is scored, chosen by seed, and the others go where the new router sends them, as
    do short documents and those of other splits. A cluster that would have fewer than `min_cluster_tokens` is left as
    it was. Documents of which the router knows no word stay where they were.
    """
    identity = {
        "algorithm": ALGORITHM,
        "kind": "reassigned",
        "corpus": corpus.digest,
        "first": first.digest,
        "experts": [read_manifest(folder).digest for folder in experts],
        "config": config.model_dump(include=set(Clustering.model_fields)),
        "min_cluster_tokens": min_cluster_tokens,
    }
    digest = artefacts.digest_json(identity)
    folder = corpus.folder / "domains" / digest
    if not folder.is_dir():
        rows = _to_score(corpus, config.seed)
        nats_NC = _likelihoods(corpus, rows, experts, progress, device)
        progress("fit the router", 0, 1, "")
        with threadpool_limits(1):  # the last bits of a matrix product depend on the number of threads
            made = _fit(corpus, first, Router.load(first.folder), rows, nats_NC, config, min_cluster_tokens)
        progress("fit the router", 1, 1, "")
        domains.write_clusters(corpus, made, {"digest": digest, **identity}, folder)
    return domains.load_clusters(folder)


def _to_score(corpus: Corpus, seed: int) -> NDArray[np.int64]:
    """Training documents that have something to score, as rows of documents.parquet in their order."""
    tokens_N = corpus.documents["num_tokens"].to_numpy()
    rows = np.flatnonzero(in_training(corpus) & (tokens_N > CONTEXT))
    if len(rows) > MAX_FIT_DOCUMENTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_FIT_DOCUMENTS, replace=False))
    return rows


def _likelihoods(
    corpus: Corpus, rows: NDArray[np.int64], experts: Sequence[Path], progress: Progress, device: torch.device | None
) -> NDArray[np.float64]:
    """Mean logprob of each document's scored tokens by each expert, as nats_NC."""
    columns = corpus.documents.select(["first_token", "num_tokens"]).take(rows).to_pydict()
    reader = corpus.tokens("train")
    texts = [
        HeldOut("", reader.read(first, min(count, CONTEXT + SCORED_TOKENS)).tolist())
        for first, count in zip(columns["first_token"], columns["num_tokens"], strict=True)
    ]
    nats_NC = np.empty((len(rows), len(experts)))
    for cluster, folder in enumerate(experts):
        progress("score documents", cluster, len(experts), "")
        model, _ = store.load(folder, device)
        nats_NC[:, cluster] = [found[CONTEXT:].mean() for found in score(model, texts, corpus.tokenizer.eot_id)]
    progress("score documents", len(experts), len(experts), "")
    return nats_NC


def _fit(
    corpus: Corpus,
    first: Clusters,
    router: Router,
    rows: NDArray[np.int64],
    nats_NC: NDArray[np.float64],
    config: Clustering,
    min_cluster_tokens: int,
) -> Fit:
    """The new clusters and their router; see `reassign`."""
    sample = _sample(corpus, router, rows, config.seed)
    nats_NC = nats_NC[np.isin(rows, sample.rows)]
    others = np.setdiff1d(np.arange(corpus.documents.num_rows), sample.rows)
    other_h_ND = embed_texts(router.embedder, first_texts(corpus, located(corpus, others)))
    kept: set[int] = set()  # clusters that are left as they were
    while True:
        before_N = first.cluster_N
        own_N2, margin_N = _two_best(nats_NC, before_N[sample.rows], kept)
        head = domains.head_of(sample, own_N2[:, 0], len(router.ids))
        other_N2, other_margin_N = _two_best(other_h_ND @ head.matrix_ND.T + head.bias_N, before_N[others], kept)
        unknown_N = ~other_h_ND.any(axis=1)
        other_N2[unknown_N] = np.stack([before_N[others][unknown_N], np.full(unknown_N.sum(), -1)], axis=1)
        assigned_NK = np.empty((corpus.documents.num_rows, 2 if config.overlap else 1), dtype=np.int32)
        assigned_NK[sample.rows] = domains.with_overlap(own_N2, margin_N, config.overlap)
        assigned_NK[others] = domains.with_overlap(other_N2, other_margin_N, config.overlap)
        for cluster in kept:
            _restore(assigned_NK, first.assigned_NK, cluster)
        tokens_C = domains.train_tokens(corpus, assigned_NK, len(router.ids))
        small = {int(c) for c in np.flatnonzero(tokens_C < min_cluster_tokens)} - kept
        if not small:
            break
        kept |= small
    means_CD = kmeans.means(sample.h_ND, sample.tokens_N, own_N2[:, 0], router.centroids_ND)
    learned = config.model_copy(update={"router": "linear"})  # centroids of words cannot say what experts like
    new = domains.router_of(corpus, router.embedder, domains.stored(means_CD), assigned_NK, sample, learned)
    return Fit(new, assigned_NK, sample)


def _sample(corpus: Corpus, router: Router, rows: NDArray[np.int64], seed: int) -> Sample:
    """Those of the scored documents that have a known word, embedded, with passages of them."""
    tokens_N = corpus.documents["num_tokens"].to_numpy()[rows]
    passages = Passages(tokens_N, seed)
    h_ND = embed_texts(router.embedder, passages.of(first_texts(corpus, located(corpus, rows))))
    return Sample.of(router.embedder, rows, h_ND, tokens_N, passages)


def _two_best(
    score_NC: NDArray[np.float64], before_N: NDArray[Any], kept: set[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The two clusters of the highest score of each document, and by how much the first leads.

    Of the clusters that are `kept` as they were, only their own documents are, and these go nowhere else.
    """
    score_NC = score_NC.copy()
    for cluster in kept:
        score_NC[:, cluster] = np.where(before_N == cluster, np.inf, -np.inf)
    order_NC = np.argsort(-score_NC, axis=1, kind="stable")[:, :2]
    two_N2 = np.full((len(score_NC), 2), -1)
    two_N2[:, : order_NC.shape[1]] = order_NC
    best_NC = np.take_along_axis(score_NC, order_NC, axis=1)
    margin_N = best_NC[:, 0] - best_NC[:, -1]
    two_N2[~np.isfinite(margin_N), 1] = -1  # no second: all others are kept as they were
    return two_N2, margin_N


def _restore(assigned_NK: NDArray[np.int32], before_NK: NDArray[np.int32], cluster: int) -> None:
    """Let those documents, and only those, be in a cluster as their second that were before."""
    if assigned_NK.shape[1] == 2:
        was_second_N = (before_NK[:, 1] == cluster) & (assigned_NK[:, 0] != cluster)
        assigned_NK[assigned_NK[:, 1] == cluster, 1] = -1
        assigned_NK[was_second_N, 1] = cluster
