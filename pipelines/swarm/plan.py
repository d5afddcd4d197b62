"""What a swarm's training consists of: the seed, one expert per cluster, the controls, in equal shares of tokens.

The protocol is that of the comparison (c-BTM, arXiv 2303.14177, made equal in tokens): of the recipe's length the seed
takes `seed_share` at a constant rate after its warm-up, the experts share the rest equally; dense goes on from the seed
on all clusters for the sum of the experts' tokens with the same batch. Experts and dense begin with a fresh optimizer
and the same short warm-up, and fall linearly to a tenth.

With `reassign` an expert's tokens are halved over two passes: the first at a constant rate, over the clusters, the
second falling to a tenth, over what pipelines/swarm/reassign.py makes of them. `dense_flops` is a larger model, which
costs per token what a mixture costs, trained from scratch for the FLOPs of seed and experts together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.corpus.domains import Clusters, cluster_corpus
from pipelines.corpus.over import Over, Progress, one_by_one
from pipelines.swarm.widen import widened
from pipelines.train.task import TrainTask, resolve
from ulm import dial
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, on_meta, train_flops_per_token
from ulm.recipes.train import SwarmRecipe, TrainingRecipe, TrainRecipe
from ulm.registry import configure
from ulm.swarm.manifest import SEED


@dataclass(frozen=True)
class Plan:
    """Everything a swarm's training consists of, before any of it has run."""

    corpus: Corpus
    clusters: Clusters
    random_clusters: Clusters | None
    seed: TrainTask
    experts: dict[str, TrainTask]  # by member id
    dense: TrainTask | None
    dense_flops: TrainTask | None
    random: dict[str, TrainTask]  # experts of the random control
    second_steps: int = 0  # of each expert in a second pass, where `experts` is the first

    def tasks(self) -> list[TrainTask]:
        """All runs, the seed first; of experts with two passes the one that `experts` has."""
        dense = [task for task in (self.dense, self.dense_flops) if task]
        return [self.seed, *dense, *self.experts.values(), *self.random.values()]


def plan_swarm(
    recipe: SwarmRecipe,
    *,
    root: Path,
    near: Path | None = None,
    whole: TrainTask | None = None,
    over: Over = one_by_one,
    progress: Progress | None = None,
) -> Plan:
    """The runs that a recipe means, with its clusterings made or found. ConfigError where they cannot be trained.

    `whole` is the recipe's `whole_run`, for who has it. `over` and `progress`: see pipelines/corpus/over.py.
    """
    whole = whole or whole_run(recipe, root=root, near=near)
    seed_steps, expert_steps = _steps(recipe, whole)
    corpus = Corpus.read(whole.corpus, verify=False)  # `resolve` has read all of it

    def run(suffix: str, num_steps: int, decay_share: float, **changes: Any) -> TrainTask:
        return protocol_run(whole, recipe, suffix, num_steps, decay_share, **changes)

    to_its_end = whole.recipe.model_copy(update={"early_stopping": None})  # others begin where these end
    seed = run(SEED, seed_steps, 0.0, recipe=to_its_end)
    from_seed = store.step_folder(seed.folder, seed_steps)  # where its last checkpoint will be

    def experts(
        letter: str,
        clusters: Clusters,
        suffix: str = "",
        num_steps: int = expert_steps,
        decay_share: float = 1.0,
        **changes: Any,
    ) -> dict[str, TrainTask]:
        for cluster, tokens in enumerate(clusters.tokens):
            if tokens < whole.batch_tokens:
                problem = (
                    f"cluster {cluster} ({clusters.domains[cluster] or 'empty'}) has {tokens:,} training tokens, "
                    f"less than one batch of {whole.batch_tokens:,}"
                )
                raise ConfigError("experts", problem, "fewer experts, more text, or a smaller train.batch_tokens")
        changes = {"init_from": from_seed, **changes}
        return {
            f"e{c:02d}": run(
                f"{letter}{c:02d}{suffix}", num_steps, decay_share, documents=clusters.documents(c), **changes
            )
            for c in range(recipe.experts)
        }

    def clustered(kind: Literal["tf-idf", "random"]) -> Clusters:
        found = cluster_corpus(corpus, recipe.experts, recipe.clustering, kind=kind, over=over, progress=progress)
        if len(found.tokens) < recipe.experts:
            problem = f"{len(found.tokens)} clusters are left after merging, not {recipe.experts}"
            raise ConfigError("experts", problem, "so many experts, or a lower clustering.min_cluster_tokens")
        return found

    clusters, random_clusters, dense, dense_flops = clustered("tf-idf"), None, None, None
    if "random" in recipe.controls:
        random_clusters = clustered("random")
    if "dense" in recipe.controls:
        goes_on_at = seed_steps * whole.rows_per_batch  # it reads on where the seed stopped reading
        dense = run("dense", expert_steps * recipe.experts, 1.0, init_from=from_seed, start_cursor=goes_on_at)
    if "dense_flops" in recipe.controls:
        dense_flops = _dense_flops(whole, recipe)
    random = experts("r", random_clusters) if random_clusters else {}
    second_steps = expert_steps - expert_steps // 2 if recipe.reassign else 0
    if second_steps:
        of_experts = experts("e", clusters, "-first", expert_steps - second_steps, 0.0, recipe=to_its_end)
    else:
        of_experts = experts("e", clusters)
    return Plan(corpus, clusters, random_clusters, seed, of_experts, dense, dense_flops, random, second_steps)


