"""Recipes of `ulm train` and `ulm swarm train`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ulm.errors import ConfigError
from ulm.recipes.base import Recipe, Section
from ulm.recipes.clustering import Clustering
from ulm.registry import configure


class Train(Section):
    """How long, how wide and how often. Exactly one of steps, tokens, tokens_per_parameter."""

    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)  # training targets in all
    tokens_per_parameter: float | None = Field(None, gt=0)
    batch_tokens: int | None = Field(None, ge=1)  # of a global batch, a multiple of context_tokens; None: preset
    context_tokens: int | None = Field(None, ge=2)  # None: the model's
    workers: int = Field(1, ge=1)
    micro_batch_rows: int | None = Field(None, ge=1)  # rows a worker takes at once; None: by size
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where it is native
    clip_norm: float = Field(1.0, gt=0)
    checkpoint_every_steps: int | None = Field(None, ge=1)  # None: at the end, and on SIGTERM
    eval_every_steps: int | None = Field(None, ge=1)  # None: at the end
    eval_tokens: int | None = Field(100_000, ge=1)  # of val, None: all

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if sum(v is not None for v in (self.steps, self.tokens, self.tokens_per_parameter)) != 1:
            raise ConfigError("train", "needs exactly one of steps, tokens, tokens_per_parameter", "train: {steps: 30}")
        return self


class Resources(Section):
    """What one training worker is given by Ray."""

    cpus_per_worker: float | None = Field(None, gt=0)  # None: the node's CPUs shared by the workers
    gpus_per_worker: float | None = Field(None, ge=0)  # None: 1 where the cluster has GPUs enough, else 0


def _kind(slot: str) -> Any:
    def check(given: Any) -> Any:
        return None if given is None else configure(slot, given).model_dump(exclude_unset=True)

    return check


class TrainingRecipe(Recipe):
    """What training one model and training a swarm have in common."""

    corpus: str  # name, digest or path
    model: str | dict[str, Any] = "nano"
    train: Train
    optimizer: dict[str, Any] = {"kind": "adamw"}
    resources: Resources = Resources()

    check_optimizer = field_validator("optimizer", mode="before")(_kind("optimizer"))

    @field_validator("model")
    @classmethod
    def _model_parses(cls, given: str | dict[str, Any]) -> str | dict[str, Any]:
        from ulm.spec import ModelSpec  # needs the component files, and so torch

        ModelSpec.parse(given)
        return given


class TrainRecipe(TrainingRecipe):
    """What `ulm train` needs."""

    schedule: dict[str, Any] = {"kind": "cosine"}
    init_from: str | None = None  # a checkpoint: weights only

    check_schedule = field_validator("schedule", mode="before")(_kind("schedule"))


class Evaluation(Section):
    """The table of bits per byte by domain."""

    tokens_per_domain: int | None = Field(20_000, ge=100)  # of test; None: all
    every_tokens: int = Field(64, ge=1)  # the window W between re-weighings
    top_k: int = Field(2, ge=1)


class SwarmRecipe(TrainingRecipe):
    """What `ulm swarm train` needs. Its length is the total over seed and experts; schedules are the protocol's."""

    experts: int = Field(4, ge=1)
    seed_share: float = Field(0.5, gt=0, lt=1)
    controls: list[Literal["dense", "random"]] = ["dense"]
    clustering: Clustering = Clustering()
    evaluation: Evaluation = Evaluation()
    warmup_steps: int = Field(10, ge=0)
    parallel: int | None = Field(None, ge=1)  # experts trained side by side; None: as resources allow
