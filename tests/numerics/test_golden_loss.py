"""The first 20 steps of nano in float32 on a fixed text. A change here is a change of what training does.

`python -m tests.numerics.test_golden_loss` writes the losses anew: do it knowingly, with a line in CHANGELOG.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm.components.loss import NO_TARGET, nats_per_target, summed_nats
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

GOLDEN = Path(__file__).with_name("golden_loss.json")
# Float32 sums in another order: threads and plain instead of AVX-512 kernels move a loss by 1e-6, a weight decay of 0.2
# in place of 0.1 moves step 20 by 2e-3.
ACROSS_MACHINES = 5e-4
SUM_ORDER = {"rtol": 2e-5, "atol": 2e-6}  # float32, chunks added up in another order than one product


def losses(root: Path) -> list[float]:
    """Twenty losses on sentences that a small counter makes; no file and no library's text."""
    subjects, verbs, objects = (
        ("A cat", "The river", "Nobody", "My sister"),
        ("sees", "finds", "holds"),
        ("stone", "light", "it"),
    )
    texts = [
        f"{subjects[i % 4]} {verbs[i * i % 3]} the {objects[i // 4 % 3]} {i * 7 % 11} times.\n" * (1 + i % 5)
        for i in range(200)
    ]
    written_corpus(root, {"train": texts})
    fields = {"steps": 20, "batch_tokens": 1_024, "context_tokens": 128, "precision": "float32"}
    # Below the preset's rate, at which nano jumps on so plain a text and a jump enlarges the last bits' differences.
    optimizer = {"kind": "adamw", "lr": 1.5e-3}
    recipe = {"name": "golden", "corpus": "written", "train": fields, "optimizer": optimizer}
    task = resolve(validate(TrainRecipe, recipe), root=root)
    train(task, device=torch.device("cpu"))
    return [line["loss"] for line in read(task.folder)]


def test_twenty_steps_of_nano_give_the_golden_losses(tmp_path):
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), abs=ACROSS_MACHINES)


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_and_gradients_equal_the_logits_of_the_whole_batch(nano, tied, monkeypatch):
    monkeypatch.setattr("ulm.components.loss.CPU_CHUNK", 300 * 70)  # chunks of 70 of the 96 slots
    generator = torch.Generator().manual_seed(0)
    inputs_BT, targets_BT = (torch.randint(300, (3, 32), generator=generator) for _ in range(2))
    targets_BT[0, 20:] = NO_TARGET
    gradients, totals = [], []
    for chunked in (False, True):
        model = nano(embedding={"kind": "token", "tied": tied})
        x_BTD = model.hidden(inputs_BT)
        if chunked:
            total = summed_nats(x_BTD, targets_BT, model.head, model.vocab_size)
        else:
            total = cross_entropy(model.head(x_BTD).flatten(0, 1), targets_BT.flatten(), reduction="sum")
        (total / 84).backward()
        totals.append(total.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(totals[1], totals[0], **SUM_ORDER)
    for ours, naive in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, naive, **SUM_ORDER)
    with torch.no_grad():
        nats_BT = nats_per_target(x_BTD, targets_BT, model.head, model.vocab_size)
        assert (nats_BT[targets_BT == NO_TARGET] == 0).all()
        torch.testing.assert_close(nats_BT.sum(), totals[0], **SUM_ORDER)
        torch.testing.assert_close(summed_nats(x_BTD, targets_BT, model.head, 300), totals[0], **SUM_ORDER)


def test_bfloat16_autocast_keeps_the_loss_in_float32(nano):
    model = nano()
    tokens_BT = torch.arange(64)[None] % 300
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = summed_nats(model.hidden(tokens_BT), tokens_BT, model.head, 300)
        total.backward()
    exact = cross_entropy(model(tokens_BT)[0], tokens_BT[0], reduction="sum")
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=5e-3)  # bfloat16 keeps 8 bits
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in losses(Path(made))]) + "\n")
