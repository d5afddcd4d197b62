"""What training a swarm by a recipe would come to, before anything is trained: the answer of `ulm swarm plan`.

Shape letters: C clusters, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus.over import Over, Progress, one_by_one
from pipelines.swarm.plan import Plan, one_run, plan_swarm
from pipelines.swarm.rule import Forecast, Rule, Setting
from pipelines.swarm.slots import shape, slots
from pipelines.train import folder
from pipelines.train.plan import MANY_EPOCHS
from pipelines.train.plan import plan as plan_one
from ulm import artefacts, runtime
from ulm.corpus.manifest import Corpus
from ulm.models.account import num_parameters, on_meta, train_flops_per_token
from ulm.recipes.train import Resources, SwarmRecipe

MOST_TOKENS = 20_000_000  # counted: their words say enough of any corpus, and are read in a second
SAMPLE_SEED = 0
DIGITS = 2  # of advice: a forecast has no more


def forecast_swarm(
    recipe: SwarmRecipe,
    *,
    root: Path,
    near: Path | None = None,
    over: Over = one_by_one,
    progress: Progress | None = None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """The figures of `ulm swarm plan`. Mistakes in the recipe are raised as training would raise them.

    The clustering is made where it was not found, and kept: training takes it up. Time is measured in a trial of some
    seconds on this machine, without Ray.
    """
    known = _clusterings(root, recipe, near)
    plan, rule = plan_swarm(recipe, root=root, near=near, over=over, progress=progress), rule or Rule.fit()
    count_CV = counts(plan)
    parameters = num_parameters(on_meta(plan.seed.spec))
    tokens = sum(task.num_steps * task.batch_tokens for task in _swarm(plan))
    setting = Setting(
        tokens_per_parameter=tokens / parameters,
        experts=recipe.experts,
        information=information(count_CV),
        seed_share=recipe.seed_share,
        parameters=float(parameters),
    )
    ahead = rule.forecast(setting)
    found = {
        "swarm": recipe.name,
        "experts": recipe.experts,
        "clusters": _clusters(plan),
        "clusters_found_before": plan.clusters.folder.name in known,
        "information": setting.information,
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": setting.tokens_per_parameter,
        "forecast": asdict(ahead),
        "pays_from_tokens_per_parameter": rule.pays_from(setting),
        "verdict": verdict(ahead),
        "advice": list(advice(rule, setting, count_CV)),
        **_cost(recipe, plan, root, near),
    }
    return {**found, "remarks": list(_remarks(found))}


def counts(plan: Plan) -> NDArray[np.float64]:
    """How often each word of the vocabulary stands in each cluster's training text, as count_CV, of a sample."""
    corpus, cluster_N = plan.corpus, plan.clusters.cluster_N
    table = corpus.documents
    chosen = np.flatnonzero((np.array(table["split"].to_pylist()) == "train") & (cluster_N >= 0))
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(chosen)
    firsts, numbers = (table[name].to_numpy() for name in ("first_token", "num_tokens"))
    chosen = chosen[: 1 + int(np.searchsorted(np.cumsum(numbers[chosen]), MOST_TOKENS))]
    count_CV = np.zeros((len(plan.clusters.tokens), corpus.tokenizer.vocab_size))
    read = corpus.tokens("train").read
    for document in np.sort(chosen):
        words, times = np.unique(read(int(firsts[document]), int(numbers[document])), return_counts=True)
        count_CV[cluster_N[document], words] += times
    return count_CV


def information(count_CV: NDArray[np.float64]) -> float:
    """Nats that the cluster of a token's text says of the token: the gain of unigram models, one for each cluster.

    The mutual information of cluster and token, less what a sample of this size shows of clusters that are all alike
    (Miller and Madow's correction); never below 0.
    """
    total = count_CV.sum()
    if not total:
        return 0.0
    share_CV = count_CV / total
    alike_CV = share_CV.sum(axis=1, keepdims=True) * share_CV.sum(axis=0)
    seen = share_CV > 0
    nats = float((share_CV[seen] * np.log(share_CV[seen] / alike_CV[seen])).sum())
    num_clusters, num_words = (int(np.count_nonzero(count_CV.sum(axis=axis))) for axis in (1, 0))
    return max(0.0, nats - (num_clusters - 1) * (num_words - 1) / (2 * float(total)))


