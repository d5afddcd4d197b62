"""What `ulm bench swarm` rests on: configurations that differ in one setting, results kept by recipe, its table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import _swarm_serving
from tests.benchmarks._swarm_plots import Point, draw
from tests.benchmarks.swarm import CENTRE, Bench, Configuration, Trained, configurations, table
from ulm import registry
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe

VARIED = ("tokens_per_parameter", "experts", "seed_share", "seed", "size")


def line(route: float, dense: float, **more: float) -> dict[str, object]:
    macro = {"dense": dense, "route": route, **more}
    per_byte = {name: nats / 2 for name, nats in macro.items()}
    return {
        "macro": {name: {"nats_per_token": nats, "bits_per_byte": nats / 2} for name, nats in macro.items()},
        "bits_per_byte": {"law": per_byte, "code": per_byte},
        "tokens_per_parameter": 50.0,
        "parameters": 360_768,
    }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(home=tmp_path, results=tmp_path / "results", corpora=None, full=True, ends_s=math.inf)


def test_every_configuration_differs_from_the_centre_in_one_setting_at_most():
    for of in configurations(full=True):
        assert sum(getattr(of, name) != getattr(CENTRE, name) for name in VARIED) <= 1, of


def test_all_that_was_asked_for_is_varied_and_the_centre_comes_first():
    every = configurations(full=True)
    assert every[0] == CENTRE and configurations(full=False) == [CENTRE]
    assert {of.tokens_per_parameter for of in every} == {1, 5, 20, 50, 100}
    assert {of.experts for of in every} == {2, 4, 8, 16}
    assert {of.seed_share for of in every} == {0.25, 0.5, 0.75}
    assert {of.seed for of in every} == {0, 1, 2}
    assert {of.size for of in every} == {"trial", "micro"}
    assert any("dense_flops" in of.controls for of in every)


def test_names_tell_configurations_apart_by_what_is_trained_and_not_by_controls():
    every = configurations(full=True)
    assert len({of.name for of in every}) == len({replace(of, controls=()) for of in every})
    assert replace(CENTRE, controls=("dense",)).name == CENTRE.name


@pytest.mark.parametrize("of", configurations(full=True), ids=lambda of: of.name)
def test_every_configuration_is_a_recipe(of):
    assert validate(SwarmRecipe, of.recipe()).experts == of.experts


def test_a_finished_result_is_taken_again_for_the_same_recipe_alone(bench):
    kept = line(3.7, 4.0)
    bench.keep(CENTRE.name, CENTRE.recipe(), kept)
    assert bench.train(CENTRE) == kept
    assert bench.result(replace(CENTRE, controls=("dense",))) == kept  # a control more than asked for does no harm
    assert bench.result(replace(CENTRE, controls=("dense", "random", "dense_flops"))) is None
    other = {**CENTRE.recipe(), "warmup_steps": 1}
    bench.keep(CENTRE.name, other, kept)
    assert bench.result(CENTRE) is None


def test_nothing_is_started_when_the_time_is_up(bench):
    assert replace(bench, ends_s=0.0).train(CENTRE) is None
    assert not (bench.home / "bench.log").exists()


def test_the_table_gives_perplexity_ratios_to_dense_of_the_columns_that_there_are():
    half = math.log(0.5)
    rows = list(
        table([Trained(CENTRE, line(4.0 + half, 4.0, random=4.0)), Trained(Configuration(experts=4), line(4.0, 4.0))])
    )
    assert rows[0].endswith("| dense, bits per byte | route | random |")
    assert rows[2] == "| trial | 50 | 8 | 50% | 0 | 2.000 | 0.500 | 1.000 |"
    assert rows[3] == "| trial | 50 | 4 | 50% | 0 | 2.000 | 1.000 |  |"


def test_plots_are_drawn_of_what_there_is_and_the_page_holds_them(tmp_path):
    ratios = {"route": 0.8, "mixture": 0.79, "oracle": 0.77}
    per_byte = {"law": {"dense": 1.6, "route": 1.5, "mixture": 1.5}}
    centre = Point("trial", 50.0, 8, 0.5, 0, 360_768, ratios, per_byte)
    rows = ["| experts | route |", "| --- | --- |", "| 8 | 0.800 |"]
    draw(tmp_path / "one", [centre], [], rows)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"tokens.png", "domains.png", "index.html"}
    draw(tmp_path / "two", [centre, replace(centre, experts=4)], [], rows)
    page = (tmp_path / "two/index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "0.800" in page and "src=http" not in page


def test_the_overhead_of_every_strategy_is_measured_over_whole_answers(monkeypatch):
    monkeypatch.setattr(_swarm_serving, "ANSWERS", 3)
    found = _swarm_serving.overheads()
    assert {config["kind"] for config in _swarm_serving.STRATEGIES.values()} == set(registry.kinds("strategy"))
    assert all(len(times_ms) == 3 and min(times_ms) > 0 for times_ms in found.values())
