"""The plan of a swarm: the protocol's shares and schedules, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ulm
from pipelines.swarm import widen
from pipelines.swarm.plan import Plan, plan_swarm
from tests.written_corpus import write_kinds
from ulm.cli import swarm
from ulm.cli.main import app
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.models.account import forward_flops_per_token, on_meta, train_flops_per_token
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a corpus of three kinds of text, bytes as tokens."""
    root = tmp_path_factory.mktemp("swarm-home")
    write_kinds(root)
    return root


def plan(home: Path, **changes: Any) -> Plan:
    train = {"steps": 13, "batch_tokens": 256, "context_tokens": 64, **changes.pop("train", {})}
    fields = {"corpus": "tiny", "model": {"preset": "nano", "num_layers": 1}, "experts": 3, **changes}
    return plan_swarm(validate(SwarmRecipe, {"name": "t", "train": train, **fields}), root=home)


def test_the_length_is_shared_between_seed_and_experts_and_dense_gets_what_the_experts_get(home):
    of = plan(home, train={"steps": 43}, seed_share=0.5)
    expert_steps = [task.num_steps for task in of.experts.values()]
    assert expert_steps == [7, 7, 7]
    assert of.seed.num_steps + sum(expert_steps) == 43
    assert of.dense.num_steps == sum(expert_steps)
    assert {task.batch_tokens for task in (of.seed, of.dense, *of.experts.values())} == {256}
    assert of.dense.start_cursor == of.seed.num_steps * 256 // 64  # reads on where the seed stopped
    assert of.dense.documents is None and of.seed.documents is None


def test_experts_and_dense_begin_with_the_seeds_last_checkpoint(home):
    of = plan(home)
    assert of.seed.init_from is None
    for task in (of.dense, *of.experts.values()):
        assert task.init_from == of.seed.folder / f"step-{of.seed.num_steps:08d}"


def test_the_seed_alone_may_begin_with_a_checkpoint_whose_model_all_then_have(home):
    corpus = Corpus.open("tiny", root=home)
    spec = ulm.ModelSpec.preset("nano", vocab_size=corpus.tokenizer.vocab_size, num_layers=2, context_tokens=64)
    checkpoint = home / "runs" / "taken" / "step-00000000"
    if not checkpoint.is_dir():
        ulm.save(ulm.build(spec, seed=0), corpus.tokenizer, checkpoint)
    train = {"steps": 13, "batch_tokens": 256}
    fields = {"name": "i", "corpus": "tiny", "experts": 3, "train": train, "init_from": "taken"}
    of = plan_swarm(validate(SwarmRecipe, {**fields, "controls": ["dense", "dense_flops"]}), root=home)
    assert of.seed.init_from == checkpoint
    assert {task.spec for task in (of.seed, of.dense, *of.experts.values())} == {spec}
    assert of.dense_flops.init_from is None
    assert {task.init_from for task in (of.dense, *of.experts.values())} == {of.seed.folder / "step-00000007"}


def test_the_seed_holds_its_rate_and_experts_and_dense_fall_linearly_to_a_tenth(home):
    of = plan(home, warmup_steps=2)
    assert (of.seed.schedule.kind, of.seed.schedule.decay_share) == ("wsd", 0.0)
    for task in (of.dense, *of.experts.values()):
        schedule = task.schedule
        assert (schedule.kind, schedule.decay_share, schedule.final_share, schedule.warmup_steps) == (
            "wsd",
            1.0,
            0.1,
            2,
        )


def test_experts_divide_the_training_documents_among_them(home):
    of = plan(home)
    taken = np.concatenate([task.chosen_documents() for task in of.experts.values()])
    assert sorted(taken) == list(range(of.corpus.documents.num_rows))
    assert [task.run for task in of.experts.values()] == ["t-e00", "t-e01", "t-e02"]


def test_the_random_control_is_the_same_swarm_over_other_clusters(home):
    of = plan(home, controls=["random"])
    assert of.dense is None
    assert [task.run for task in of.random.values()] == ["t-r00", "t-r01", "t-r02"]
    for expert, control in zip(of.experts.values(), of.random.values(), strict=True):
        assert control.num_steps == expert.num_steps
        assert control.chosen_documents().tolist() != expert.chosen_documents().tolist()