def whole_run(recipe: SwarmRecipe, *, root: Path, near: Path | None = None) -> TrainTask:
    """One run as long as all of the swarm's; ConfigError for what is wrong with a recipe, before anything is made."""
    whole = resolve(one_run(recipe), root=root, near=near)
    seed_steps, expert_steps = _steps(recipe, whole)
    if expert_steps < 1 or seed_steps < 1:
        problem = f"{whole.num_steps} steps are too few for a seed and {recipe.experts} experts"
        raise ConfigError("train", problem, f"at least {4 * recipe.experts} steps, or fewer experts")
    if recipe.reassign and expert_steps < 2:
        problem = f"{whole.num_steps} steps leave one for each of {recipe.experts} experts, and it needs two passes"
        raise ConfigError("reassign", problem, "a longer training, or reassign: false")
    if recipe.parallel and max(recipe.train.worker_counts) > 1:
        problem = f"runs go side by side with one worker each, but train.workers is {recipe.train.workers}"
        raise ConfigError("parallel", problem, "give one of the two")
    return whole


def _steps(recipe: SwarmRecipe, whole: TrainTask) -> tuple[int, int]:
    """Of the seed, and of each expert."""
    expert_steps = round(whole.num_steps * (1 - recipe.seed_share)) // recipe.experts
    return whole.num_steps - expert_steps * recipe.experts, expert_steps


def one_run(recipe: SwarmRecipe) -> TrainRecipe:
    """The recipe of one run as long as all of a swarm's; the seed is its beginning."""
    # A preset proposes what is not given, and a checkpoint the model.
    given = (TrainingRecipe.model_fields.keys() | {"init_from"}) & recipe.model_fields_set
    return TrainRecipe(**{field: getattr(recipe, field) for field in given})


def protocol_run(
    like: TrainTask, swarm: SwarmRecipe, suffix: str, num_steps: int, decay_share: float, **changes: Any
) -> TrainTask:
    """A run of the swarm: `like` with another name, length and changes, at the protocol's schedule."""
    name = f"{swarm.name}-{suffix}"
    fields = {"kind": "wsd", "warmup_steps": swarm.warmup_steps, "decay_share": decay_share}
    schedule = configure("schedule", fields)
    folder = like.folder.parent / name
    return replace(like, run=name, folder=folder, num_steps=num_steps, schedule=schedule, **changes)


def _dense_flops(whole: TrainTask, recipe: SwarmRecipe) -> TrainTask:
    """The larger dense control: as many FLOPs in fewer steps, at the rate that its size asks for."""
    spec = widened(whole.spec, recipe.evaluation.top_k)
    small, large = on_meta(whole.spec), on_meta(spec)
    flops = [train_flops_per_token(model, whole.spec.context_tokens) for model in (small, large)]
    num_steps = max(1, round(whole.num_steps * flops[0] / flops[1]))
    falls = min(1.0, dial.lr(num_parameters(large)) / dial.lr(num_parameters(small)))
    optimizer = whole.optimizer.model_copy(update={"lr": whole.optimizer.lr * falls})  # type: ignore[attr-defined]
    return protocol_run(whole, recipe, "dense-flops", num_steps, 1.0, spec=spec, optimizer=optimizer, init_from=None)
