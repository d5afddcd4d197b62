"""The swarm job: a plan's runs by Ray Train, their swarm.json, and the table that compares them.

Every run is a run of `pipelines.train`, so a job that was stopped goes on where it was, and a finished one answers at
once. `python -m pipelines.swarm_job RECIPE` is `ulm swarm train` as a Ray job.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines.corpus.domains import Clusters
from pipelines.corpus.job import over_ray
from pipelines.evaluate import evaluate_swarm
from pipelines.swarm_plan import Plan, plan_swarm
from pipelines.train import folder, job
from pipelines.train.events import Event
from pipelines.train.task import Stage, TrainTask
from ulm import artefacts, registry, runtime
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, UlmError
from ulm.models.account import num_parameters
from ulm.recipes import load_recipe
from ulm.recipes.serve import Budget
from ulm.recipes.train import Evaluation, Resources, SwarmRecipe
from ulm.swarm.manifest import SEED, Part, Swarm, write_swarm

OnProgress = Callable[[str, int, int, dict[str, Any]], None]  # run, step, number of steps, figures
log = logging.getLogger(__name__)


def train_swarm(
    recipe: SwarmRecipe,
    *,
    root: Path,
    near: Path | None = None,
    on_progress: OnProgress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train, write and evaluate a swarm on the Ray cluster of this process, or go on where an earlier call stopped.

    Returns {"swarm", "digest", "experts", "bits_per_byte": {domain: {column: x, or None for a control not asked for}}}
    and more figures; or {"status": "interrupted", "runs"} after SIGINT or SIGTERM, when all runs have saved.
    """
    report = on_progress or (lambda run, step, num_steps, figures: None)

    def of_clustering(stage: str, done: int, total: int | None, note: str) -> None:
        report(stage, done, total or 1, {})

    plan = plan_swarm(recipe, root=root, near=near, over=over_ray(None), progress=of_clustering)
    tasks = plan.tasks()
    for task in tasks:
        folder.check(task)
        folder.write_recipe(task, recipe)
    stages = [Stage((plan.seed,)), Stage(tuple(tasks[1:]), side_by_side=max(recipe.train.worker_counts) == 1)]
    workers, resources = _room(recipe, plan)
    lines = job.run_stages(
        stages, name=recipe.name, workers=workers, resources=resources, on_progress=report, on_event=on_event
    )
    if any(line.get("status") == "interrupted" for line in lines):
        return {"status": "interrupted", "runs": [line["run"] for line in lines if line["checkpoint"]]}
    swarm = _write(recipe, plan, {line["run"]: Path(line["checkpoint"]) for line in lines}, root)
    return _summary(recipe, plan, swarm, _evaluated(swarm, plan.corpus, recipe.evaluation, report))


def _room(recipe: SwarmRecipe, plan: Plan) -> tuple[int, Resources]:
    """Workers for the whole job and what each is given. The seed is trained by all of them, then each takes runs alone.

    With `train.workers` above 1 every run has all of these workers, one run after another.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 1.0), have.get("GPU", 0.0)
    given, gpus_per_worker = recipe.resources, recipe.resources.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus >= 1 else 0.0
    workers = max(recipe.train.worker_counts)
    if workers == 1:
        steps = [task.num_steps for task in plan.tasks()[1:]]
        fit = cpus / (given.cpus_per_worker or 1.0)
        if gpus_per_worker:
            fit = min(fit, gpus / gpus_per_worker)
        else:  # more lanes than this end no sooner than the longest run, and each would have fewer threads
            fit = min(fit, -(-sum(steps) // max(steps)))
        workers = max(1, min(len(steps), recipe.parallel or int(fit)))
        while plan.seed.rows_per_batch % workers:  # the seed's batches are shared equally
            workers -= 1
    cpus_per_worker = given.cpus_per_worker or max(1.0, float(cpus // workers))
    return workers, Resources(cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)


def _write(recipe: SwarmRecipe, plan: Plan, checkpoints: dict[str, Path], root: Path) -> Swarm:
    """The trained runs as one swarm, under the recipe's name."""

    def parts(tasks: dict[str, TrainTask], clusters: Clusters) -> dict[str, Part]:
        return {
            member: Part(checkpoints[task.run], cluster, clusters.domains[cluster])
            for cluster, (member, task) in enumerate(tasks.items())
        }

    random = plan.random_clusters
    return write_swarm(
        root,
        recipe.name,
        members={**parts(plan.experts, plan.clusters), SEED: Part(checkpoints[plan.seed.run])},
        router=plan.clusters.folder,
        strategy={"kind": "mixture", "top_k": recipe.evaluation.top_k, "every_tokens": recipe.evaluation.every_tokens},
        budget=Budget(),
        tokenizer_digest=plan.corpus.tokenizer.digest,
        corpus_digest=plan.corpus.digest,
        dense=checkpoints[plan.dense.run] if plan.dense else None,
        random=(parts(plan.random, random), random.folder) if random else None,
    )


