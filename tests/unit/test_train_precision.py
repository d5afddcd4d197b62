"""bfloat16, pure bfloat16, float16 with scaling, and torch.compile: the same training, in other numbers."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file

from pipelines.train import update
from pipelines.train.loop import train
from pipelines.train.task import TrainTask
from tests.changed_task import changed
from tests.tiny_run import SAME, digests, lines, opened_runs, said, stop_after, tiny_tasks
from ulm import runtime
from ulm.checkpoints import store
from ulm.models.decoder import build

# Nats. bfloat16 keeps 8 bits of a number, float16 11; over six updates the losses drift no further apart.
BFLOAT16_NATS = 0.02
FLOAT16_NATS = 2e-3
PURE_BFLOAT16_NATS = 0.1  # here small moves of the weights are lost too
COMPILED_NATS = 1e-5  # float32 sums in another order


@pytest.fixture
def task(root):
    return tiny_tasks(root)


def losses(task: TrainTask) -> list[float]:
    return [loss for (loss,) in lines(task, "loss")]


@pytest.mark.parametrize(
    ("precision", "steps", "nats"),
    [("bfloat16", 6, BFLOAT16_NATS), ("pure_bfloat16", 6, PURE_BFLOAT16_NATS), ("float16", 3, FLOAT16_NATS)],
)
def test_the_losses_of_a_precision_are_close_to_those_of_float32(task, precision, steps, nats):
    train(task("exact", train={"steps": steps}))
    train(task("less", train={"steps": steps, "precision": precision}))
    exact, less = losses(task("exact")), losses(task("less"))
    assert less == pytest.approx(exact, abs=nats)
    assert less != exact, "nothing was computed in it"
    assert exact[-1] < exact[0] - 0.05


def test_autocast_keeps_weights_and_optimizer_in_float32_and_pure_bfloat16_keeps_nothing_in_it(task):
    for precision, dtype in (("bfloat16", torch.float32), ("pure_bfloat16", torch.bfloat16)):
        place = train(task(precision, train={"steps": 2, "precision": precision})).checkpoint
        assert {t.dtype for t in load_file(place / "model.safetensors").values()} == {dtype}
        moments = {n: t for n, t in load_file(place / "optimizer.safetensors").items() if "exp_avg" in n}
        assert moments and {t.dtype for t in moments.values()} == {dtype}
        model, _ = store.load(place)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        stored = load_file(place / "model.safetensors")["embedding.weight"]
        assert torch.equal(model.embedding.weight, stored.float())


def test_pure_bfloat16_leaves_the_tables_of_angles_exact(task):
    with opened_runs() as runs:
        train(task(train={"steps": 1, "precision": "pure_bfloat16"}))
    exact = dict(build(task().spec, seed=0).named_buffers())
    found = dict(runs[0].model.named_buffers())
    assert exact and all(torch.equal(found[name], table) for name, table in exact.items())


@pytest.mark.parametrize("precision", ["bfloat16", "pure_bfloat16"])
def test_a_resumed_run_is_exact_in_bfloat16_too(task, precision):
    fields = {"train": {"steps": 5, "precision": precision, "ema_decay": 0.9, "eval_every_steps": 2}}
    whole, parts = task("whole", **fields), task("parts", **fields)
    train(whole)
    train(parts, should_stop=stop_after(3))
    train(parts)
    assert lines(parts, *SAME) == lines(whole, *SAME)
    assert digests(store.newest(parts.folder)) == digests(store.newest(whole.folder))


def test_the_average_of_bfloat16_weights_is_kept_in_float32(task):
    """In bfloat16 an average with a decay of 0.999 would never move: its steps are less than one part in 256."""
    fields = {"train": {"steps": 3, "precision": "pure_bfloat16", "ema_decay": 0.999}}
    place = train(task(**fields)).checkpoint
    served, kept = load_file(place / "model.safetensors"), load_file(place / "optimizer.safetensors")
    assert {t.dtype for t in served.values()} == {torch.float32}
    assert {kept[name + store.RAW].dtype for name in served} == {torch.bfloat16}
    assert not torch.equal(served["embedding.weight"], served["embedding.weight"].bfloat16().float())


def test_a_float16_gradient_that_overflows_changes_no_weight_and_halves_the_scale(task):
    a = task(
        train={"precision": "float16", "steps": 4, "batch_tokens": 64, "checkpoint_every_steps": 1, "keep_last": 9}
    )
    with opened_runs() as runs:

        def too_large(figures):
            if figures.step == 1:
                runs[0].updater.scaler.update(2.0**60)

        train(a, on_step=too_large, should_stop=stop_after(2))
        assert runs[0].updater.scaler.get_scale() == 2.0**59
    first, second = (store.step_folder(a.folder, step) / "model.safetensors" for step in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert [norm is None for (norm,) in lines(a, "grad_norm")] == [False, True]
    assert all(loss < 6 for loss in losses(a)) and said(a, "rollback") == []
    with opened_runs() as runs:  # the scale is part of what is resumed
        train(a)
    assert runs[0].updater.scaler.get_scale() == 2.0**57
    assert [norm for (norm,) in lines(a, "grad_norm")][1:] == [None] * 3


def test_auto_is_the_fastest_that_the_device_has(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has_it, capability, expected in ((True, (8, 0), ("bfloat16",) * 2), (False, (7, 5), ("float32", "float16"))):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where, capability=capability: capability)
        assert (runtime.precision("auto", cpu), runtime.precision("auto", gpu)) == expected
    assert runtime.precision("float32", cpu) == "float32"


def test_the_rate_of_a_dtype_that_the_cpu_emulates_is_measured_in_a_second_or_so():
    """Emulated float16 is a thousand times slower than float32: at a fixed size of 2,048 that took four minutes."""
    exact, emulated = (runtime.peak_flops(torch.device("cpu"), precision) for precision in ("float32", "float16"))
    assert emulated > 1e6 and exact > 1e9


@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of itself while it compiles
def test_compiled_layers_give_the_losses_of_plain_ones_and_an_evaluation_compiles_nothing(task, caplog):
    if not runtime.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    from torch._dynamo.utils import counters

    fields = {"steps": 5, "eval_every_steps": 2, "compile": True, "checkpoint_every_steps": 1}
    plain, whole = task("plain", train={**fields, "compile": False}), task("whole", train=fields)
    train(plain)
    counters.clear()
    graphs = []
    train(whole, on_step=lambda figures: graphs.append(counters["stats"]["unique_graphs"]))
    assert ", compiled; " in said(whole, "start")[0][1] and ", compiled" not in said(plain, "start")[0][1]
    assert graphs[0] >= 1 and graphs == [graphs[0]] * 5, "an evaluation or a later step compiled something"
    assert losses(whole) == pytest.approx(losses(plain), abs=COMPILED_NATS)
    assert lines(whole, "val_loss")[1][0] == pytest.approx(lines(plain, "val_loss")[1][0], abs=COMPILED_NATS)
    parts = task("parts", train=fields)
    train(parts, should_stop=stop_after(3))
    train(parts)
    assert lines(parts, *SAME) == lines(whole, *SAME)
    assert digests(store.newest(parts.folder)) == digests(store.newest(whole.folder))


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_a_run_says_so_once_and_goes_on(task, missing, monkeypatch, tmp_path, caplog):
    if missing == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    else:
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        train(task(train={"steps": 2, "compile": True, "eval_every_steps": 1}))
    warnings = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    needed = "a C++ compiler and Python's headers"
    assert warnings == [f"torch.compile needs {needed}, of which something is missing: running eagerly"]
    assert lines(task(), "step") == [(1,), (2,)]


def test_whether_to_compile_follows_from_the_length_of_the_task(task, monkeypatch):
    """The same for a run that is nearly done: resumed, it must compute what it computed before."""
    monkeypatch.setattr(runtime, "can_compile", lambda where: True)
    cpu, short = torch.device("cpu"), task()
    model = build(short.spec)
    long = changed(short, "long", num_steps=10**8)
    assert not update.compiles(short, model, cpu) and update.compiles(long, model, cpu)
    assert update.compiles(changed(short, "a", compile=True), model, cpu)
    assert not update.compiles(changed(long, "b", compile=False), model, cpu)
