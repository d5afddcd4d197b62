"""What a step keeps in memory, how micro-batches are sized by it, and that neither changes what is learned."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ulm
from pipelines.train import update
from pipelines.train.feed import WorkerBatch
from pipelines.train.loop import train
from pipelines.train.update import Objective, Updater, even
from tests.tiny_run import SAME, digests, lines, opened_runs, tiny_tasks
from ulm.components.loss import CPU_CHUNK, summed_nats
from ulm.errors import TrainingError
from ulm.models.account import activation_bytes
from ulm.models.decoder import build

CPU = torch.device("cpu")
ESTIMATE = 0.35  # of the truth: it decides how many rows go at once, and a GPU's first try is checked by running it
FLOAT32_ORDER = {"rtol": 1e-4, "atol": 1e-6}  # sums over rows in another order
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "pure_bfloat16": torch.bfloat16}


@pytest.fixture
def task(root):
    return tiny_tasks(root)


class Saved:
    """A tensor that autograd has saved, for as long as it keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model: Any, rows: int, dtype: torch.dtype) -> int:
    """Bytes of all storages that stay alive after a real forward pass of model and loss, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def note(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    tokens_BT = torch.randint(0, model.vocab_size, (rows, model.spec.context_tokens), generator=torch.manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            _, nats = Objective(model)(tokens_BT, tokens_BT)
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in alive)}
    assert nats.grad_fn is not None, "until here the graph must live"
    return sum(nbytes for address, nbytes in storages.items() if address not in own)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["all", "checkpoints"])
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("nano", "float32"), ("nano", "bfloat16"), ("nano", "pure_bfloat16"), ("micro", "float32"), ("micro", "bfloat16")],
)
def test_the_memory_of_a_row_is_what_a_real_pass_keeps(preset, precision, checkpoint):
    spec = ulm.ModelSpec.preset(preset, context_tokens=128)  # a CPU may emulate bfloat16
    model = build(spec, seed=0)
    model.checkpoint_activations = checkpoint
    if precision == "pure_bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    dtype = torch.float32 if precision == "pure_bfloat16" else DTYPES[precision]
    one, three = (kept_bytes(model, rows, dtype) for rows in (1, 3))
    assert activation_bytes(spec, precision, checkpoint=checkpoint) == pytest.approx((three - one) / 2, rel=ESTIMATE)


def test_activation_checkpoints_keep_a_fraction_and_change_no_bit(task):
    spec = ulm.ModelSpec.preset("nano")
    model = build(spec, seed=0)
    kept = []
    for model.checkpoint_activations in (False, True):
        kept.append(kept_bytes(model, 4, torch.float32))
    assert kept[1] < kept[0] / 4, kept
    fields = {"steps": 4, "eval_every_steps": 2}
    all_kept, again = task("all", train=fields), task("again", train={**fields, "checkpoint_activations": True})
    results = [train(a).checkpoint for a in (all_kept, again)]
    assert lines(all_kept, *SAME) == lines(again, *SAME)
    assert digests(results[0]) == digests(results[1])


def test_micro_batches_are_as_few_as_memory_allows_and_of_equal_size():
    assert [even(24, most) for most in (1, 5, 7, 10, 12, 23, 24, 99)] == [1, 5, 6, 8, 12, 12, 24, 24]
    assert [even(rows, 4) for rows in (1, 4, 5, 9, 25)] == [1, 4, 3, 3, 4]
    for rows in range(1, 40):
        for most in range(1, 45):
            size = even(rows, most)
            assert size <= most and -(-rows // size) == -(-rows // min(most, rows))


def test_the_memory_of_a_row_decides_how_many_go_at_once_and_the_loss_does_not_depend_on_it(task, monkeypatch):
    spec = task().spec
    sizes = []
    for rows in (4, 3, 1):
        monkeypatch.setattr(update, "CPU_ACTIVATIONS", (rows + 0.5) * activation_bytes(spec))
        with opened_runs() as runs:
            train(task(str(rows)))
        sizes.append(runs[0].updater.micro_batch_rows)
    assert sizes == [4, 2, 1]
    whole = lines(task("4"), "loss", "grad_norm", "val_loss")[-1]
    for rows in ("3", "1"):
        assert lines(task(rows), "loss", "grad_norm", "val_loss")[-1] == pytest.approx(whole, abs=2e-4)


class SmallMemory(nn.Module):
    """An objective on a device that holds a few rows at a time."""

    def __init__(self, inner: nn.Module, room: int, fails_at: int) -> None:
        super().__init__()
        self.inner, self.room, self.fails_at, self.tried = inner, room, fails_at, []

    def forward(self, inputs_BT, targets_BT):
        self.tried.append(len(inputs_BT))
        found = self.inner(inputs_BT, targets_BT)
        if len(inputs_BT) > self.room or len(self.tried) == self.fails_at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return found


def updated(task, *, room=99, fails_at=0, world_size=1, rows=8, **how):
    """A model after one update on a device with room for so many rows, with what was tried."""
    model = build(task.spec, seed=0)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 0.1}], lr=0.1)
    updater = Updater(task, model, optimizer, CPU, 1)
    updater._world_size, updater.micro_batch_rows = world_size, how.get("micro_batch_rows", rows)
    updater._objective = SmallMemory(updater._objective, room, fails_at)
    tokens_BT = torch.randint(0, model.vocab_size, (rows, task.spec.context_tokens), generator=torch.manual_seed(0))
    nats, norm = updater.update(WorkerBatch(tokens_BT, tokens_BT, tokens_BT, tokens_BT.numel(), ""), 1.0)
    return model, nats, norm, updater


def test_out_of_memory_in_a_step_halves_the_micro_batch_and_the_step_is_made_as_if_nothing_had_been(task, caplog):
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        model, nats, norm, updater = updated(task(), room=2)
    assert updater._objective.tried == [8, 4, 2, 2, 2, 2] and updater.micro_batch_rows == 2
    assert caplog.messages == [f"out of GPU memory: {rows} rows at once from here on" for rows in (4, 2)]
    expected, expected_nats, expected_norm, _ = updated(task(), micro_batch_rows=2)
    assert torch.equal(nats, expected_nats) and torch.equal(norm, expected_norm)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
    # and after gradients of some rows had been added up already
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        model, *_ = updated(task(), fails_at=2, rows=7, micro_batch_rows=4)
    expected, *_ = updated(task(), rows=7, micro_batch_rows=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("room", "world_size", "rows"), [(0, 1, 1), (4, 2, 8)])
def test_where_no_smaller_micro_batch_can_help_the_error_says_what_can(task, room, world_size, rows):
    """One row, or several workers: they would have to agree in the middle of a step."""
    remedy = r"a smaller train\.micro_batch_rows, or train\.checkpoint_activations: true"
    with pytest.raises(TrainingError, match=f"^{rows} rows? at once .*not fit the GPU's memory; {remedy}$"):
        updated(task(), room=room, world_size=world_size, rows=rows)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 0.006),  # 8 bits; sums over chunks in bfloat16 would be three times as far off
        (torch.float32, torch.bfloat16, 0.006),
        (torch.float32, torch.float16, 3e-3),  # 11 bits
    ],
    ids=["float32", "pure bfloat16", "bfloat16", "float16"],
)
def test_gradients_made_chunk_by_chunk_are_those_of_the_whole_batch(dtype, autocast, tolerance, monkeypatch):
    monkeypatch.setattr("ulm.components.loss.CPU_CHUNK", 64 * 97)  # a hundred chunks and a bit
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(32, 97, bias=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    exact_BTD = torch.randn(4, 1602, 32, generator=generator)
    targets_BT = torch.randint(0, 97, (4, 1602), generator=generator)
    targets_BT[0, :9] = -100
    chunked, x_BTD = nn.Linear(32, 97).to(dtype), exact_BTD.to(dtype).requires_grad_()
    chunked.load_state_dict(head.state_dict())
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        nats = summed_nats(x_BTD, targets_BT, chunked, 97)
    (nats * 0.25).backward()
    exact_BTD.requires_grad_()
    whole = cross_entropy(head(exact_BTD).flatten(0, 1), targets_BT.flatten(), reduction="sum", ignore_index=-100)
    (whole * 0.25).backward()
    assert nats.dtype == torch.float32 and nats.item() == pytest.approx(whole.item(), rel=tolerance)
    pairs = [(x_BTD, exact_BTD), *zip(chunked.parameters(), head.parameters(), strict=True)]
    for found, wanted in pairs:
        assert found.grad.dtype == dtype
        error = (found.grad.float() - wanted.grad).norm() / wanted.grad.norm()
        assert error < tolerance, error


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation in the block makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_logits_of_a_batch_are_never_held_whole(autocast):
    vocab_size, slots, d_model = 4096, 3072, 8
    head, targets_BT = nn.Linear(d_model, vocab_size, bias=False), torch.zeros(3, slots // 3, dtype=torch.long)
    x_BTD = torch.zeros(3, slots // 3, d_model, requires_grad=True)
    mixed = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    with Largest() as largest, mixed:
        summed_nats(x_BTD, targets_BT, head, vocab_size).backward()
    assert CPU_CHUNK / 2 < largest.numel <= CPU_CHUNK < slots * vocab_size / 5
