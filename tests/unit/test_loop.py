from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.train import folder
from pipelines.train.figures import MetricsFile, Tail, read
from pipelines.train.loop import Result, train
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.written_corpus import written_corpus
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Order, batch_digest
from ulm.corpus.rows import RowPlan
from ulm.errors import ConfigError, TrainingError
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe
from ulm.registry import configure

WORDS = "the small model learns what a text is made of and then says how likely the next word will be".split()
TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(12)) + f". {i}\n" for i in range(60)]


def recipe(name="a", **fields):
    train_fields = {"steps": 8, "batch_tokens": 256, "context_tokens": 64, "precision": "float32"}
    fields = {"corpus": "written", "model": "nano", **fields}
    return validate(TrainRecipe, {"name": name, **fields, "train": {**train_fields, **fields.get("train", {})}})


@pytest.fixture
def task(root) -> Callable[..., TrainTask]:
    """Makes tasks on a corpus of 50 short texts, with fields laid over."""
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10], "test": []})
    whole = resolve(recipe(), root=root)

    def make(name: str = "a", **fields) -> TrainTask:
        return changed(whole, name, **fields)

    return make


def lines(task: TrainTask, *keys: str) -> list[tuple]:
    return [tuple(line.get(key) for key in keys) for line in read(task.folder)]


def weights(checkpoint: Path) -> str:
    return read_manifest(checkpoint).files["model.safetensors"]


def test_the_loss_falls_and_each_step_stands_in_the_metrics_once(task):
    done = train(task(num_steps=30))
    found = lines(task(), "step", "loss", "tokens", "step_tokens")
    assert [step for step, *_ in found] == list(range(1, 31))
    assert found[0][1] > 5.4  # ln 257 is 5.55
    assert found[-1][1] < 3.5  # letters of English by their frequency alone: about 3
    assert found[-1][2] == sum(step_tokens for *_, step_tokens in found)
    assert done == Result(30, task().folder / "step-00000030")
    last = folder.last_line(task(num_steps=30))
    assert last["loss"] == found[-1][1] and 2 < last["bits_per_byte"] < 5 and last["tokens_per_second"] > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(task, schedule):
    fields = {"schedule": configure("schedule", schedule), "num_steps": 7}
    whole = train(task("whole", **fields))
    stopping = iter([False, False, False, True])
    stopped = train(task("parts", **fields), should_stop=lambda: next(stopping))
    assert stopped == Result(3, task("parts").folder / "step-00000003", stopped=True)
    parts = train(task("parts", **fields))
    keys = ("step", "loss", "tokens", "batch_digest", "lr", "grad_norm", "val_loss", "bits_per_byte")
    assert lines(task("parts"), *keys) == lines(task("whole"), *keys)
    assert weights(parts.checkpoint) == weights(whole.checkpoint)
    assert (
        read_manifest(parts.checkpoint).files["optimizer.safetensors"]
        == (read_manifest(whole.checkpoint).files["optimizer.safetensors"])
    )


def test_killed_without_notice_a_run_resumes_with_the_same_batches_each_step_once(task, tmp_path):
    """SIGKILL at step 6, after the checkpoint of step 4: steps 5 and 6 are done again, and only then counted."""
    whole, killed = task("whole"), task("killed", checkpoint_every_steps=4)
    script = (
        "import os, pickle, signal, sys, time, torch\n"
        "from pipelines.train.loop import train\n"
        "torch.set_num_threads(1)\n"
        "task = pickle.load(open(sys.argv[1], 'rb'))\n"
        "def kill(figures):\n"
        "    while figures.step == 6:\n"
        "        if (task.folder / 'step-00000004').exists():\n"  # written beside the steps, late on a busy machine
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(0.01)\n"
        "train(task, on_step=kill)\n"
    )
    (tmp_path / "task").write_bytes(pickle.dumps(killed))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "task")], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert [step for (step,) in lines(killed, "step")] == [1, 2, 3, 4, 5, 6]
    assert store.newest(killed.folder) == killed.folder / "step-00000004"
    steps_done_again = []
    train(killed, on_step=lambda figures: steps_done_again.append(figures.step))
    assert steps_done_again == [5, 6, 7, 8]
    train(whole)
    assert lines(killed, "step", "batch_digest", "loss") == lines(whole, "step", "batch_digest", "loss")


