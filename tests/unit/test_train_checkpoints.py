"""Checkpoints written beside training: what they hold, what a failed or damaged one does, what they serve."""

from __future__ import annotations

import errno
import logging
import threading

import pytest
import torch

import ulm
from pipelines.train import saver, validation
from pipelines.train.loop import train
from tests.tiny_run import SAME, digests, lines, opened_runs, said, stop_after, tiny_tasks
from ulm.artefacts import PARTIAL
from ulm.checkpoints import store
from ulm.errors import TrainingError
from ulm.models.decoder import build

CPU = torch.device("cpu")
FLOAT32_ORDER = {"rtol": 5e-7, "atol": 1e-7}  # one operation at a time or all weights at once


@pytest.fixture
def task(root):
    return tiny_tasks(root)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def held_back(monkeypatch):
    """An event that every writer waits for, and the names of the checkpoints that are being written."""
    go_on, begun, real = threading.Event(), [], store.write

    def write(taken, place):
        begun.append(place.name)
        assert go_on.wait(60), "training did not go on while a checkpoint was being written"
        return real(taken, place)

    monkeypatch.setattr(store, "write", write)
    return go_on, begun


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_what_was_when_it_began(task, held_back):
    go_on, begun = held_back
    at_once, slow = task("at-once", train={"ema_decay": 0.9}), task("slow", train={"ema_decay": 0.9})
    slow = task("slow", train={"ema_decay": 0.9, "checkpoint_every_steps": 3})
    whole, listed = [], []

    def on_step(figures):
        if figures.step == 5:
            listed.extend(store.whole_steps(slow.folder))
            assert begun == ["step-00000003"] and not whole
            go_on.set()

    train(slow, on_step=on_step, on_checkpoint=lambda place: whole.append(place.name))
    assert listed == [] and begun == ["step-00000003", "step-00000006", "step-00000008"]
    assert whole[-1] == "step-00000008"
    train(at_once, should_stop=stop_after(3))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (a.folder / "step-00000003" / name for a in (at_once, slow))
        assert one.read_bytes() == other.read_bytes()
    states = [store.read_state(a.folder / "step-00000003") for a in (at_once, slow)]
    assert states[0] == states[1]


def test_a_checkpoint_waits_for_the_one_before_to_be_whole(task, monkeypatch):
    under_way, most, real = [], [], store.write

    def write(taken, place):
        under_way.append(place)
        most.append(len(under_way))
        threading.Event().wait(0.05)
        made = real(taken, place)
        under_way.pop()
        return made

    monkeypatch.setattr(store, "write", write)
    a = task(train={"checkpoint_every_steps": 1, "keep_last": 8})
    train(a)
    assert most == [1] * 8
    assert [store.step_of(place) for place in store.whole_steps(a.folder)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Output error"), r"step-00000002: the checkpoint could not be written: .*put error"),
        (OSError(errno.ENOSPC, "Full"), r"step-00000002: no space for a checkpoint of 0 MB, [\d,]+ MB are free"),
        (RuntimeError("No space left on device"), r"no space .*there is no checkpoint yet; make room and run"),
    ],
    ids=["io", "full", "full in safetensors"],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(task, monkeypatch, error, message):
    def write(taken, place):
        with ulm.artefacts.new_folder(place) as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise error

    failed, real = threading.Event(), saver.Saver._write

    def writing(self, snapshot, place):
        try:
            return real(self, snapshot, place)
        finally:
            failed.set()

    monkeypatch.setattr(saver.Saver, "_write", writing)
    a, seen = task(train={"steps": 50, "checkpoint_every_steps": 2}), []
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=message):
        patch.setattr(store, "write", write)
        train(a, on_step=lambda figures: (seen.append(figures.step), figures.step == 3 and failed.wait(60)))
    assert seen in ([1, 2], [1, 2, 3])  # the error came before the end of step 3, or not
    assert store.step_folders(a.folder) == [] and not list(a.folder.glob(f"*{PARTIAL}"))
    assert train(a).step == 50  # what was in the way is gone


def test_a_disk_without_room_for_the_checkpoint_is_said_before_writing(task, monkeypatch):
    monkeypatch.setattr(saver, "SPARE_BYTES", 10**18)
    a = task()
    with pytest.raises(TrainingError, match=r"no space for a checkpoint of 0 MB, .* MB are free; .* it resumes"):
        train(a)
    assert store.step_folders(a.folder) == []


def test_a_disk_too_full_for_events_and_metrics_ends_the_run_with_what_to_do(task):
    """/dev/full answers every write as a full disk does."""
    a = task()
    a.folder.mkdir(parents=True)
    (a.folder / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="a: no space left for what the run writes in .*; make room and run it aga"):
        train(a)


def cut_short(place):
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def no_json(place):
    (place / "state.json").write_text("{")


