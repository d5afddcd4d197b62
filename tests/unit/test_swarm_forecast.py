"""`ulm swarm plan`: what it counts is counted right, what it says follows from the rule, and nothing is trained."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score
from typer.testing import CliRunner

from pipelines.swarm.forecast import advice, counts, forecast_swarm, information, merged, verdict
from pipelines.swarm.plan import plan_swarm
from pipelines.swarm.rule import Forecast, Rule, Setting
from tests.written_corpus import KINDS, write_kinds
from ulm.cli.main import app
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe

EXACT = 1e-9  # float64, sums of some thousand
DRAWN = 0.01  # nats: what chance leaves of nothing in 40,000 draws


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a corpus of three kinds of text, bytes as tokens."""
    root = tmp_path_factory.mktemp("forecast-home")
    write_kinds(root)
    return root


FIELDS: dict[str, Any] = {
    "name": "t",
    "corpus": "tiny",
    "model": {"preset": "nano", "num_layers": 1},
    "experts": 3,
    "train": {"steps": 13, "batch_tokens": 256, "context_tokens": 64},
}


def recipe(**changes: Any) -> SwarmRecipe:
    return validate(SwarmRecipe, {**FIELDS, **changes})


# ---- what clusters say of tokens


def test_clusters_without_a_word_in_common_say_which_of_them_a_token_is_from():
    count_CV = np.kron(np.eye(4), np.full((1, 5), 1e6))
    assert information(count_CV) == pytest.approx(math.log(4), abs=1e-5)  # the correction for a sample, 4e7 tokens


def test_clusters_that_are_all_alike_say_nothing():
    assert information(np.tile(np.arange(1.0, 50.0) * 1e5, (8, 1))) == 0.0
    drawn_CV = np.random.default_rng(0).multinomial(10_000, np.full(300, 1 / 300), size=4).astype(float)
    assert information(drawn_CV) < DRAWN


def test_information_is_the_mutual_information_of_labels_less_what_a_sample_shows_of_nothing():
    generator = np.random.default_rng(1)
    clusters, words = generator.integers(0, 3, 5_000), generator.integers(0, 40, 5_000)
    words = np.where(clusters == 0, words // 2, words)
    count_CV = np.zeros((3, 40))
    np.add.at(count_CV, (clusters, words), 1)
    assert information(count_CV) == pytest.approx(mutual_info_score(clusters, words) - 2 * 39 / 10_000, abs=EXACT)


def test_the_two_clusters_that_are_most_alike_are_joined_first():
    alike = np.array([[9.0, 1.0, 0.0, 0.0], [8.0, 2.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0], [0.0, 9.0, 1.0, 0.0]]) * 1e4
    steps = list(merged(alike))
    assert [len(step) for step in steps] == [3, 2]
    assert sorted(steps[0].sum(axis=1)) == [1e5, 1e5, 2e5]
    assert (steps[0] == alike[0] + alike[1]).all(axis=1).any()


def test_counts_are_those_of_the_training_text_of_each_cluster(home):
    of = plan_swarm(recipe(), root=home)
    count_CV = counts(of)
    assert count_CV.sum(axis=1).tolist() == of.clusters.tokens
    whole = of.corpus.tokens("train").read(0, of.corpus.num_tokens("train"))
    assert count_CV.sum(axis=0).tolist() == np.bincount(whole, minlength=of.corpus.tokenizer.vocab_size).tolist()


# ---- what is said


@pytest.mark.parametrize(
    ("ahead", "begins"),
    [
        (Forecast(0.8, 0.7, 0.9), "a swarm will pay: perplexity 0.80 of one dense model's, between 0.70 and 0.90"),
        (Forecast(1.2, 1.1, 1.3), "a swarm will not pay, train one model: perplexity 1.20"),
        (Forecast(0.95, 0.8, 1.1), "too close to call: perplexity 0.95"),
    ],
)
def test_the_verdict_is_as_sure_as_the_interval(ahead, begins):
    assert verdict(ahead).startswith(begins)


def test_advice_to_train_longer_names_the_tokens_from_which_the_rule_says_a_swarm_is_ahead():
    count_CV = np.kron(np.eye(8), np.full((1, 5), 1e6)) + 3.5e5
    setting = Setting(1.0, 8, information(count_CV), parameters=1e6)
    rule = Rule.fit()
    needed = rule.pays_from(setting)
    longer, smaller = list(advice(rule, setting, count_CV))[:2]
    assert f"about {needed:.3g} per parameter, {float(f'{needed * 1e6:.2g}'):,.0f} in all" in longer
    assert f"{float(f'{1e6 / needed:.2g}'):,.0f} parameters" in smaller


def test_no_advice_where_it_pays():
    count_CV = np.kron(np.eye(8), np.full((1, 5), 1e6)) + 1e5
    assert list(advice(Rule.fit(), Setting(50.0, 8, information(count_CV)), count_CV)) == []


# ---- the plan


def test_a_plan_is_made_of_the_recipe_and_trains_nothing(home):
    planned = forecast_swarm(recipe(), root=home)
    assert planned["tokens"] == 13 * 256
    assert planned["tokens_per_parameter"] == pytest.approx(13 * 256 / planned["parameters"])
    assert sorted(cluster["domain"] for cluster in planned["clusters"]) == sorted(KINDS)
    assert planned["runs"] == 5  # the seed, three experts, dense
    of_table = 5 * Corpus.open("tiny", root=home, verify=False).num_tokens("test") / 256 / 3
    assert planned["seconds"] / planned["seconds_per_step"] == pytest.approx(13 + 6 + of_table)  # dense takes 6
    low, ratio, high = (planned["forecast"][name] for name in ("low", "ratio", "high"))
    assert low < ratio < high
    assert not (home / "runs").exists() and not (home / "swarms").exists()


def test_a_clustering_is_made_once_and_found_again(home):
    changed = recipe(clustering={"seed": 7})
    found = [forecast_swarm(changed, root=home)["clusters_found_before"] for _ in range(2)]
    assert found == [False, True]


def test_two_passes_of_the_experts_count_as_the_tokens_that_the_recipe_gives(home):
    planned = forecast_swarm(recipe(reassign=True, train={**FIELDS["train"], "steps": 24}), root=home)
    assert planned["tokens"] == 24 * 256


def test_an_expert_that_reads_its_cluster_many_times_is_remarked_on(home):
    planned = forecast_swarm(recipe(train={**FIELDS["train"], "steps": 900}), root=home)
    most = max(planned["clusters"], key=lambda cluster: cluster["epochs"])
    assert any(f"{most['member']} reads its cluster {most['epochs']:.1f} times" in r for r in planned["remarks"])


def test_a_mistake_in_the_recipe_is_told_as_training_would(home):
    with pytest.raises(ConfigError, match="2 steps are too few for a seed and 3 experts"):
        forecast_swarm(recipe(train={**FIELDS["train"], "steps": 2}), root=home)


def test_the_command_shows_the_verdict_and_ends_with_the_figures_as_json(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ULM_HOME", str(home))
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({key: value for key, value in FIELDS.items() if key != "name"}), encoding="utf-8")
    done = CliRunner().invoke(app, ["swarm", "plan", str(path)], catch_exceptions=False, env={"COLUMNS": "200"})
    planned = json.loads(done.stdout.splitlines()[-1])
    assert planned["swarm"] == "small" and planned["experts"] == 3
    assert planned["verdict"] in done.stderr and "train tokens" in done.stderr
    assert Corpus.open("tiny", root=home, verify=False).folder.is_dir()
