"""One dial: a number of parameters gives a model of that size, by rules that the named sizes keep to as well."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

import ulm
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm import dial
from ulm.cli.main import app
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, on_meta
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe
from ulm.spec import HEAD_DIMS, preset_sizes
from ulm.tokenizers.byte import byte_tokenizer

COUNTS = {
    "800k": 8e5,
    "1M": 1e6,
    "3.5M": 3.5e6,
    "25M": 2.5e7,
    "60m": 6e7,
    "350M": 3.5e8,
    "1B": 1e9,
    "12345678": 12_345_678,
}
NAMED = [(preset, size) for preset, stored in preset_sizes().items() for size in stored["sizes"]]
NEAR_A_PRESET = 1.15  # of a preset's learning rate


def parameters(spec: ulm.ModelSpec) -> int:
    return num_parameters(on_meta(spec))


@pytest.mark.parametrize("vocab_size", [257, 8192, 32_000])
@pytest.mark.parametrize("text", COUNTS)
def test_a_count_gives_a_model_within_a_tenth_of_it_at_the_vocabulary_it_will_have(text, vocab_size):
    if COUNTS[text] < 40 * vocab_size:
        pytest.skip("the vocabulary's table alone is about as large")
    spec = ulm.ModelSpec.parse(text, vocab_size=vocab_size)
    assert spec.vocab_size == vocab_size
    assert parameters(spec) == pytest.approx(COUNTS[text], rel=0.1)
    assert spec.head_dim in HEAD_DIMS
    assert spec.d_model == spec.attention.num_heads * spec.head_dim


@pytest.mark.parametrize("text", ["25M", "125M", "350M", "1B"])
def test_where_the_vocabulary_leaves_a_choice_a_layer_has_64_of_width(text):
    spec = ulm.ModelSpec.parse(text)
    assert 48 <= spec.d_model / spec.num_layers <= 85
    assert spec.attention.num_heads == 2 * spec.attention.num_kv_heads


def test_a_larger_count_is_never_a_smaller_model_and_the_same_count_is_the_same_model():
    counts = [2.0**exponent * 1e6 for exponent in range(-1, 10)]
    sizes = [parameters(ulm.ModelSpec.parse({"size": count})) for count in counts]
    assert sizes == sorted(sizes)
    assert (
        ulm.ModelSpec.parse("25M") == ulm.ModelSpec.parse({"size": "25M"}) == ulm.ModelSpec.parse({"size": 25_000_000})
    )
    assert ulm.ModelSpec.parse("25M") == ulm.ModelSpec.parse({"preset": "llama-like", "size": "25 m"})


@pytest.mark.parametrize(
    "fixed",
    [
        {"d_model": 256},
        {"num_layers": 3},
        {"embedding": {"tied": False}},
        {"attention": {"num_heads": 4, "num_kv_heads": 4}},
        {"feedforward": {"d_hidden": 512}},
        {"position": {"kind": "learned"}, "context_tokens": 512},
    ],
    ids=str,
)
def test_what_a_recipe_fixes_stays_and_the_rest_is_fitted_around_it(fixed):
    spec = ulm.ModelSpec.parse({"size": "10M", **fixed})
    assert parameters(spec) == pytest.approx(1e7, rel=0.1)
    found = json.loads(spec.model_dump_json())
    for field, value in fixed.items():
        assert found[field] == ({**found[field], **value} if isinstance(value, dict) else value)


@pytest.mark.parametrize(("preset", "size"), NAMED, ids=lambda name: name)
def test_named_sizes_keep_to_the_rules_for_heads_context_batch_and_rate(preset, size):
    given = {"preset": preset, "size": size}
    spec, training = ulm.ModelSpec.parse(given), ulm.ModelSpec.training_defaults(given)
    assert dial.context_tokens(spec.d_model) == spec.context_tokens
    assert dial.heads(spec.d_model)[0] == spec.attention.num_heads
    assert dial.batch_tokens(parameters(spec)) == training["batch_tokens"]
    assert abs(math.log(dial.lr(parameters(spec)) / training["lr"])) < math.log(NEAR_A_PRESET)
    assert 0.5 <= spec.d_model / spec.num_layers / dial.ASPECT <= 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("0M", "model.size: 0M is no size from 10k to 10B parameters (for example 800k, 25M or 1B)"),
        ("5T", "model.size: 5T is no size from 10k to 10B parameters"),
        ({"size": 10}, "model.size: 10 is no size from 10k to 10B parameters"),
        ({"size": 0}, "model.size: 0 is no size from 10k to 10B parameters"),
        ({"preset": "llama-like", "size": "1e99"}, "model.preset: no preset or size '1e99' (known: "),
        ("-25M", "model.preset: no preset or size '-25M' (known: "),
        ("25Q", "model.preset: no preset or size '25Q' (known: "),
        (
            "100k",
            "model.size: no model of 100,000 parameters with 8,192 tokens in its vocabulary; 275,552 is the nearest "
            "(another size, or a corpus with a smaller vocabulary)",
        ),
        ({"size": "25M", "num_layer": 2}, "model.num_layer: unknown key (did you mean 'num_layers'?)"),
        ({"size": "25M", "d_model": "wide"}, "model.d_model: 'wide': Input should be a valid integer"),
        ({"size": "25M", "d_model": 0}, "model.d_model: 0: Input should be greater than or equal to 8"),
        ({"size": "25M", "d_model": 16}, "attention.num_heads: head_dim is 16"),
    ],
    ids=str,
)
def test_a_size_that_is_none_is_refused_with_place_value_and_remedy(given, text):
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.parse(given)
    assert text in str(caught.value)


def recipe(model: object, **train: object) -> TrainRecipe:
    return validate(TrainRecipe, {"name": "a", "corpus": "written", "model": model, "train": {"steps": 1, **train}})


def test_a_recipe_with_a_count_takes_size_batch_rate_and_context_from_the_dial(root):
    written_corpus(root, {"train": ["some words to learn. " * 20] * 40, "val": ["a word. "], "test": []})
    task = resolve(recipe("100k"), root=root)  # too small for 8,192 tokens, but bytes are 257
    assert task.spec.vocab_size == 257
    assert parameters(task.spec) == pytest.approx(1e5, rel=0.1)
    assert (task.spec.context_tokens, task.batch_tokens, task.optimizer.lr) == (256, 8_192, 4e-3)
    large = resolve(recipe({"size": "25M"}), root=root)
    size = parameters(large.spec)
    assert (large.batch_tokens, large.optimizer.lr) == (65_536, dial.lr(size))
    assert resolve(recipe({"size": "25M"}, context_tokens=64), root=root).spec.context_tokens == 64


def test_a_model_without_a_named_size_is_trained_by_the_same_rules(root):
    written_corpus(root, {"train": ["some words to learn. " * 20] * 40, "val": ["a word. "], "test": []})
    fields = ulm.ModelSpec.preset("mini", vocab_size=257).model_dump(mode="json")
    task = resolve(recipe(fields), root=root)
    size = parameters(task.spec)
    assert (task.batch_tokens, task.optimizer.lr) == (dial.batch_tokens(size), dial.lr(size))


def test_show_says_what_a_count_costs_and_how_it_is_trained(root):
    done = CliRunner().invoke(app, ["show", "25M"], catch_exceptions=False)
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert found["parameters"] == pytest.approx(2.5e7, rel=0.1)
    assert found["training"] == {"lr": dial.lr(found["parameters"]), "batch_tokens": 65_536}
    assert found["spec"] == ulm.ModelSpec.parse("25M").model_dump(mode="json")
    assert "trained in batches of 65,536 tokens at a peak rate of 0.0012" in " ".join(done.stderr.split())


def test_show_prefers_a_run_that_is_named_like_a_size(root, nano):
    ulm.save(nano(vocab_size=257), byte_tokenizer(), root / "runs" / "1M" / "step-00000001")
    done = CliRunner().invoke(app, ["show", "1M"], catch_exceptions=False)
    assert json.loads(done.stdout.strip().rpartition("\n")[2])["spec"]["vocab_size"] == 257


@pytest.mark.parametrize(
    "fixed",
    [
        {"layers_per_block": 2},
        {"preset": "modern", "embedding": {"num_tables": 2}},
        {"blocks": [{"repeat": 3, "feedforward": {"d_hidden": 64}}, {"feedforward": {"d_hidden": 4096}}]},
        {"feedforward": "moe"},
    ],
    ids=str,
)
def test_layers_that_share_or_differ_are_counted_as_they_are(fixed):
    spec = ulm.ModelSpec.parse({"preset": "llama-like", "size": "5M", **fixed})
    assert num_parameters(on_meta(spec)) == pytest.approx(5e6, rel=0.1)
    assert spec.num_layers % spec.layers_per_block == 0
