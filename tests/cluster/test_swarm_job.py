"""The swarm job: the protocol's shares, a whole small swarm, resuming, stopping, and what it refuses."""

import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.swarm_job import Plan, plan_swarm, train_swarm
from tests.tiny_corpus import write_corpus
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe
from ulm.swarm.manifest import Swarm

# Ray Train starts threads in this process that trip over Ray Data's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
WORDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section liable contract",
    "code": "def return import class self lambda yield parser buffer index",
    "medicine": "patient dose tablet symptom fever clinic nurse therapy vaccine blood",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a corpus of three kinds of text, bytes as tokens."""
    generator = random.Random(0)
    documents = [
        (domain, ("train", "train", "val", "test")[number % 4], " ".join(generator.choices(words.split(), k=25)))
        for number in range(40)
        for domain, words in WORDS.items()
    ]
    root = tmp_path_factory.mktemp("swarm-home")
    write_corpus(root, documents)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def recipe(name: str = "t", **changes: Any) -> SwarmRecipe:
    train = {"steps": 13, "batch_tokens": 256, "context_tokens": 64, **changes.pop("train", {})}
    fields = {"corpus": "tiny", "model": {"preset": "nano", "num_layers": 1}, "experts": 3, **changes}
    return validate(SwarmRecipe, {"name": name, "train": train, **fields})


def plan(home: Path, **changes: Any) -> Plan:
    return plan_swarm(recipe(**changes), root=home)


def test_the_length_is_shared_between_seed_and_experts_and_dense_gets_what_the_experts_get(home):
    of = plan(home, train={"steps": 43}, seed_share=0.5)
    expert_steps = [task.num_steps for task in of.experts.values()]
    assert expert_steps == [7, 7, 7]
    assert of.seed.num_steps + sum(expert_steps) == 43
    assert of.dense.num_steps == sum(expert_steps)
    assert {task.batch_tokens for task in (of.seed, of.dense, *of.experts.values())} == {256}
    assert of.dense.start_cursor == of.seed.num_steps * 256 // 64  # reads on where the seed stopped
    assert of.dense.documents is None and of.seed.documents is None


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 4}}, "train: 4 steps are too few for a seed and 3 experts .*at least 12 steps"),
        (
            {"train": {"batch_tokens": 64_000}},
            r"experts: cluster 0 \(law\) has [\d,]+ training tokens, less than one batch of 64,000 .*fewer experts",
        ),
        ({"corpus": "tinny"}, "corpus: no corpus 'tinny'"),
        ({"experts": 500}, "experts: 500 clusters of 60 training documents"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(home, changes, message):
    if "experts" in changes:
        changes = {**changes, "train": {"steps": 5_000}}
    with pytest.raises(ConfigError, match=message):
        plan(home, **changes)


@pytest.mark.usefixtures("cluster")
def test_a_swarm_is_trained_written_compared_and_found_finished_when_run_again(home):
    seen: dict[str, tuple[int, int]] = {}
    result = train_swarm(recipe(), root=home, on_progress=lambda run, step, of, _: seen.update({run: (step, of)}))
    swarm = Swarm.open("t", root=home)
    assert result["swarm"] == str(swarm.folder) and result["digest"] == swarm.digest and result["experts"] == 3
    assert list(swarm.members) == ["e00", "e01", "e02", "seed"]
    assert sorted(swarm.members[f"e0{c}"].domain for c in range(3)) == sorted(WORDS)

    seed = read_manifest(swarm.checkpoint("seed"))
    assert (seed.step, seed.init_from) == (7, None)
    digests = set()
    for path in (*(swarm.checkpoint(f"e0{c}") for c in range(3)), swarm.path_of(swarm.manifest.controls.dense)):
        manifest = read_manifest(path)
        assert manifest.init_from == seed.digest
        assert manifest.step == (6 if "dense" in manifest.run else 2)
        digests.add(manifest.digest)
    assert len(digests) == 4  # each learned something else
    assert seen["t-seed"] == (7, 7) and seen["t-e02"] == (2, 2) and seen["t-dense"] == (6, 6)

    assert set(result["bits_per_byte"]) == set(WORDS)
    for row in result["bits_per_byte"].values():
        assert list(row) == ["dense", "route", "mixture"]
        assert all(1 < bits < 8 for bits in row.values())  # a little trained: better than a uniform byte
    assert result["tokens_per_parameter"] == pytest.approx(13 * 256 / result["parameters"])

    metrics = {path: path.read_bytes() for path in (home / "runs").glob("t-*/metrics.jsonl")}
    assert len(metrics) == 5
    started_s = time.monotonic()
    assert train_swarm(recipe(), root=home) == result
    assert time.monotonic() - started_s < 5
    assert {path: path.read_bytes() for path in metrics} == metrics


@pytest.mark.usefixtures("cluster")
def test_sigterm_saves_every_run_under_way_and_leaves_no_swarm(home):
    def stop(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train_swarm(recipe("stopped", train={"steps": 20_000}), root=home, on_progress=stop)
    assert result == {"status": "interrupted", "runs": "stopped-*"}
    assert signal.getsignal(signal.SIGTERM) == before
    run = home / "runs" / "stopped-seed"
    newest = store.newest(run)
    assert newest is not None and read_manifest(newest).is_training
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(newest.name[5:]) < 10_000
    assert not list((home / "runs").rglob(f"*{artefacts.PARTIAL}"))
    assert not (home / "runs" / "stopped-dense").exists()
    assert "stopped" not in artefacts.names(home / "swarms" / "names")
