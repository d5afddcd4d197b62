"""What a training recipe means, with every mistake in it said before a worker starts. Needs no Ray."""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.train import folder
from pipelines.train.task import TrainTask, resolve
from ulm import runtime
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, UnknownCharacterError
from ulm.models.generate import prompt_tokens
from ulm.recipes.train import TrainRecipe

log = logging.getLogger(__name__)


def prepare(recipe: TrainRecipe, *, root: Path, near: Path | None = None) -> TrainTask:
    """The task of a recipe; ConfigError names the first field that does not fit the others, the corpus or the run."""
    task = resolve(recipe, root=root, near=near)
    folder.check_workers(task, recipe.train.worker_counts)
    corpus = Corpus.open(str(task.corpus), verify=False)
    if not corpus.num_tokens("val"):
        _check_without_val(recipe)
    _check_prompts(recipe, corpus, task.spec.context_tokens)
    if recipe.early_stopping and recipe.train.eval_every_steps is None:
        problem = "counts evaluations, and none but the last is asked for"
        raise ConfigError("early_stopping", problem, "set train.eval_every_steps, for example 100")
    folder.check(task)
    _warn_where_slow(recipe.train.precision)
    return task


def _check_prompts(recipe: TrainRecipe, corpus: Corpus, context_tokens: int) -> None:
    """Each prompt for samples can be said in the corpus's tokens, and leaves room for an answer."""
    for number, prompt in enumerate(recipe.samples.prompts):
        place = f"samples.prompts.{number}"
        try:
            num_tokens = len(prompt_tokens(corpus.tokenizer, prompt))
        except UnknownCharacterError as error:
            raise ConfigError(place, str(error), "a prompt in the characters of the corpus") from None
        if num_tokens >= context_tokens:
            problem = f"{num_tokens} tokens, and the model's context is {context_tokens}"
            raise ConfigError(place, problem, "a shorter prompt")


def _check_without_val(recipe: TrainRecipe) -> None:
    """Nothing of what needs held-out text may be asked of a corpus that has none."""
    remedy = "leave it out, or build the corpus with split: {val: 0.05}"
    for field in ("keep_best", "eval_every_steps"):
        if field in recipe.train.model_fields_set and getattr(recipe.train, field):
            raise ConfigError(f"train.{field}", "needs held-out text, and the corpus has no val split", remedy)
    if recipe.early_stopping:
        raise ConfigError("early_stopping", "needs held-out text, and the corpus has no val split", remedy)


def _warn_where_slow(precision: str) -> None:
    """Say once that this machine's CPU emulates a precision that the recipe asks for."""
    where = runtime.device()
    if where.type != "cpu" or precision in ("auto", "float32"):
        return
    if precision == "float16" or not runtime.has_fast_bfloat16(where):
        log.warning("train.precision: %s is emulated by this CPU, float32 would be faster", precision)