def _evaluated(swarm: Swarm, corpus: Corpus, config: Evaluation, on_progress: OnProgress) -> dict[str, Any]:
    """The swarm's table, kept beside swarm.json and read from there the next time."""
    place = swarm.folder / "evaluation.json"
    asked = {"config": config.model_dump(), "corpus": corpus.digest}
    if place.is_file():
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["asked"] == asked and kept["digest"] == artefacts.digest_json(kept["table"]):
            return dict(kept["table"])

    def report(model: str, done: int, num_models: int) -> None:
        on_progress("evaluation", done, num_models, {"model": model})

    table = evaluate_swarm(swarm, corpus, config, device=runtime.device(), on_progress=report)
    artefacts.write_json(place, {"asked": asked, "digest": artefacts.digest_json(table), "table": table})
    return table


def _summary(recipe: SwarmRecipe, plan: Plan, swarm: Swarm, table: dict[str, Any]) -> dict[str, Any]:
    """The job's last line."""
    compared = ["dense", "route", "mixture", *(["random"] if plan.random else [])]
    rows = table["bits_per_byte"].items()
    tokens = {task.run: task.num_steps * task.batch_tokens for task in (plan.seed, *plan.experts.values())}
    with torch.device("meta"):
        parameters = num_parameters(registry.find("model", plan.seed.spec.model)(plan.seed.spec))
    return {
        "swarm": str(swarm.folder),
        "digest": swarm.digest,
        "experts": recipe.experts,
        "bits_per_byte": {domain: {column: row.get(column) for column in compared} for domain, row in rows},
        "perplexity_ratio": table["perplexity_ratio"],  # to dense; also of the seed and the oracle
        "macro": table["macro"],
        "scored_tokens": table["tokens"],
        "parameters": parameters,
        "tokens_per_parameter": sum(tokens.values()) / parameters,
        "train_tokens": tokens,
        "clusters": {
            member: {"domain": plan.clusters.domains[c], "train_tokens": plan.clusters.tokens[c]}
            for c, member in enumerate(plan.experts)
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipelines.swarm_job RECIPE [--set a.b=value]`, as `ray job submit` runs it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pipelines.swarm_job", description="Train a swarm from a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        recipe = load_recipe("swarm train", given.recipe, given.overrides)
        assert isinstance(recipe, SwarmRecipe)
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        torch.set_num_threads(runtime.num_cpus())  # Ray sets one thread for a submitted job's driver, which evaluates
        line = train_swarm(recipe, root=runtime.root(), near=given.recipe.parent)
    except ConfigError as error:
        log.error("%s", error)
        return job.EXIT_WRONG_RECIPE
    except UlmError as error:
        log.error("%s", error)
        return job.EXIT_FAILED
    sys.stdout.write(json.dumps(line) + "\n")
    return job.EXIT_INTERRUPTED if "status" in line else 0


if __name__ == "__main__":
    sys.exit(main())
