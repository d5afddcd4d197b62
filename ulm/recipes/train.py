"""Recipes of `ulm train` and `ulm swarm train`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import Recipe, Section
from ulm.recipes.clustering import Clustering
from ulm.recipes.serve import MemberId
from ulm.registry import configure

LENGTHS = ("steps", "tokens", "tokens_per_parameter")
MAX_WORKERS = 10_000
MAX_TOKENS = 10**18  # of a run; larger numbers are mistakes, and no 64-bit counter holds them


class WorkerRange(Section):
    """As many workers as the cluster has room for when training starts, between the two."""

    min: int = Field(1, ge=1, le=MAX_WORKERS)
    max: int = Field(ge=1, le=MAX_WORKERS)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ConfigError("train.workers", f"max {self.max} is below min {self.min}", "{min: 1, max: 4}")
        return self


class Train(Section):
    """How long, how wide and how often. Exactly one of steps, tokens, tokens_per_parameter."""

    steps: int | None = Field(None, ge=1, le=MAX_TOKENS)
    tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)  # training targets in all
    tokens_per_parameter: float | None = Field(None, gt=0, le=1e8)
    batch_tokens: int | None = Field(
        None, ge=1, le=10**9
    )  # of a global batch, a multiple of context_tokens; None: preset
    context_tokens: int | None = Field(None, ge=2, le=2**24)  # None: the model's
    workers: int | WorkerRange = 1
    micro_batch_rows: int | None = Field(None, ge=1, le=10**9)  # rows a worker takes at once; None: what fits
    seed: int = Field(0, ge=0, lt=2**63)
    # auto: bfloat16 where it is native, float16 on older GPUs, else float32. pure_bfloat16: weights and optimizer too
    precision: Literal["auto", "float32", "bfloat16", "pure_bfloat16", "float16"] = "auto"
    compile: bool | None = None  # torch.compile; None: where the run is long enough for it to pay
    checkpoint_activations: bool = False  # make them again in the backward pass: less memory, a third more time
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)  # serve and evaluate an average of the weights; None: the weights
    checkpoint_every_steps: int | None = Field(None, ge=1)  # None: every ten minutes; always at the end and on SIGTERM
    keep_last: int = Field(3, ge=1)  # checkpoints
    keep_best: int = Field(1, ge=0)  # more, by val_loss, of those saved with an evaluation
    eval_every_steps: int | None = Field(None, ge=1)  # None: at the end
    eval_tokens: int | None = Field(100_000, ge=1)  # of val, None: all

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            problem = f"has {' and '.join(given)}, which both say how long it is"
            raise ConfigError("train", problem, f"one of them; --set train.{given[0]}=null leaves the other")
        if not given:
            raise ConfigError("train", f"needs one of {', '.join(LENGTHS)}", "train: {steps: 30}")
        return self

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return WorkerRange.model_validate(given)
        if isinstance(given, WorkerRange) or (type(given) is int and 1 <= given <= MAX_WORKERS):
            return given
        raise ConfigError(
            "train.workers", f"{given!r} is no number of workers", f"1 to {MAX_WORKERS:,}, or {{min: 1, max: 4}}"
        )

    @property
    def worker_counts(self) -> range:
        """Every number of workers that the recipe allows."""
        given = self.workers
        return range(given, given + 1) if isinstance(given, int) else range(given.min, given.max + 1)


class EarlyStopping(Section):
    """End when val_loss has not fallen by `min_improvement` nats in `patience` evaluations; the best is the result."""

    patience: int = Field(5, ge=1)
    min_improvement: float = Field(0.0, ge=0)


class Guard(Section):
    """When to go back to a good checkpoint: a loss that is not finite, or leaps, or a gradient that does."""

    loss_rise: float | None = Field(2.0, gt=0)  # nats above the median of the last steps; None: no limit
    grad_norm_ratio: float | None = Field(100.0, gt=1)  # times the median of the last steps; None: no limit
    rollbacks: int = Field(3, ge=0)  # so often; then the run ends with an error
    lr_factor: float = Field(0.5, gt=0, le=1)  # of the rate from then on, after each


class Samples(Section):
    """Text that the model writes while it learns, for the report."""

    prompts: tuple[str, ...] = ("",)  # none: no samples
    every_steps: int | None = Field(None, ge=1)  # None: at each evaluation
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.8, ge=0, le=100)


class Resources(Section):
    """What one training worker is given by Ray."""

    cpus_per_worker: float | None = Field(None, gt=0)  # None: the node's CPUs shared by the workers
    gpus_per_worker: float | None = Field(None, ge=0)  # None: 1 where the cluster has GPUs enough, else 0
    max_restarts: int = Field(3, ge=0)  # of lost workers, without a new checkpoint in between


class SwarmResources(Resources):
    """What one worker is given, where each trains a run of its own. Fractions: several runs on one GPU or CPU."""

    cpu_workers: int = Field(0, ge=0)  # without a GPU, beside those with one


def _kind(slot: str, default: str | None) -> Any:
    def check(given: Any) -> Any:
        if isinstance(given, dict) and "kind" not in given:  # --set optimizer.lr=0.001
            if default is None:
                return given
            given = {"kind": default, **given}
        return None if given is None else configure(slot, given).model_dump(exclude_unset=True)

    return check


class TrainingRecipe(Recipe):
    """What training one model and training a swarm have in common."""

    corpus: str  # name, digest or path
    model: str | dict[str, Any] = "nano"  # a size (nano, 25M), {preset, size, …}, or all fields of a spec
    train: Train
    optimizer: dict[str, Any] = {}  # as it was given: see settled_optimizer
    resources: Resources = Resources()
    early_stopping: EarlyStopping | None = None
    guard: Guard = Guard()
    samples: Samples = Samples()
    log_to: tuple[Literal["wandb", "mlflow"], ...] = ()  # beside TensorBoard

    check_optimizer = field_validator("optimizer", mode="before")(_kind("optimizer", None))

    @property
    def settled_optimizer(self) -> dict[str, Any]:
        """Kind and settings of the optimizer; settings without a kind are laid over the preset's, else over adamw."""
        if "kind" in self.optimizer:
            return self.optimizer
        from ulm.spec import ModelSpec  # needs the component files, and so torch

        usual: dict[str, Any] = ModelSpec.training_defaults(self.model).get("optimizer", {"kind": "adamw"})
        return {**usual, **self.optimizer}

    @model_validator(mode="after")
    def _optimizer_is_one(self) -> Self:
        configure("optimizer", self.settled_optimizer)
        return self

    @model_validator(mode="after")
    def _best_is_kept(self) -> Self:
        if self.early_stopping and not self.train.keep_best:
            raise ConfigError("train.keep_best", "0, but early_stopping ends with the best checkpoint", "1 or more")
        return self

    @field_validator("model")
    @classmethod
    def _model_parses(cls, given: str | dict[str, Any]) -> str | dict[str, Any]:
        from ulm.spec import ModelSpec  # needs the component files, and so torch

        ModelSpec.parse(given, vocab_size=2)  # the corpus says how large it is; a size that fits any fits the smallest
        return given


