"""The swarm job: the seed by Ray Train, all other runs by a queue of workers, swarm.json, and the table that compares.

Every run is a run of `pipelines.train`, so a job that was stopped goes on where it was, and a finished one answers at
once. `python -m pipelines.swarm.job RECIPE` is `ulm swarm train` as a Ray job.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines import job as submitted
from pipelines.corpus.domains import Clusters
from pipelines.corpus.job import over_ray
from pipelines.swarm import soup
from pipelines.swarm.evaluate import PROTOCOL, evaluate_swarm
from pipelines.swarm.plan import Plan, plan_swarm
from pipelines.swarm.reassign import second_pass
from pipelines.swarm.workers_job import failed, train_all
from pipelines.train import folder, job
from pipelines.train.events import Event
from pipelines.train.task import TrainTask
from ulm import artefacts, runtime
from ulm.corpus.manifest import Corpus
from ulm.errors import TrainingError
from ulm.models.account import num_parameters, on_meta, train_flops_per_token
from ulm.recipes.serve import Budget
from ulm.recipes.train import Evaluation, SwarmRecipe
from ulm.swarm.manifest import SEED, Part, Swarm, checkpoint_digest, write_swarm

OnProgress = Callable[[str, int, int, dict[str, Any]], None]  # run, step, number of steps, figures
log = logging.getLogger(__name__)


def train_swarm(
    recipe: SwarmRecipe,
    *,
    root: Path,
    near: Path | None = None,
    whole: TrainTask | None = None,
    on_progress: OnProgress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train, write and evaluate a swarm on the Ray cluster of this process, or go on where an earlier call stopped.

    Returns {"swarm", "digest", "experts", "bits_per_byte": {domain: {column: x, or None for a control not asked for}}}
    and more figures; or {"status": "interrupted", "runs"} after SIGINT or SIGTERM, when all runs have saved.
    TrainingError names the runs that cannot go on, when all others are done.
    """
    report = on_progress or (lambda run, step, num_steps, figures: None)

    def of_clustering(stage: str, done: int, total: int | None, note: str) -> None:
        report(stage, done, total or 1, {})

    plan = plan_swarm(recipe, root=root, near=near, whole=whole, over=over_ray(None), progress=of_clustering)
    _check(recipe, plan.tasks())
    _train_seed(recipe, plan, report, on_event)
    if not folder.is_finished(plan.seed):
        return _interrupted(plan.tasks())
    _train_others(recipe, plan, report, on_event)
    if not all(folder.is_finished(task) for task in plan.tasks()):
        return _interrupted(plan.tasks())
    first_pass = list(plan.experts.values()) if plan.second_steps else []
    if first_pass:
        plan = second_pass(plan, recipe, progress=of_clustering, device=runtime.device())
        _check(recipe, list(plan.experts.values()))
        _train_others(recipe, plan, report, on_event)
        if not all(folder.is_finished(task) for task in plan.tasks()):
            return _interrupted(plan.tasks())
    swarm = _write(recipe, plan, {task.run: _result(task) for task in plan.tasks()}, root)
    soups = _soups(recipe, plan, swarm, root)
    table = _evaluated(swarm, plan.corpus, recipe.evaluation, soups, report)
    return _summary(recipe, plan, swarm, table, [plan.seed, *first_pass, *plan.experts.values()])


def _check(recipe: SwarmRecipe, tasks: Sequence[TrainTask]) -> None:
    """ConfigError where a folder holds another run of that name; else each gets its recipe."""
    for task in tasks:
        folder.check(task)
        folder.write_recipe(task, recipe)


def _interrupted(tasks: Sequence[TrainTask]) -> dict[str, Any]:
    """The job's last line when it was asked to stop: the runs that have saved."""
    return {"status": "interrupted", "runs": [task.run for task in tasks if folder.newest_step(task)[0]]}


def _result(task: TrainTask) -> Path:
    found = folder.result(task)
    assert found is not None, "a finished run has a checkpoint"
    return found


def _train_seed(
    recipe: SwarmRecipe, plan: Plan, report: OnProgress, on_event: Callable[[str, Event], None] | None
) -> None:
    """The seed by as many workers as will train the other runs, where its batches can be shared out equally.

    With `train.workers` above 1 by so many.
    """
    workers, resources = recipe.train.worker_counts, recipe.resources
    if max(workers) == 1:
        have = ray.cluster_resources()
        gpus = have.get("GPU", 0.0)
        wanted = resources.gpus_per_worker
        each = float(gpus >= 1) if wanted is None else float(math.ceil(wanted))  # two workers cannot share one in DDP
        fit = gpus / each if each else have.get("CPU", 1.0) / (resources.cpus_per_worker or 1.0)
        number = max(1, min(len(plan.tasks()) - 1, recipe.parallel or int(fit), int(fit)))
        while plan.seed.rows_per_batch % number:
            number -= 1
        workers = range(number, number + 1)
        resources = resources.model_copy(update={"gpus_per_worker": each})
    report(plan.seed.run, folder.newest_step(plan.seed)[1], plan.seed.num_steps, {})  # workers take a while to start
    job.run_task(
        plan.seed,
        workers=workers,
        resources=resources,
        on_progress=lambda *told: report(plan.seed.run, *told),
        on_event=on_event,
    )