def no_manifest(place):
    (place / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, no_json, no_manifest])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_taken(task, damage, caplog):
    whole, a = task("whole"), task(train={"checkpoint_every_steps": 2})
    train(whole)
    train(a, should_stop=stop_after(6))
    damage(a.folder / "step-00000006")
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        train(a)
    [(step, text)] = said(a, "damaged")
    assert step == 6 and text.startswith("step-00000006 is damaged, the one before, step-00000004, is taken: ")
    assert text.endswith("; it is kept as step-00000006.damaged") and text in caplog.text
    assert said(a, "resume")[-1][0] == 4
    assert lines(a, *SAME) == lines(whole, *SAME)
    assert digests(store.newest(a.folder)) == digests(store.newest(whole.folder))
    assert (a.folder / "step-00000006.damaged").is_dir() and (a.folder / "step-00000006" / "manifest.json").is_file()


def test_an_older_checkpoint_that_cannot_be_read_does_not_end_a_run(task):
    a = task(train={"checkpoint_every_steps": 2, "eval_every_steps": 2, "keep_last": 2})
    train(a, should_stop=stop_after(4))
    no_json(a.folder / "step-00000002")
    train(a)
    assert store.newest(a.folder) == a.folder / "step-00000008"


def test_what_others_are_writing_in_the_run_s_folder_is_left_alone(task):
    """Another thread's file may be about to get its name; a killed writer's folder is removed."""
    a = task()
    (a.folder / f"step-00000002.x{PARTIAL}").mkdir(parents=True)
    (a.folder / f".step-00000001{PARTIAL}").mkdir()
    (a.folder / f".report.html.x{PARTIAL}").write_text("half")
    train(a)
    assert [path.name for path in a.folder.glob(f"*{PARTIAL}")] == [f".report.html.x{PARTIAL}"]


def test_a_removal_that_was_cut_short_is_no_obstacle_to_the_next(task):
    a = task()
    place = train(a).checkpoint
    (a.folder / f".{place.name}{PARTIAL}" / "left").mkdir(parents=True)
    store.remove(place)
    assert store.step_folders(a.folder) == [] and not list(a.folder.glob(f"*{PARTIAL}"))


def test_a_checkpoint_serves_the_average_of_the_weights_of_all_steps(task):
    a, decay = task(train={"ema_decay": 0.8, "eval_every_steps": 3}), 0.8
    expected = {name: tensor.clone() for name, tensor in store.tensors(build(a.spec, seed=0)).items()}
    raw = {}

    def follow(figures):
        raw.update({name: tensor.clone() for name, tensor in store.tensors(runs[0].model).items()})
        keep = min(decay, (1 + figures.step) / (10 + figures.step))
        for name, average in expected.items():
            average.mul_(keep).add_(raw[name], alpha=1 - keep)

    with opened_runs() as runs:
        place = train(a, on_step=follow).checkpoint
    served = store.read_weights(place)
    for name, average in expected.items():
        torch.testing.assert_close(served[name], average, **FLOAT32_ORDER)
    assert not torch.allclose(served["embedding.weight"], raw["embedding.weight"], **FLOAT32_ORDER)
    # and val_loss is of the average
    held_out, model = runs[0].held_out, store.load(place)[0]
    found = validation.figures(held_out.score(model, CPU, 0, 1))
    assert lines(a, "val_loss", "bits_per_byte")[-1] == (found["val_loss"], found["bits_per_byte"])


def test_training_goes_on_from_the_weights_and_not_from_their_average(task):
    fields = {"train": {"ema_decay": 0.8, "eval_every_steps": 2}}
    whole, parts, plain = task("whole", **fields), task("parts", **fields), task("plain")
    train(whole)
    train(parts, should_stop=stop_after(5))
    train(parts)
    assert lines(parts, *SAME) == lines(whole, *SAME)
    assert digests(store.newest(parts.folder)) == digests(store.newest(whole.folder))
    train(plain)
    assert lines(plain, "loss") == lines(whole, "loss"), "the average must not touch the training"


def test_evaluation_and_samples_see_a_model_that_is_not_training(task, monkeypatch):
    seen, real = [], validation.HeldOut.score

    def score(self, model, *how):
        seen.append(model.training)
        return real(self, model, *how)

    monkeypatch.setattr(validation.HeldOut, "score", score)
    with opened_runs() as runs:
        train(task(train={"eval_every_steps": 4}), on_step=lambda figures: seen.append(runs[0].model.training))
    assert seen == [True, True, True, False, True, True, True, True, False, True]


def test_a_run_takes_no_space_beyond_what_it_keeps(task):
    a = task(train={"checkpoint_every_steps": 1, "keep_last": 2, "keep_best": 0})
    train(a)
    folders = sorted(path.name for path in a.folder.iterdir() if path.is_dir() and path.name.startswith((".", "step")))
    assert folders == ["step-00000007", "step-00000008"]
