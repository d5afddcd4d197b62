"""Learned positions: a table as long as the context, which no context outgrows."""

from __future__ import annotations

import json

import pytest
import torch

import ulm
from pipelines.train.loop import train
from pipelines.train.task import resolve
from tests.written_corpus import written_corpus
from ulm.checkpoints import store
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, train_flops_per_token
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe
from ulm.tokenizers.byte import byte_tokenizer

LEARNED = {"preset": "nano", "num_layers": 1, "position": "learned"}


def recipe(name: str, **fields) -> TrainRecipe:
    sizes = {"steps": 1, "batch_tokens": 128, "precision": "float32"}
    return validate(
        TrainRecipe, {"name": name, "corpus": "written", **fields, "train": {**sizes, **fields.get("train", {})}}
    )


@pytest.fixture
def checkpoint(root) -> str:
    """Of a model with 64 learned positions, after one step."""
    written_corpus(root, {"train": ["some words to learn. " * 5] * 20, "val": ["a word. "], "test": []})
    task = resolve(recipe("seed", model=LEARNED, train={"context_tokens": 64}), root=root)
    return str(train(task).checkpoint)


def test_a_spec_says_how_long_its_table_is():
    spec = ulm.ModelSpec.parse(LEARNED, context_tokens=64)
    assert spec.position.max_tokens == spec.max_positions == 64
    assert ulm.ModelSpec(**json.loads(spec.model_dump_json())) == spec
    longer = ulm.ModelSpec.parse({**LEARNED, "position": {"kind": "learned", "max_tokens": 100}}, context_tokens=64)
    assert ulm.build(longer).position.weight.shape == (100, 96)
    assert ulm.ModelSpec.preset("nano").max_positions is None


def test_a_context_longer_than_the_table_is_refused_when_the_spec_is_made():
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.parse({**LEARNED, "position": {"kind": "learned", "max_tokens": 32}}, context_tokens=64)
    told = "32 positions, and a context of 64 tokens (as many as context_tokens, or leave it out)"
    assert str(caught.value) == f"position.max_tokens: {told}"


def test_the_order_of_equal_tokens_changes_what_follows():
    model = ulm.build(ulm.ModelSpec.parse(LEARNED, vocab_size=97, context_tokens=16), seed=0)
    tokens_BT = torch.full((1, 8), 5)
    logits_BTV = model(tokens_BT)
    assert (logits_BTV[0, 3] - logits_BTV[0, 4]).abs().max() > 1e-3
    torch.nn.init.zeros_(model.position.weight)
    torch.testing.assert_close(*model(tokens_BT)[0, 3:5])  # nothing else tells them apart


def test_the_table_is_counted_as_parameters_and_costs_no_operations(nano):
    plain, learned = nano(), nano(position={"kind": "learned"})
    assert num_parameters(learned) - num_parameters(plain) == 64 * 96
    assert train_flops_per_token(learned, 64) == train_flops_per_token(plain, 64)


def test_a_checkpoint_gives_the_table_back_once(nano, tmp_path):
    model = nano(vocab_size=257, position={"kind": "learned"})
    folder = ulm.save(model, byte_tokenizer(), tmp_path / "kept")
    loaded, _ = ulm.load(folder)
    assert torch.equal(loaded.position.weight, model.position.weight)
    assert [name for name in store.read_weights(folder) if "position" in name] == ["position.weight"]


def test_training_begins_from_a_checkpoint_with_a_shorter_context_and_not_with_a_longer_one(checkpoint, root):
    shorter = resolve(recipe("b", init_from=checkpoint, train={"context_tokens": 32}), root=root)
    assert (shorter.spec.context_tokens, shorter.spec.max_positions) == (32, 64)
    assert train(shorter).step == 1
    for model in ({}, {"model": LEARNED}):
        with pytest.raises(ConfigError) as caught:
            resolve(recipe("c", init_from=checkpoint, train={"context_tokens": 128}, **model), root=root)
        told = "128, but the model of init_from has 64 positions (at most 64)"
        assert str(caught.value) == f"train.context_tokens: {told}"