def merged(count_CV: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The counts with one cluster fewer each time, down to two: those two are joined that this costs least."""
    while len(count_CV) > 2:
        pairs = [(a, b) for a in range(len(count_CV)) for b in range(a)]
        count_CV = max((_joined(count_CV, a, b) for a, b in pairs), key=information)
        yield count_CV


def _joined(count_CV: NDArray[np.float64], a: int, b: int) -> NDArray[np.float64]:
    both_CV = np.delete(count_CV, a, axis=0)
    both_CV[b] += count_CV[a]
    return both_CV


def verdict(ahead: Forecast) -> str:
    """What the forecast says, in a sentence."""
    says = f"perplexity {ahead.ratio:.2f} of one dense model's, between {ahead.low:.2f} and {ahead.high:.2f}"
    if not ahead.is_sure:
        return f"too close to call: {says}"
    return f"a swarm will pay: {says}" if ahead.ratio < 1 else f"a swarm will not pay, train one model: {says}"


def advice(rule: Rule, setting: Setting, count_CV: NDArray[np.float64]) -> Iterator[str]:
    """What would make it pay, where it does not; each in the rule's own terms."""
    now = rule.forecast(setting)
    if now.high < 1:
        return
    if (needed := rule.pays_from(setting)) is None:
        yield "more tokens would not help: the clusters of this text are too much alike for experts to gain"
    elif needed > setting.tokens_per_parameter:
        tokens = _rounded(needed * setting.parameters)
        yield f"more tokens: a swarm is ahead from about {needed:.3g} per parameter, {tokens:,} in all"
        smaller = _rounded(setting.tokens_per_parameter * setting.parameters / needed)
        yield f"or a smaller model: about {smaller:,} parameters for as many tokens"
    ratios = {setting.experts: now.ratio}
    for fewer_CV in merged(count_CV):
        ratios[len(fewer_CV)] = rule.forecast(
            replace(setting, experts=len(fewer_CV), information=information(fewer_CV))
        ).ratio
    best = min(ratios, key=ratios.__getitem__)
    if best != setting.experts and ratios[best] < 1:
        yield f"or fewer experts: {best} would come to about {ratios[best]:.2f}"


def _rounded(number: float) -> int:
    return int(float(f"{number:.{DIGITS}g}"))


def _swarm(plan: Plan) -> list[Any]:
    """Seed and experts, as what they take in all: an expert of two passes twice."""
    experts = [replace(task, num_steps=task.num_steps + plan.second_steps) for task in plan.experts.values()]
    return [plan.seed, *experts]


def _clusterings(root: Path, recipe: SwarmRecipe, near: Path | None) -> set[str]:
    """The names of those that the corpus has."""
    corpus = Corpus.open(recipe.corpus, root=root, near=near, place="corpus", verify=False)
    return {place.name for place in corpus.folder.glob("domains/*")}


def _clusters(plan: Plan) -> list[dict[str, Any]]:
    """Each expert's cluster: what it is of, its words, its size, and how often the expert reads it."""
    described = artefacts.read_manifest(plan.clusters.folder, "clustering")["clusters"]
    return [
        {
            "member": member,
            "domain": cluster["domain"],
            "words": cluster["words"],
            "train_tokens": cluster["tokens"]["train"],
            "epochs": task.num_steps * task.batch_tokens / cluster["tokens"]["train"],
        }
        for (member, task), cluster in zip(zip(plan.experts, _swarm(plan)[1:], strict=True), described, strict=True)
    ]


def _cost(recipe: SwarmRecipe, plan: Plan, root: Path, near: Path | None) -> dict[str, Any]:
    """Time, memory and disk on this machine; the controls that the recipe asks for are part of it."""
    # under a name of its own, so that no run is taken for this one
    changes = {"name": f"{recipe.name}-planned", "resources": Resources()}
    one = plan_one(one_run(recipe).model_copy(update=changes), root=root, near=near)
    small = train_flops_per_token(on_meta(plan.seed.spec), plan.seed.spec.context_tokens)
    steps = 0.0  # of the seed's model
    tasks = [*_swarm(plan), *(task for task in plan.tasks() if task not in [plan.seed, *plan.experts.values()])]
    for task in tasks:
        left = 0 if folder.is_finished(task) else task.num_steps - folder.newest_step(task)[1]
        steps += left * train_flops_per_token(on_meta(task.spec), task.spec.context_tokens) / small
    gpus = torch.cuda.device_count() if runtime.device().type == "cuda" else 0
    node = {"CPU": float(runtime.num_cpus()), "GPU": float(gpus)}
    most = recipe.parallel or len(tasks) - 1
    side_by_side = slots([node], shape([node], recipe.resources, most), recipe.resources, most).all
    passes = _scored_tokens(recipe, plan.corpus) * len(tasks) / plan.seed.batch_tokens / 3  # a third of a step each
    seconds = (steps + passes) * one["seconds_per_step"] / max(1, min(gpus, side_by_side))
    memory, disk = one["memory"], one["disk"]
    return {
        "runs": len(tasks),
        "side_by_side": side_by_side,
        "device": one["device"],
        "seconds_per_step": one["seconds_per_step"],
        "seconds": seconds,
        "memory": {"worker": memory["total"], "total": memory["total"] * side_by_side, "free": memory["free"]},
        "disk": {"total": disk["checkpoint"] * (disk["kept"] + 1) * len(tasks), "free": disk["free"]},
    }


def _scored_tokens(recipe: SwarmRecipe, corpus: Corpus) -> int:
    """Held-out tokens that the table needs of every model, at most."""
    held_out = corpus.num_tokens("test") or corpus.num_tokens("val")
    per_domain = recipe.evaluation.tokens_per_domain
    return held_out if per_domain is None else min(held_out, per_domain * len(corpus.documents["domain"].unique()))


def _remarks(found: dict[str, Any]) -> Iterator[str]:
    """What a person should think of before starting this."""
    often = [cluster for cluster in found["clusters"] if cluster["epochs"] > MANY_EPOCHS]
    if often:
        most = max(often, key=lambda cluster: cluster["epochs"])
        yield f"{most['member']} reads its cluster {most['epochs']:.1f} times: from {MANY_EPOCHS} on little is new"
    if found["memory"]["total"] > found["memory"]["free"]:
        yield "memory is short: fewer runs at a time (parallel), or a smaller train.micro_batch_rows"
    if found["disk"]["total"] > found["disk"]["free"]:
        yield "the disk is too small for the checkpoints: a smaller train.keep_last"
