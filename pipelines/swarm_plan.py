"""What a swarm's training consists of: the seed, one expert per cluster, the controls, in equal shares of tokens.

The protocol is that of the comparison (c-BTM, arXiv 2303.14177, made equal in tokens): of the recipe's length the seed
takes `seed_share` at a constant rate after its warm-up, the experts share the rest equally; dense goes on from the seed
on all clusters for the sum of the experts' tokens with the same batch. Experts and dense begin with a fresh optimizer
and the same short warm-up, and fall linearly to a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.corpus.domains import Clusters, cluster_corpus
from pipelines.corpus.over import Over, Progress, one_by_one
from pipelines.train.task import TrainTask, resolve
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
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
    random: dict[str, TrainTask]  # experts of the random control

    def tasks(self) -> list[TrainTask]:
        """All runs, the seed first."""
        return [self.seed, *([self.dense] if self.dense else []), *self.experts.values(), *self.random.values()]


def plan_swarm(
    recipe: SwarmRecipe,
    *,
    root: Path,
    near: Path | None = None,
    over: Over = one_by_one,
    progress: Progress | None = None,
) -> Plan:
    """The runs that a recipe means, with its clusterings made or found. ConfigError where they cannot be trained.

    `over` and `progress`: for the clustering, see pipelines/corpus/over.py.
    """
    given = TrainingRecipe.model_fields.keys() & recipe.model_fields_set  # a preset proposes the rest
    shared = {field: getattr(recipe, field) for field in given}
    whole = resolve(TrainRecipe(**shared), root=root, near=near)
    expert_steps = round(whole.num_steps * (1 - recipe.seed_share)) // recipe.experts
    seed_steps = whole.num_steps - expert_steps * recipe.experts
    if expert_steps < 1 or seed_steps < 1:
        problem = f"{whole.num_steps} steps are too few for a seed and {recipe.experts} experts"
        raise ConfigError("train", problem, f"at least {4 * recipe.experts} steps, or fewer experts")
    if recipe.parallel and max(recipe.train.worker_counts) > 1:
        problem = f"runs go side by side with one worker each, but train.workers is {recipe.train.workers}"
        raise ConfigError("parallel", problem, "give one of the two")
    corpus = Corpus.read(whole.corpus, verify=False)  # `resolve` has read all of it

    def run(suffix: str, num_steps: int, decay_share: float, **changes: Any) -> TrainTask:
        name = f"{recipe.name}-{suffix}"
        fields = {"kind": "wsd", "warmup_steps": recipe.warmup_steps, "decay_share": decay_share}
        schedule = configure("schedule", fields)
        return replace(whole, run=name, folder=root / "runs" / name, num_steps=num_steps, schedule=schedule, **changes)

    to_its_end = whole.recipe.model_copy(update={"early_stopping": None})  # all others begin where it ends
    seed = run(SEED, seed_steps, 0.0, recipe=to_its_end)
    from_seed = store.step_folder(seed.folder, seed_steps)  # where its last checkpoint will be

    def experts(letter: str, clusters: Clusters) -> dict[str, TrainTask]:
        for cluster, tokens in enumerate(clusters.tokens):
            if tokens < whole.batch_tokens:
                problem = (
                    f"cluster {cluster} ({clusters.domains[cluster] or 'empty'}) has {tokens:,} training tokens, "
                    f"less than one batch of {whole.batch_tokens:,}"
                )
                raise ConfigError("experts", problem, "fewer experts, more text, or a smaller train.batch_tokens")
        return {
            f"e{c:02d}": run(
                f"{letter}{c:02d}", expert_steps, 1.0, init_from=from_seed, documents=clusters.documents(c)
            )
            for c in range(recipe.experts)
        }

    def clustered(kind: Literal["tf-idf", "random"]) -> Clusters:
        found = cluster_corpus(corpus, recipe.experts, recipe.clustering, kind=kind, over=over, progress=progress)
        if len(found.tokens) < recipe.experts:
            problem = f"{len(found.tokens)} clusters are left after merging, not {recipe.experts}"
            raise ConfigError("experts", problem, "so many experts, or a lower clustering.min_cluster_tokens")
        return found

    clusters, random_clusters, dense = clustered("tf-idf"), None, None
    if "random" in recipe.controls:
        random_clusters = clustered("random")
    if "dense" in recipe.controls:
        goes_on_at = seed_steps * whole.rows_per_batch  # it reads on where the seed stopped reading
        dense = run("dense", expert_steps * recipe.experts, 1.0, init_from=from_seed, start_cursor=goes_on_at)
    random = experts("r", random_clusters) if random_clusters else {}
    return Plan(corpus, clusters, random_clusters, seed, experts("e", clusters), dense, random)
