"""From a recipe to a training task: every value settled and checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ulm import dial, registry
from ulm.artefacts import digest_file
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Ints
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, on_meta
from ulm.recipes.train import Train, TrainingRecipe, TrainRecipe
from ulm.registry import KindConfig, configure
from ulm.spec import ModelSpec


@dataclass(frozen=True)
class TrainTask:
    """One model to train, as a worker on any node needs it."""

    run: str
    folder: Path  # of the run: checkpoints, metrics.jsonl
    corpus: Path
    spec: ModelSpec
    num_steps: int
    batch_tokens: int  # slots of a global batch, a multiple of the context
    optimizer: KindConfig  # its lr is set
    schedule: KindConfig
    recipe: TrainingRecipe  # everything else: seed, precision, guard, samples …
    start_cursor: int = 0  # rows of the order that another run took before
    documents: Path | None = None  # .npy of rows of documents.parquet: a cluster; None: all
    init_from: Path | None = None  # a checkpoint: weights only

    @property
    def train(self) -> Train:
        """The recipe's section of that name; its length and batch are settled in the task itself."""
        return self.recipe.train

    @property
    def rows_per_batch(self) -> int:
        """Rows of a global batch."""
        return self.batch_tokens // self.spec.context_tokens

    def chosen_documents(self) -> Ints | None:
        """Rows of documents.parquet to train on, None for all."""
        return None if self.documents is None else np.load(self.documents, allow_pickle=False).astype(np.int64)

    def identity(self) -> dict[str, Any]:
        """What decides the weights, by its place in a recipe. Workers, evaluation and checkpoints may change."""
        return {
            "corpus": Corpus.open(str(self.corpus), verify=False).digest,
            "model": self.spec.model_dump(mode="json"),
            "train": {
                "steps": self.num_steps,
                "batch_tokens": self.batch_tokens,
                "seed": self.train.seed,
                "precision": self.train.precision,
                "clip_norm": self.train.clip_norm,
                "ema_decay": self.train.ema_decay,
            },
            "optimizer": self.optimizer.model_dump(mode="json"),
            "schedule": self.schedule.model_dump(mode="json"),
            "init_from": read_manifest(self.init_from).digest if self.init_from and self.init_from.is_dir() else None,
            "documents": digest_file(self.documents) if self.documents else None,
            "start_cursor": self.start_cursor,
        }


def resolve(recipe: TrainRecipe, *, root: Path, near: Path | None = None) -> TrainTask:
    """The task that a recipe means; ConfigError where its parts do not fit each other or the corpus."""
    for package in recipe.log_to:
        if find_spec(package) is None:
            raise ConfigError("log_to", f"{package} is not installed", f"pip install {package}, or leave it out")
    corpus = Corpus.open(recipe.corpus, root=root, near=near, place="corpus")
    if not corpus.num_tokens("train"):
        raise ConfigError("corpus", f"{corpus.folder} has no training documents", "build it with other split shares")
    init_from = store.resolve(recipe.init_from, root=root, near=near, place="init_from") if recipe.init_from else None
    spec = _spec(recipe, corpus, init_from)
    train = recipe.train
    # A model that comes from a checkpoint has no named size: the dial's rules hold, as for any size without a name.
    defaults = {} if _model_from_checkpoint(recipe) else ModelSpec.training_defaults(recipe.model)
    defaults = {**dial.training_defaults(_parameters(spec)), **defaults}
    batch_tokens = _batch_tokens(train, spec, defaults["batch_tokens"])
    optimizer = configure("optimizer", recipe.settled_optimizer)
    if getattr(optimizer, "lr", None) is None:
        optimizer = optimizer.model_copy(
            update={"lr": defaults["lr"] * getattr(registry.find("optimizer", optimizer.kind), "lr_share", 1.0)}
        )
    return TrainTask(
        run=recipe.name,
        folder=root / "runs" / recipe.name,
        corpus=corpus.folder,
        spec=spec,
        num_steps=_num_steps(train, spec, batch_tokens),
        batch_tokens=batch_tokens,
        optimizer=optimizer,
        schedule=configure("schedule", recipe.schedule),
        recipe=recipe,
        init_from=init_from,
    )


def _model_from_checkpoint(recipe: TrainRecipe) -> bool:
    return recipe.init_from is not None and "model" not in recipe.model_fields_set


def _spec(recipe: TrainRecipe, corpus: Corpus, init_from: Path | None) -> ModelSpec:
    vocab_size, context_tokens = corpus.tokenizer.vocab_size, recipe.train.context_tokens
    base = store.read_spec(init_from) if init_from else None
    if base is not None and base.max_positions is not None and (context_tokens or 0) > base.max_positions:
        problem = f"{context_tokens}, but the model of init_from has {base.max_positions} positions"
        raise ConfigError("train.context_tokens", problem, f"at most {base.max_positions}")
    if base is not None and _model_from_checkpoint(recipe):
        spec = base if context_tokens is None else base.model_copy(update={"context_tokens": context_tokens})
    else:
        spec = ModelSpec.parse(recipe.model, vocab_size=vocab_size, context_tokens=context_tokens)
    if context_tokens is not None and spec.context_tokens != context_tokens:
        raise ConfigError(
            "train.context_tokens", f"{context_tokens}, but model.context_tokens is {spec.context_tokens}", "give one"
        )
    if spec.vocab_size != vocab_size:
        place = "init_from" if base is not None else "model.vocab_size"
        raise ConfigError(place, f"{spec.vocab_size} tokens, the corpus's tokenizer has {vocab_size}", "leave it out")
    if init_from and base is not None:
        _check_same(spec, base, init_from, corpus)
    return spec


def _check_same(spec: ModelSpec, base: ModelSpec, init_from: Path, corpus: Corpus) -> None:
    """Weights are only worth something in the model and for the tokens that they were trained with."""
    if read_manifest(init_from).tokenizer_digest != corpus.tokenizer.digest:
        raise ConfigError("init_from", f"{init_from} has another tokenizer than the corpus", "build the corpus with it")
    for field in (name for name in ModelSpec.model_fields if name not in ("vocab_size", "context_tokens")):
        if getattr(spec, field) != getattr(base, field):
            remedy = "leave model out to take the checkpoint's"
            raise ConfigError("init_from", f"its model has another {field} than this recipe's", remedy)


def _batch_tokens(train: Train, spec: ModelSpec, usual: int) -> int:
    context_tokens = spec.context_tokens
    if train.batch_tokens is None:
        return max(1, usual // context_tokens) * context_tokens
    if train.batch_tokens % context_tokens:
        near = max(1, round(train.batch_tokens / context_tokens)) * context_tokens
        problem = f"{train.batch_tokens} is not a multiple of context_tokens {context_tokens}"
        raise ConfigError("train.batch_tokens", problem, f"for example {near}")
    return train.batch_tokens


def _num_steps(train: Train, spec: ModelSpec, batch_tokens: int) -> int:
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / batch_tokens)
    assert train.tokens_per_parameter is not None  # one of the three is given
    return math.ceil(train.tokens_per_parameter * _parameters(spec) / batch_tokens)


def _parameters(spec: ModelSpec) -> int:
    return num_parameters(on_meta(spec))