def test_the_larger_dense_control_costs_per_token_what_the_mixture_costs_and_as_much_in_all_as_the_swarm(home):
    of = plan(home, controls=["dense_flops"], train={"steps": 400}, evaluation={"top_k": 3})
    small, large = (train_flops_per_token(on_meta(task.spec), 64) for task in (of.seed, of.dense_flops))
    assert large / small == pytest.approx(3, rel=widen.TOLERANCE)
    steps = of.seed.num_steps + sum(task.num_steps for task in of.experts.values())
    rounding = 0.5 / of.dense_flops.num_steps  # a whole number of steps
    assert of.dense_flops.num_steps * large == pytest.approx(steps * small, rel=rounding)
    assert of.dense_flops.init_from is None and of.dense_flops.documents is None
    assert (of.dense_flops.schedule.decay_share, of.dense_flops.schedule.final_share) == (1.0, 0.1)
    assert of.dense_flops in of.tasks() and of.dense is None


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("preset", ["llama-like", "modern"])
def test_a_widened_model_is_of_the_same_shape_and_costs_so_many_times_as_much(preset, times):
    spec = ulm.ModelSpec.preset(preset, size="nano", vocab_size=512)
    large = widen.widened(spec, times)
    costs = [forward_flops_per_token(on_meta(s), s.context_tokens) for s in (spec, large)]
    assert costs[1] / costs[0] == pytest.approx(times, rel=widen.TOLERANCE)
    assert large.head_dim == spec.head_dim and large.context_tokens == spec.context_tokens
    assert 0.5 < (large.d_model / large.num_layers) / (spec.d_model / spec.num_layers) < 2
    assert (large == spec) == (times == 1)


def test_with_reassign_the_experts_tokens_are_halved_and_the_first_pass_holds_its_rate(home):
    of, once = plan(home, reassign=True, train={"steps": 43}), plan(home, train={"steps": 43})
    assert {task.num_steps + of.second_steps for task in of.experts.values()} == {7}
    assert of.second_steps == 4 and once.second_steps == 0
    assert [task.run for task in of.experts.values()] == ["t-e00-first", "t-e01-first", "t-e02-first"]
    assert {task.schedule.decay_share for task in of.experts.values()} == {0.0}
    assert of.dense.num_steps == once.dense.num_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 4}}, "train: 4 steps are too few for a seed and 3 experts .*at least 12 steps"),
        (
            {"train": {"batch_tokens": 64_000}},
            r"experts: cluster 0 \(law\) has [\d,]+ training tokens, less than one batch of 64,000 .*fewer experts",
        ),
        ({"parallel": 2, "train": {"workers": 2}}, "parallel: runs go side by side with one worker each"),
        ({"reassign": True, "train": {"steps": 8}}, "reassign: 8 steps leave one for each of 3 experts, .* two passes"),
        ({"corpus": "tinny"}, "corpus: no corpus 'tinny'"),
        ({"experts": 500}, "experts: 500 clusters of 60 training documents"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(home, changes, message):
    if "experts" in changes:
        changes = {**changes, "train": {"steps": 5_000}}
    with pytest.raises(ConfigError, match=message):
        plan(home, **changes)


def test_the_command_says_what_is_wrong_before_ray_starts(home, tmp_path, monkeypatch):
    def no_ray(*_: Any) -> Any:
        raise AssertionError("Ray is not asked for")

    monkeypatch.setenv("ULM_HOME", str(home))
    monkeypatch.setattr(swarm, "session", no_ray)
    for text, said in (
        ("corpus: tinny\ntrain: {steps: 9}", "no corpus 'tinny'"),
        ("corpus: tiny\ntrain: {steps: 1}", "too few"),
    ):
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(app, ["swarm", "train", str(tmp_path / "a.yaml")])
        assert isinstance(done.exception, ConfigError) and said in str(done.exception)


def test_a_swarm_takes_the_optimizer_that_its_preset_proposes(home):
    modern = {"preset": "modern", "size": "nano", "num_layers": 1}
    assert {task.optimizer.kind for task in plan(home, model=modern).tasks()} == {"muon"}
    assert {task.optimizer.kind for task in plan(home, model=modern, optimizer="adamw").tasks()} == {"adamw"}
    assert {task.optimizer.kind for task in plan(home).tasks()} == {"adamw"}
