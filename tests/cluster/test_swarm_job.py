"""The swarm job: a whole small swarm, found finished when run again, and stopped in the middle."""

import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.swarm_job import train_swarm
from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
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
        if run == "stopped-seed":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train_swarm(recipe("stopped", train={"steps": 20_000}), root=home, on_progress=stop)
    assert result == {"status": "interrupted", "runs": ["stopped-seed"]}
    assert signal.getsignal(signal.SIGTERM) == before
    run = home / "runs" / "stopped-seed"
    newest = store.newest(run)
    assert newest is not None and read_manifest(newest).is_training
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(newest.name[5:]) < 10_000
    assert not list((home / "runs").rglob(f"*{artefacts.PARTIAL}"))
    assert store.newest(home / "runs" / "stopped-dense") is None
    assert "stopped" not in artefacts.names(home / "swarms" / "names")
