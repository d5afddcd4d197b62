"""Soups: the experts' weights averaged into one model, a by-product that costs no training (arXiv 2203.05482).

Experts that began with the same seed can be averaged; how good that is says how far apart they have gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.corpus.clustering.assign import first_texts, located
from pipelines.corpus.clustering.embedding import in_training
from ulm import registry
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.swarm.router import Router

MAX_DOCUMENTS = 2_000  # of the training split, over which the router's mean posterior is taken; drawn by seed


def write(
    root: Path, name: str, experts: Mapping[str, Path], router: Router, corpus: Corpus, seed: int = 0
) -> dict[str, Path]:
    """Step directories of both soups by their column in the table, made now or as they were made before.

    `experts` are step directories by member id. soup_uniform weighs all the same, soup_router by `mean_posterior`;
    they are runs/<name>-soup-uniform and runs/<name>-soup-router.
    """
    posterior_N = mean_posterior(router, corpus, seed)
    weights = {"uniform": np.full(len(router.ids), 1 / len(router.ids)), "router": posterior_N}
    paths = [experts[member] for member in router.ids]
    return {
        f"soup_{kind}": _write(root / "runs" / f"{name}-soup-{kind}", paths, weight_N, corpus)
        for kind, weight_N in weights.items()
    }


def mean_posterior(router: Router, corpus: Corpus, seed: int = 0) -> NDArray[np.float64]:
    """The router's weights_N averaged over training documents, each weighing its tokens."""
    rows = np.flatnonzero(in_training(corpus))
    if len(rows) > MAX_DOCUMENTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_DOCUMENTS, replace=False))
    tokens = corpus.documents["num_tokens"].to_numpy()[rows]
    weights = [router.weights(text) for text in first_texts(corpus, located(corpus, rows))]
    return np.asarray(np.average(weights, axis=0, weights=tokens))


def average(checkpoints: list[Path], weight_N: NDArray[np.float64]) -> dict[str, Tensor]:
    """Weights by name, each sum_j w_j of the checkpoints' (summed in float64, kept in their dtype)."""
    total: dict[str, Tensor] = {}
    kept: dict[str, torch.dtype] = {}
    for folder, weight in zip(checkpoints, weight_N.tolist(), strict=True):
        for key, tensor in store.read_weights(folder).items():
            kept[key] = tensor.dtype
            total[key] = weight * tensor.double() + total.get(key, 0.0)
    return {key: tensor.to(kept[key]) for key, tensor in total.items()}


def _write(run: Path, checkpoints: list[Path], weight_N: NDArray[np.float64], corpus: Corpus) -> Path:
    """The soup as a checkpoint of the experts' step; one of other weights in its place is replaced."""
    folder, averaged = store.step_folder(run, store.step_of(checkpoints[0])), average(checkpoints, weight_N)
    if (folder / "manifest.json").is_file():
        if all(torch.equal(averaged[key], tensor) for key, tensor in store.read_weights(folder).items()):
            return folder
        store.remove(folder)
    spec = store.read_spec(checkpoints[0])
    model = registry.find("model", spec.model)(spec)
    with torch.no_grad():
        for key, tensor in store.tensors(model).items():
            tensor.copy_(averaged[key])
    lineage = {"run": run.name, "corpus_digest": corpus.digest}
    return store.save(model, corpus.tokenizer, folder, step=store.step_of(folder), **lineage)