class TrainRecipe(TrainingRecipe):
    """What `ulm train` needs."""

    schedule: dict[str, Any] = {"kind": "cosine"}
    init_from: str | None = None  # a checkpoint: weights only

    check_schedule = field_validator("schedule", mode="before")(_kind("schedule", "cosine"))


class Evaluation(Section):
    """The table of bits per byte by domain."""

    tokens_per_domain: int | None = Field(20_000, ge=100)  # of test; None: all
    every_tokens: int = Field(64, ge=1)  # the window W between re-weighings
    top_k: int = Field(2, ge=1)


class SwarmRecipe(TrainingRecipe):
    """What `ulm swarm train` needs. Its length is the total over seed and experts; schedules are the protocol's."""

    init_from: str | None = None  # a checkpoint that the seed begins with, an imported one too: weights only
    experts: int = Field(4, ge=1)
    seed_share: float = Field(0.5, gt=0, lt=1)
    controls: list[Literal["dense", "random", "dense_flops"]] = ["dense"]
    reassign: bool = False  # a second pass of the experts, over the documents that each of them likes best
    soups: bool = True  # the experts' weights averaged into one model, uniformly and by the router
    clustering: Clustering = Clustering()
    evaluation: Evaluation = Evaluation()
    warmup_steps: int = Field(10, ge=0)
    parallel: int | None = Field(None, ge=1)  # experts trained side by side; None: as resources allow
    resources: SwarmResources = SwarmResources()
    priorities: dict[str, int] = {}  # of runs: e03, dense, r03 (of random); higher is sooner, 0 where it says nothing

    @model_validator(mode="after")
    def _queue_is_one(self) -> Self:
        known: list[str] = [control for control in self.controls if control != "random"]
        letters = ["e", *(["r"] if "random" in self.controls else [])]
        known += [f"{letter}{number:02d}" for letter in letters for number in range(self.experts)]
        for name in self.priorities:
            if name not in known:
                raise ConfigError(f"priorities.{name}", "no such run in this recipe", did_you_mean(name, known))
        if self.resources.cpu_workers and max(self.train.worker_counts) > 1:
            problem = f"{self.resources.cpu_workers}, but train.workers is {self.train.workers}: all train each run"
            raise ConfigError("resources.cpu_workers", problem, "give one of the two")
        if self.resources.cpu_workers and self.resources.gpus_per_worker == 0:
            raise ConfigError(
                "resources.cpu_workers", "no worker has a GPU, gpus_per_worker is 0", "parallel says how many train"
            )
        return self


class SwarmAddRecipe(TrainingRecipe):
    """What `ulm swarm add` needs: one expert more, from the swarm's seed, for the text of a corpus."""

    swarm: str  # its name: the new version gets it
    member: MemberId | None = None  # the expert's id; None: the next of e00, e01, …
    warmup_steps: int = Field(10, ge=0)

    @field_validator("model")
    @classmethod
    def _model_is_the_seeds(cls, given: Any) -> Any:
        raise ConfigError("model", "the expert's model is the seed's", "leave it out")