def _train_others(
    recipe: SwarmRecipe, plan: Plan, report: OnProgress, on_event: Callable[[str, Event], None] | None
) -> None:
    """All runs but the seed, from where they stand, until they end or are asked to stop.

    TrainingError, when the others are done, where one cannot go on.
    """
    tasks, priorities = plan.tasks()[1:], _priorities(recipe, plan)
    if max(recipe.train.worker_counts) > 1:
        tasks.sort(key=lambda task: -priorities.get(task.run, 0))
        _one_by_one(recipe, tasks, report, on_event)
        return
    train_all(
        tasks,
        name=recipe.name,
        priorities=priorities,
        resources=recipe.resources,
        parallel=recipe.parallel,
        on_progress=report,
        on_event=on_event,
    )


def _priorities(recipe: SwarmRecipe, plan: Plan) -> dict[str, int]:
    """The recipe's priorities by run."""
    named = {name: getattr(plan, name) for name in ("dense", "dense_flops") if getattr(plan, name)}
    named |= plan.experts | {f"r{name.removeprefix('e')}": task for name, task in plan.random.items()}
    return {named[name].run: priority for name, priority in recipe.priorities.items()}


def _one_by_one(
    recipe: SwarmRecipe,
    tasks: Sequence[TrainTask],
    report: OnProgress,
    on_event: Callable[[str, Event], None] | None,
) -> None:
    """Runs one after another, each by all workers of Ray Train."""
    failures = {}
    for task in tasks:
        try:
            job.run_task(
                task,
                workers=recipe.train.worker_counts,
                resources=recipe.resources,
                on_progress=partial(report, task.run),
                on_event=on_event,
            )
        except TrainingError as error:
            failures[task.run] = str(error)
            continue
        if not folder.is_finished(task):  # it was asked to stop
            return
    if failures:
        raise failed(failures, len(tasks))


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
        dense_flops=checkpoints[plan.dense_flops.run] if plan.dense_flops else None,
        random=(parts(plan.random, random), random.folder) if random else None,
    )


def _soups(recipe: SwarmRecipe, plan: Plan, swarm: Swarm, root: Path) -> dict[str, Path]:
    """Step directories of the experts' averages by their columns, where the recipe asks for them."""
    router = swarm.router()
    if not recipe.soups or router is None:
        return {}
    return soup.write(root, recipe.name, {name: swarm.checkpoint(name) for name in router.ids}, router, plan.corpus)


def _evaluated(
    swarm: Swarm, corpus: Corpus, config: Evaluation, others: dict[str, Path], on_progress: OnProgress
) -> dict[str, Any]:
    """The swarm's table, kept beside swarm.json and read from there the next time."""
    place = swarm.folder / "evaluation.json"
    digests = {name: checkpoint_digest(folder, read_files=False) for name, folder in others.items()}
    asked = {"protocol": PROTOCOL, "config": config.model_dump(), "corpus": corpus.digest, "others": digests}
    if place.is_file():
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["asked"] == asked and kept["digest"] == artefacts.digest_json(kept["table"]):
            return dict(kept["table"])

    def report(model: str, done: int, num_models: int) -> None:
        on_progress("evaluation", done, num_models, {"model": model})

    table = evaluate_swarm(swarm, corpus, config, others=others, device=runtime.device(), on_progress=report)
    artefacts.write_json(place, {"asked": asked, "digest": artefacts.digest_json(table), "table": table})
    return table


def _summary(
    recipe: SwarmRecipe, plan: Plan, swarm: Swarm, table: dict[str, Any], of_swarm: Sequence[TrainTask]
) -> dict[str, Any]:
    """The job's last line; `of_swarm` are the seed's and the experts' runs."""
    asked_for = [name for name, runs in (("random", plan.random), ("dense_flops", plan.dense_flops)) if runs]
    compared = ["dense", "route", "mixture", *asked_for]
    rows = table["bits_per_byte"].items()
    tokens = {task.run: task.num_steps * task.batch_tokens for task in of_swarm}
    model = on_meta(plan.seed.spec)
    parameters = num_parameters(model)
    flops = train_flops_per_token(model, plan.seed.spec.context_tokens)
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
        "dense_flops": _larger(plan.dense_flops, flops) if plan.dense_flops else None,
        "clusters": {
            member: {"domain": plan.clusters.domains[c], "train_tokens": plan.clusters.tokens[c]}
            for c, member in enumerate(plan.experts)
        },
    }


def _larger(task: TrainTask, flops_per_token: float) -> dict[str, Any]:
    """What the larger dense control is: its size, its cost per token as a multiple of an expert's, its tokens."""
    model = on_meta(task.spec)
    times = train_flops_per_token(model, task.spec.context_tokens) / flops_per_token
    tokens = task.num_steps * task.batch_tokens
    return {"parameters": num_parameters(model), "cost_per_token": times, "train_tokens": tokens}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipelines.swarm.job RECIPE [--set a.b=value]`, as `ray job submit` runs it; returns the exit code."""
    torch.set_num_threads(runtime.num_cpus())  # Ray sets one thread for a submitted job's driver, which evaluates
    return submitted.run("swarm train", train_swarm, argv)


if __name__ == "__main__":
    sys.exit(main())