def test_micro_batches_change_the_loss_by_no_more_than_the_order_of_sums(task):
    train(task("one"))
    train(task("many", micro_batch_rows=1))
    for (one,), (many,) in zip(lines(task("one"), "loss"), lines(task("many"), "loss"), strict=True):
        assert one == pytest.approx(many, abs=1e-4)  # float32 sums in another order, over eight updates


def test_checkpoints_come_when_due_and_the_newest_three_stay(task):
    seen = []

    def whole(place):
        store.check(place)
        seen.append(store.step_of(place))

    train(task(checkpoint_every_steps=1), on_checkpoint=whole)
    assert seen == sorted(set(seen)) and set(seen) <= set(range(1, 9)) and seen[-1] == 8
    assert [store.step_of(p) for p in store.whole_steps(task().folder)] == [6, 7, 8]


def test_evaluation_counts_the_bytes_of_text_and_no_end_of_text(task, root):
    """With bytes as tokens, one byte a token: bits per byte are nats per byte / ln 2, over all val documents."""
    train(task(eval_tokens=None))
    model, tokenizer = store.load(store.newest(task().folder))
    nats = num_bytes = 0.0
    for text in TEXTS[:10]:
        tokens = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)]])
        logprobs = model(tokens[:, :-1]).log_softmax(-1)
        nats -= logprobs.gather(-1, tokens[:, 1:, None]).sum().item()
        num_bytes += len(text.encode())
    found = folder.last_line(task())["bits_per_byte"]
    # Documents longer than the context are cut, and short ones share a row, so the two only agree roughly.
    assert found == pytest.approx(nats / np.log(2) / num_bytes, rel=0.1)


def test_a_corpus_without_val_has_no_bits_per_byte(root):
    written_corpus(root, {"train": TEXTS})
    task = resolve(recipe(train={"steps": 1}), root=root)
    train(task)
    assert folder.last_line(task)["bits_per_byte"] is None
    assert "val_loss" not in next(read(task.folder))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(task):
    wild = task(num_steps=60, checkpoint_every_steps=1, optimizer=configure("optimizer", {"kind": "adamw", "lr": 1e18}))
    with pytest.raises(TrainingError, match=r"a: step \d+: loss .*not finite; the last checkpoint is .*step-0000"):
        train(wild)
    newest = store.newest(wild.folder)
    assert newest is not None
    assert [step for (step,) in lines(wild, "step")][-1] == int(newest.name[5:])
    assert all(tensor.isfinite().all() for tensor in store.load(newest)[0].state_dict().values())


def test_init_from_takes_weights_and_neither_optimizer_nor_step(task, root):
    seed = train(task("seed"))
    branch = task("branch", init_from=seed.checkpoint, num_steps=2)
    train(branch)
    assert lines(branch, "step", "tokens")[0][0] == 1
    first_loss, seed_loss = lines(branch, "loss")[0][0], lines(task("seed"), "loss")[-1][0]
    assert abs(first_loss - seed_loss) < 0.5 < lines(task("seed"), "loss")[0][0] - first_loss
    assert read_manifest(store.newest(branch.folder)).init_from == read_manifest(seed.checkpoint).digest


def test_chosen_documents_are_trained_on_alone(task, tmp_path):
    chosen = np.array([3, 4, 17, 52])  # the last is of val
    np.save(tmp_path / "chosen.npy", chosen)
    expert = task(documents=tmp_path / "chosen.npy", num_steps=3)
    train(expert)
    corpus = Corpus.read(expert.corpus)
    plan = RowPlan.make(corpus, "train", context_tokens=64, documents=chosen)
    order = Order(plan.classes, seed=0)
    batches = [order.rows(4 * step, 4) for step in range(3)]
    assert lines(expert, "batch_digest") == [(batch_digest(rows),) for rows in batches]
    assert lines(expert, "step_tokens") == [(plan.num_targets(rows).sum(),) for rows in batches]


def test_a_run_that_goes_on_takes_the_rows_after_those_of_the_first(task):
    train(task("first", num_steps=6))
    train(task("second", num_steps=3, start_cursor=3 * task().rows_per_batch))
    assert lines(task("second"), "batch_digest") == lines(task("first"), "batch_digest")[3:]


