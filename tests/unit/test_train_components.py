"""What training owes to kinds that ask for more than rows of tokens: documents, losses of their own, an optimizer."""

from __future__ import annotations

import pytest
import torch

from pipelines.train import figures
from pipelines.train.feed import WorkerBatch
from pipelines.train.loop import train
from pipelines.train.task import resolve
from pipelines.train.update import Updater
from tests.written_corpus import written_corpus
from ulm import registry
from ulm.components.loss import NO_TARGET, summed_nats
from ulm.models.decoder import build
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

TEXTS = [f"{i} men went to mow, went to mow a meadow. " * (1 + i % 3) for i in range(40)]
CPU = torch.device("cpu")
SUMS = 1e-5  # the same float32 sums in other orders, of gradients below 1


@pytest.fixture
def task(tmp_path):
    written_corpus(tmp_path, {"train": TEXTS[10:], "val": TEXTS[:10]})

    def make(model, **fields):
        usual = {"steps": 4, "batch_tokens": 256, "precision": "float32", "compile": False}
        recipe = {"name": "a", "corpus": "written", "model": {"preset": "nano", "context_tokens": 64, **model}}
        recipe["train"] = {**usual, **fields.pop("train", {})}
        return resolve(validate(TrainRecipe, {**recipe, **fields}), root=tmp_path)

    return make


def updater_of(task, model):
    optimizer = registry.find("optimizer", task.optimizer.kind).build(task.optimizer, model, task.optimizer.lr)
    return Updater(task, model, optimizer, CPU, 1)


def batch_of(task, segments_BT=None):
    shape = (task.rows_per_batch, task.spec.context_tokens)
    tokens_BT = torch.randint(0, task.spec.vocab_size, shape, generator=torch.manual_seed(0))
    targets_BT = tokens_BT.roll(-1, dims=1)
    segments_BT = torch.zeros(shape, dtype=torch.long) if segments_BT is None else segments_BT.expand(shape)
    targets_BT = targets_BT.masked_fill(segments_BT < 0, NO_TARGET)
    return WorkerBatch(tokens_BT, targets_BT, segments_BT, int((targets_BT != NO_TARGET).sum()), "")


def gradients(task, batch):
    model = build(task.spec, seed=0)
    updater = updater_of(task, model)
    nats = updater._gradients(batch)
    return nats, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, model


def test_under_a_document_mask_no_text_sees_another_one_of_its_row(task):
    a = task({"mask": ["causal", "document"]})
    segments_BT = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 14])
    batch = batch_of(a, segments_BT)
    nats, found, model = gradients(a, batch)
    model.zero_grad()
    total = torch.zeros(())
    for row, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True):
        for part in (slice(20), slice(20, 50)):
            x_BTD = model.hidden(row[None, part])
            total = total + summed_nats(x_BTD, targets[None, part], model.head, model.vocab_size)
    (total / batch.num_targets).backward()
    assert nats.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=SUMS)
    mixed, _, _ = gradients(task({}), batch)
    assert abs(mixed.item() - nats.item()) > 1e-3  # without the mask they do


def test_a_run_with_a_document_mask_trains_and_evaluates(task):
    a = task({"mask": ["causal", "document"]})
    train(a)
    assert [line["step"] for line in figures.read(a.folder)] == [1, 2, 3, 4]
    assert all("val_loss" in line for line in list(figures.read(a.folder))[-1:])


def test_the_reported_loss_is_of_the_text_alone_and_the_balance_of_experts_moves_the_router(task):
    plain, balanced = (task({"feedforward": {"kind": "moe", "balance": weight}}) for weight in (0.0, 5.0))
    batch = batch_of(plain)
    (nats, without, _), (same, with_balance, _) = gradients(plain, batch), gradients(balanced, batch)
    assert nats.item() == same.item()
    name = "blocks.0.feedforward.router.weight"
    assert (with_balance[name] - without[name]).abs().max() > 10 * SUMS


def test_the_balance_of_experts_is_the_same_when_activations_are_made_again(task):
    model = {"feedforward": {"kind": "moe", "balance": 5.0}}
    whole, again = task(model), task(model, train={"checkpoint_activations": True})
    batch = batch_of(whole)
    (nats, expected, _), (same, found, _) = gradients(whole, batch), gradients(again, batch)
    assert nats.item() == pytest.approx(same.item(), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=SUMS, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of itself while it compiles
def test_a_compiled_mixture_of_experts_has_the_losses_of_a_plain_one(task):
    found = []
    for name, compiled in (("plain", False), ("compiled", True)):
        a = task({"feedforward": "moe", "num_layers": 1}, name=name, train={"steps": 2, "compile": compiled})
        train(a)
        found.append([line["loss"] for line in figures.read(a.folder)])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_preset_proposes_its_optimizer_where_the_recipe_names_none(task):
    assert task({"preset": "modern", "size": "nano"}).optimizer.kind == "muon"
    assert task({"preset": "modern", "size": "nano"}, optimizer={"kind": "adamw"}).optimizer.kind == "adamw"
    assert task({"preset": "llama-like", "size": "nano"}).optimizer.kind == "adamw"
    slower = task({"preset": "modern", "size": "nano"}, optimizer={"lr": 1e-3}).optimizer
    assert (slower.kind, slower.lr) == ("muon", 1e-3)
    lion, usual = task({}, optimizer={"kind": "lion"}), task({})
    assert lion.optimizer.lr == pytest.approx(usual.optimizer.lr / 10)
