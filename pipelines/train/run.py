"""One worker's share of a run between two steps: model, optimizer, order and step, opened, resumed, saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pipelines.train import events, legs
from pipelines.train.feed import Feed
from pipelines.train.guard import Rollbacks, Tripped, Watch
from pipelines.train.rows import Rows
from pipelines.train.saver import Saver
from pipelines.train.task import TrainTask
from pipelines.train.update import Updater
from pipelines.train.validation import HeldOut
from ulm import registry
from ulm.checkpoints import store
from ulm.corpus.rows import RowPlan
from ulm.errors import ArtefactError
from ulm.models.decoder import build

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The lowest val_loss so far, and the evaluations since it last had fallen by enough, small falls added up."""

    val_loss: float = float("inf")
    step: int = 0
    evaluations_since: int = 0
    reference: float = float("inf")  # the val_loss from which a fall is counted

    def see(self, val_loss: float, step: int, min_improvement: float) -> bool:
        """Whether this evaluation is the best so far."""
        if val_loss < self.reference - min_improvement:
            self.reference, self.evaluations_since = val_loss, 0
        else:
            self.evaluations_since += 1
        if is_best := val_loss < self.val_loss:
            self.val_loss, self.step = val_loss, step
        return is_best


@dataclass
class Run:
    """What a rank holds. `step` updates have been made, on `tokens` targets."""

    task: TrainTask
    rank: int
    world_size: int
    device: torch.device
    rows: Rows
    model: Any
    optimizer: torch.optim.Optimizer
    updater: Updater
    held_out: HeldOut | None
    init_digest: str | None
    saver: Saver
    watch: Watch
    average: dict[str, Tensor] | None = None  # of the weights, in float32, as store.tensors names them
    step: int = 0
    tokens: int = 0
    rollbacks: Rollbacks = field(default_factory=Rollbacks)
    best: Best = field(default_factory=Best)
    ended: str | None = None  # why the run is over before its last step

    @classmethod
    def open(cls, task: TrainTask, rank: int, world_size: int, device: torch.device) -> Run:
        """The run where its newest undamaged checkpoint left it, else at its beginning."""
        rows = Rows.of(task, legs.agreed(task, rank, world_size, device))
        val = RowPlan.make(
            rows.corpus, "val", context_tokens=task.spec.context_tokens, documents=task.chosen_documents()
        )
        model = build(task.spec, seed=task.train.seed).to(device)
        if task.train.precision == "pure_bfloat16":
            for parameter in model.parameters():  # buffers, such as tables of angles, stay exact
                parameter.data = parameter.data.to(torch.bfloat16)
        init_digest = store.load_weights(model, task.init_from).digest if task.init_from else None
        lr = task.optimizer.lr  # type: ignore[attr-defined]
        optimizer = registry.find("optimizer", task.optimizer.kind).build(task.optimizer, model, lr)
        run = cls(
            task=task,
            rank=rank,
            world_size=world_size,
            device=device,
            rows=rows,
            model=model,
            optimizer=optimizer,
            updater=Updater(task, model, optimizer, device, world_size),
            held_out=HeldOut.of(val, rows.corpus.tokenizer, task.train.eval_tokens),
            init_digest=init_digest,
            saver=Saver(task.folder, task.train.keep_last, task.train.keep_best),
            watch=Watch(task.recipe.guard),
        )
        if task.train.ema_decay is not None:
            # bfloat16 would lose every move of less than one part in 256
            run.average = {
                name: tensor.to(torch.float32, copy=True)
                for name, tensor in store.tensors(model).items()
                if tensor.is_floating_point()
            }
        run._resume()
        if rank == 0:
            run._say_start()
        return run

    def _say_start(self) -> None:
        how = [self.updater.precision, f"micro-batches of {self.updater.micro_batch_rows} rows"]
        how += ["compiled"] if self.updater.compiled else []
        workers = f"{self.world_size} worker{'s' if self.world_size > 1 else ''}"
        self.say(
            "resume" if self.step else "start",
            f"{workers} on {self.device}, {', '.join(how)}; {self.rows.plan.num_rows:,} rows, "
            f"{100 * self.rows.plan.padding_share:.1f} % padding",
        )

    def say(self, kind: str, text: str) -> None:
        """Tell an event of the run."""
        events.say(self.task.folder, self.step, kind, text)

    def _resume(self) -> None:
        """Take up the newest checkpoint that is whole and undamaged; rank 0 looks, and the others follow it."""
        found = self.agree(_newest_undamaged(self.task.folder) if self.rank == 0 else 0)
        if not found:
            return
        settled = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = store.load_training(self.model, self.optimizer, store.step_folder(self.task.folder, found))
        for group, settings in zip(self.optimizer.param_groups, settled, strict=True):
            group.update(settings)  # rates and decays are the task's, whatever a file says
        if self.average is not None:
            served = store.read_weights(store.step_folder(self.task.folder, found))
            for name, tensor in self.average.items():
                tensor.copy_(served[name])
        self.step, self.tokens, self.ended = state["step"], state["tokens"], state["ended"]
        self.rollbacks = Rollbacks(**state["rollbacks"])
        has_grown = legs.has_grown(self.rows.legs, state, store.step_folder(self.task.folder, found))
        if not has_grown and state["eval_tokens"] == self.task.train.eval_tokens:  # else it was on another text
            best = state["best"]
            self.best = Best(**{**best, **{name: float(best[name]) for name in ("val_loss", "reference")}})
        self.watch.restore(state["watch"])
        if state["scaler"]:
            self.updater.scaler.load_state_dict(state["scaler"])
        assert state["cursor"] == self.cursor, "a folder of another identity; folder.claim has checked that"

    @property
    def cursor(self) -> int:
        """Rows taken so far, as a position in the order."""
        return self.task.start_cursor + self.step * self.task.rows_per_batch

    def feed(self) -> Feed:
        """Batches from the cursor on."""
        return Feed(
            self.rows.plan,
            self.rows.order,
            self.task.rows_per_batch,
            cursor=self.cursor,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
        )

    def add_over_ranks(self, sums: Tensor) -> Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def agree(self, mine: int) -> int:
        """Rank 0's number, on every rank; all are here when it returns."""
        return agree(mine if self.rank == 0 else 0, self.world_size, self.device)

    def follow_average(self) -> None:
        """Move the average of the weights towards them, after an update (Polyak averaging, exponentially forgetting).

        The first steps forget faster, as min(decay, (1 + n) / (10 + n)), or the start would weigh for long.
        """
        if self.average is None or self.task.train.ema_decay is None:
            return
        decay = min(self.task.train.ema_decay, (1 + self.step) / (10 + self.step))
        weights = store.tensors(self.model)
        torch._foreach_lerp_(list(self.average.values()), [weights[name].float() for name in self.average], 1 - decay)

    @contextmanager
    def served_weights(self) -> Iterator[None]:
        """In the block the model is as its checkpoint serves it: with averaged weights where kept, and not training."""
        weights, average = store.tensors(self.model), self.average or {}
        raw = {name: weights[name].clone() for name in average}
        self.model.eval()
        try:
            for name, tensor in average.items():
                weights[name].copy_(tensor)
            yield
        finally:
            for name, tensor in raw.items():
                weights[name].copy_(tensor)
            self.model.train()

    def check_weights(self) -> None:
        """Tripped where a weight is not finite; the ranks hold the same, and so agree. A checkpoint of such is none."""
        tensors = [p.detach() for p in self.model.parameters()] + list((self.average or {}).values())
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, float("inf"))])
        if not largest.isfinite().all():
            raise Tripped(self.step, "weights are not finite after the update")

    def save(self, val_loss: float | None) -> None:
        """Take this step's training checkpoint, which rank 0 writes while training goes on."""
        if self.rank > 0:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": self.cursor,
            "legs": legs.dumped(self.rows.legs),
            "rng": {"seed": self.task.train.seed, "step": self.step},  # all there is: every step is seeded anew
            "schedule": self.task.schedule.model_dump(mode="json"),
            "num_steps": self.task.num_steps,
            "rollbacks": vars(self.rollbacks).copy(),
            # may be inf, which is no JSON
            "best": {**vars(self.best), "val_loss": str(self.best.val_loss), "reference": str(self.best.reference)},
            "eval_tokens": self.task.train.eval_tokens,
            "watch": self.watch.state(),
            "scaler": self.updater.scaler.state_dict(),
            "ended": self.ended,
            **({"val_loss": val_loss} if val_loss is not None else {}),
        }
        snapshot = store.snapshot(
            self.model,
            self.rows.corpus.tokenizer,
            step=self.step,
            run=self.task.run,
            corpus_digest=self.rows.corpus.digest,
            init_from=self.init_digest,
            optimizer=self.optimizer,
            state=state,
            average=self.average,
        )
        self.saver.save(snapshot, store.step_folder(self.task.folder, self.step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.saver.close()


def agree(mine: int, world_size: int, device: torch.device) -> int:
    """The sum of all ranks' numbers, on every rank; all are here when it returns."""
    if world_size == 1:
        return mine
    number = torch.tensor(mine, device=device)
    dist.all_reduce(number)
    return int(number)


def _newest_undamaged(folder: Path) -> int:
    """Step of the newest checkpoint that can be read whole, 0 for none. Damaged ones are set aside, with an event."""
    steps = store.step_folders(folder)
    while steps:
        newest = steps.pop()
        try:
            store.check(newest)
            _check_state(store.read_state(newest), newest)
            return store.step_of(newest)
        except ArtefactError as error:
            aside = store.set_aside(newest)
            instead = f"the one before, {steps[-1].name}, is taken" if steps else "training starts from the beginning"
            text = f"{newest.name} is damaged, {instead}: {error}; it is kept as {aside.name}"
            events.say(folder, store.step_of(newest), "damaged", text)
    return 0


class _State(BaseModel):
    """What state.json must hold for a run to go on from it; the optimizer's part is read with its tensors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int
    tokens: int
    cursor: int
    legs: list[dict[str, Any]]
    rollbacks: dict[str, float | None]
    best: dict[str, float | str]
    watch: Any
    scaler: dict[str, Any]
    ended: str | None
    eval_tokens: int | None
    val_loss: float | None = None


def _check_state(state: dict[str, Any], place: Path) -> None:
    """ArtefactError where a checkpoint's state is none of ours, whatever its digest says."""
    try:
        found = _State.model_validate(state)
        Rollbacks(**found.rollbacks)  # type: ignore[arg-type]
        Best(**found.best)  # type: ignore[arg-type]
    except (ValidationError, TypeError) as error:
        first = str(error).splitlines()[:2]
        raise ArtefactError(f"{place}: its state is not one to go on from: {' '.join(first)}") from None
    if found.step != store.step_of(place):
        raise ArtefactError(f"{place}: its state is of step {found.step}")
