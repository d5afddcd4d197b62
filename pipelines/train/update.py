"""One update: the gradient of a global batch in micro-batches, in the recipe's precision, and the optimizer's step."""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.train.feed import WorkerBatch
from pipelines.train.task import TrainTask
from ulm import runtime
from ulm.components.loss import NO_TARGET, summed_nats
from ulm.errors import TrainingError
from ulm.models.account import activation_bytes, train_flops_per_token

log = logging.getLogger(__name__)

CPU_ACTIVATIONS = 512e6  # several runs go side by side on one small machine; larger ones are no faster
GPU_SHARE = 0.85  # of what is free once weights, gradients and optimizer have their place
# Compiling takes about 20 s on two cores and 40 s for a GPU. It saves 3 to 5 % of a CPU's time and half of a GPU's.
# Seconds of training at a usual rate from which it pays; of the whole task, so that a resumed run computes the same.
COMPILE_PAYS_S = {"cpu": 900.0, "cuda": 120.0}
USUAL_FLOPS = {"cpu": 1.5e11, "cuda": 1.5e14}


# Buffers are tables that follow from the spec: not to be sent before every forward. torch 2.13 has a new name for it.
_IS_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _IS_NEW else "broadcast_buffers": False}


class Objective(nn.Module):
    """Model and loss in one forward, so that DistributedDataParallel sees both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed nats of a micro-batch, and the loss to go down: with what the model's layers ask for besides."""
        x_BTD = self.model.hidden(inputs_BT, segments_BT)
        nats = summed_nats(x_BTD, targets_BT, self.model.head, self.model.vocab_size)
        more = self.model.auxiliary_loss()
        return nats.detach(), nats if more is None else nats + more * (targets_BT != NO_TARGET).sum()


class Updater:
    """Makes updates of a model on one device, alone or in a process group."""

    def __init__(
        self, task: TrainTask, model: Any, optimizer: torch.optim.Optimizer, device: torch.device, world_size: int
    ) -> None:
        self._model, self._optimizer, self._device, self._world_size = model, optimizer, device, world_size
        self._clip_norm = task.train.clip_norm
        self.precision = runtime.precision(task.train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")
        model.checkpoint_activations = task.train.checkpoint_activations
        self.compiled = compiles(task, model, device)
        if self.compiled:
            for block in model.blocks:  # one piece of code for all layers, made once
                block.compile(dynamic=False)
        self._objective: Any = Objective(model)
        rows = task.rows_per_batch // world_size
        self.micro_batch_rows = task.train.micro_batch_rows or self._rows_that_fit(task, rows)
        if world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self._objective = DistributedDataParallel(
                self._objective, device_ids=ids, gradient_as_bucket_view=True, **KEEP_BUFFERS
            )

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the run's precision."""
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)
        return torch.autocast(self._device.type, dtype=dtype) if dtype else nullcontext()

    def update(self, batch: WorkerBatch, lr_share: float) -> tuple[Tensor, Tensor]:
        """One step: this worker's summed nats, and the norm of the whole gradient before clipping; both on the device.

        Where the gradient is not finite in float16, no weight changes and the next loss is scaled less.
        """
        nats = self._gradients(batch)
        self.scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm).detach().float()
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return nats, norm

    def _gradients(self, batch: WorkerBatch) -> Tensor:
        """Gradient of the global batch's mean loss, micro-batch by micro-batch; returns this worker's summed nats."""
        while True:
            try:
                return self._gradients_by(batch, self.micro_batch_rows)
            except torch.cuda.OutOfMemoryError:
                if self._world_size > 1 or self.micro_batch_rows == 1:
                    remedy = "a smaller train.micro_batch_rows, or train.checkpoint_activations: true"
                    raise TrainingError(
                        f"{self.micro_batch_rows} rows at once do not fit the GPU's memory; {remedy}"
                    ) from None
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.micro_batch_rows = -(-self.micro_batch_rows // 2)
            log.warning("out of GPU memory: %d rows at once from here on", self.micro_batch_rows)

    def _gradients_by(self, batch: WorkerBatch, rows: int) -> Tensor:
        scale = self._world_size / batch.num_targets  # DistributedDataParallel takes the mean over workers
        of_rows = [batch.inputs_BT, batch.targets_BT]
        if self._model.sees_documents:
            of_rows.append(batch.segments_BT.to(self._device))
        parts = list(zip(*(torch.split(x, rows) for x in of_rows), strict=True))
        total = torch.zeros((), device=self._device)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with nullcontext() if is_last or self._world_size == 1 else self._objective.no_sync():
                with self.autocast():
                    nats, loss = self._objective(*part)
                self.scaler.scale(loss * scale).backward()
            total += nats
        return total

    def _rows_that_fit(self, task: TrainTask, rows: int) -> int:
        """Rows of a micro-batch: of equal size, as large as memory allows. On a GPU they are tried."""
        per_row = activation_bytes(task.spec, self.precision, checkpoint=task.train.checkpoint_activations)
        if self._device.type != "cuda":
            return even(rows, max(1, int(CPU_ACTIVATIONS / per_row)))
        state_bytes = sum(3 * p.numel() * p.element_size() for p in self._model.parameters())  # gradients, two moments
        room = GPU_SHARE * (torch.cuda.mem_get_info(self._device)[0] - state_bytes)
        fits = even(rows, max(1, int(room / per_row)))
        shape = (fits, task.spec.context_tokens)
        while True:
            try:
                zeros_BT = torch.zeros(shape, dtype=torch.long, device=self._device)
                with self.autocast():
                    self._objective(zeros_BT, zeros_BT)[1].backward()
                return fits
            except torch.cuda.OutOfMemoryError:
                if fits == 1:
                    remedy = "train.checkpoint_activations: true, or a smaller model or context"
                    raise TrainingError(f"one row does not fit the GPU's memory; {remedy}") from None
                fits = even(rows, fits - 1)
                shape = (fits, task.spec.context_tokens)
            finally:
                self._optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()


def even(rows: int, most: int) -> int:
    """The size of micro-batches, at most `most`, when `rows` are shared out over as few as that needs."""
    return -(-rows // -(-rows // max(1, most)))


def compiles(task: TrainTask, model: Any, device: torch.device) -> bool:
    """Whether torch.compile is used: as the recipe says, else where the task is long enough to pay for it."""
    if not runtime.can_compile(device):
        if task.train.compile:
            needed = "a C++ compiler and Python's headers" + (", and Triton" if device.type == "cuda" else "")
            log.warning("torch.compile needs %s, of which something is missing: running eagerly", needed)
        return False
    if task.train.compile is not None:
        return task.train.compile
    flops = train_flops_per_token(model, task.spec.context_tokens) * task.num_steps * task.batch_tokens
    return flops / USUAL_FLOPS[device.type] > COMPILE_PAYS_S[device.type]