def test_a_finished_run_trains_nothing_and_a_folder_of_another_task_is_refused(task):
    train(task())
    before = (task().folder / "metrics.jsonl").stat().st_mtime_ns
    assert train(task(), on_step=lambda figures: pytest.fail("trained again")).step == 8
    assert (task().folder / "metrics.jsonl").stat().st_mtime_ns == before
    train(task(checkpoint_every_steps=3, eval_tokens=10))  # these may change
    with pytest.raises(ConfigError, match=r"name: run 'a' exists with another train\.steps \(8, now 9\) \(give this"):
        train(task(num_steps=9))


def test_workers_that_cannot_share_a_batch_are_refused(task):
    with pytest.raises(ConfigError, match=r"train\.workers: 3 workers cannot share the 4 rows"):
        train(task(), rank=0, world_size=3)


def test_no_chosen_training_document_is_an_error(task, tmp_path):
    np.save(tmp_path / "chosen.npy", np.array([50, 51]))  # both of val
    with pytest.raises(ConfigError, match="corpus: .* has no training documents among those chosen"):
        train(task(documents=tmp_path / "chosen.npy"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": {"batch_tokens": 100}}, r"train\.batch_tokens: 100 is not a multiple .* 64 \(for example 128\)"),
        ({"model": {"preset": "nano", "vocab_size": 300}}, r"model\.vocab_size: 300 tokens, .* has 257"),
        ({"model": {"preset": "nano", "context_tokens": 32}}, r"train\.context_tokens: 64, but model.* is 32"),
        ({"corpus": "writen"}, r"corpus: no corpus 'writen' \(.*written"),
        ({"init_from": "nothing"}, r"init_from: no checkpoint 'nothing'"),
    ],
)
def test_what_does_not_fit_is_said_before_training_starts(task, root, fields, message):
    with pytest.raises(ConfigError, match=message):
        resolve(recipe(**fields), root=root)


def test_a_recipe_without_a_model_takes_the_one_it_begins_with(task, root):
    checkpoint = train(task("seed", num_steps=1)).checkpoint
    fields = {"name": "b", "corpus": "written", "init_from": str(checkpoint), "train": {"steps": 1}}
    assert resolve(validate(TrainRecipe, fields), root=root).spec == task().spec
    other = validate(TrainRecipe, {**fields, "model": {"preset": "nano", "num_layers": 2, "context_tokens": 64}})
    after = {**fields, "model": {"preset": "nano", "norm_placement": "after", "context_tokens": 64}}
    with pytest.raises(ConfigError, match="init_from: its model has another norm_placement"):
        resolve(validate(TrainRecipe, after), root=root)
    with pytest.raises(ConfigError, match="init_from: its model has another num_layers"):
        resolve(other, root=root)


def test_length_follows_from_steps_tokens_or_tokens_per_parameter(task, root):
    assert resolve(recipe(train={"steps": None, "tokens": 1_000}), root=root).num_steps == 4
    per_parameter = resolve(recipe(train={"steps": None, "tokens_per_parameter": 0.01}), root=root)
    parameters = 257 * 96 + 3 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 256 + 2 * 96) + 96
    assert per_parameter.num_steps == -(-0.01 * parameters // 256)


def test_the_preset_proposes_rate_and_batch_and_the_recipe_wins(task, root):
    plain = resolve(recipe(train={"batch_tokens": None}), root=root)
    assert (plain.batch_tokens, plain.optimizer.lr) == (8_192, 4e-3)
    assert resolve(recipe(optimizer={"kind": "adamw", "lr": 1e-3}), root=root).optimizer.lr == 1e-3


def _metrics(*steps):
    """Lines of metrics.jsonl, with no more than every line has."""
    line = {"loss": 2.0, "tokens_per_second": 9.0, "step_tokens": 768}
    return "".join(json.dumps({"step": step, **line}) + "\n" for step in steps)


def test_a_metrics_file_cuts_lost_work_and_a_line_that_a_kill_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(_metrics(1, 2, 3) + '{"ste')
    with MetricsFile(tmp_path, last_step=2):
        pass
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_a_tail_tells_each_new_step_once_across_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(_metrics(1))
    tail = Tail(tmp_path)
    with path.open("a") as file:
        file.write(_metrics(2, 3) + '{"st')
    assert [line["step"] for line in tail.new_lines()] == [2, 3]
    assert tail.new_lines() == []
    with MetricsFile(tmp_path, last_step=1):
        pass
    with path.open("a") as file:
        file.write(_metrics(2, 3, 4))
    assert [line["step"] for line in tail.new_lines()] == [4]
