"""Presets, what is laid over them, and the texts of mistakes in a `model:` section."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import ulm
from ulm.errors import ConfigError, UnknownKindError
from ulm.models.account import num_parameters
from ulm.registry import KindConfig, register
from ulm.spec import HEAD_DIMS, preset_sizes

MILLIONS = {"nano": 1, "micro": 5, "mini": 25, "small": 125, "base": 350}
EVERY_SIZE = [(preset, size) for preset, stored in preset_sizes().items() for size in stored["sizes"]]


@pytest.fixture
def foreign_attention(monkeypatch):
    """An attention kind outside the tree, with one field of gqa's and one of its own."""

    class Config(KindConfig):
        num_heads: int = 8
        span_tokens: int = 7

    @register("attention", Config)
    class Foreign(torch.nn.Module):
        pass

    module = ModuleType("foreign_attention")
    module.Foreign = Foreign
    monkeypatch.setitem(sys.modules, "foreign_attention", module)
    return "foreign_attention:Foreign"


@pytest.mark.parametrize(("preset", "size"), EVERY_SIZE, ids=lambda name: name)
def test_a_named_size_is_within_a_tenth_of_its_name_and_vllm_knows_its_heads(preset, size):
    spec = ulm.ModelSpec.parse({"preset": preset, "size": size})
    with torch.device("meta"):
        model = ulm.build(spec)
    assert spec.vocab_size == 8192
    assert num_parameters(model) == pytest.approx(MILLIONS[size] * 1e6, rel=0.1)
    assert spec.head_dim in HEAD_DIMS
    assert {"lr", "batch_tokens"} <= set(ulm.ModelSpec.training_defaults({"preset": preset, "size": size}))


def test_a_bare_size_means_the_default_preset():
    nano = ulm.ModelSpec.preset("nano")
    assert nano == ulm.ModelSpec.parse("nano") == ulm.ModelSpec.parse({"preset": "llama-like", "size": "nano"})
    assert nano == ulm.ModelSpec.parse({"size": "nano"})
    assert (nano.d_model, nano.num_layers, nano.head_dim, nano.vocab_size) == (96, 3, 32, 8192)


def test_what_is_laid_over_a_slot_keeps_its_other_fields():
    attention = ulm.ModelSpec.preset("nano", attention={"num_kv_heads": 3}).attention
    assert (attention.kind, attention.num_heads, attention.num_kv_heads) == ("gqa", 3, 3)


def test_another_kind_keeps_the_fields_it_shares_and_takes_its_own_defaults(foreign_attention):
    attention = ulm.ModelSpec.preset("nano", attention={"kind": foreign_attention}).attention
    assert attention.model_dump() == {"kind": foreign_attention, "num_heads": 3, "span_tokens": 7}
    assert ulm.ModelSpec.preset("nano", attention=foreign_attention).attention == attention


def test_the_vocabulary_comes_from_the_section_then_the_tokenizer_then_the_default():
    assert ulm.ModelSpec.parse("nano").vocab_size == 8192
    assert ulm.ModelSpec.parse("nano", vocab_size=500).vocab_size == 500
    assert ulm.ModelSpec.parse({"preset": "nano", "vocab_size": 600}, vocab_size=500).vocab_size == 600


def test_the_context_comes_from_the_section_then_training_then_the_preset():
    assert ulm.ModelSpec.parse("nano").context_tokens == 256
    assert ulm.ModelSpec.parse("nano", context_tokens=64).context_tokens == 64
    assert ulm.ModelSpec.parse({"preset": "nano", "context_tokens": 32}, context_tokens=64).context_tokens == 32


def test_a_spec_is_frozen_and_comes_back_from_json():
    spec = ulm.ModelSpec.preset("micro", vocab_size=1000, embedding={"tied": False})
    assert ulm.ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.d_model = 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("nanno", "model.preset: no preset or size 'nanno' (did you mean 'nano'?)"),
        (
            "gigantic",
            "model.preset: no preset or size 'gigantic' (known: base, gpt2-like, llama-like, micro, mini, modern, ",
        ),
        ({"preset": "lama-like", "size": "nano"}, "model.preset: no preset 'lama-like' (did you mean 'llama-like'?)"),
        ({"preset": "llama-like"}, "model.size: is missing (one of nano, micro, mini, small, base, or a number "),
        ({"preset": ["nano"]}, "model.preset: no preset or size \"['nano']\""),
        ({"size": ["nano"]}, "model.preset: no preset or size \"['nano']\""),
        ({"preset": "nano", "num_layer": 2}, "model.num_layer: unknown key (did you mean 'num_layers'?)"),
        ({"preset": "nano", "num_layers": "two"}, "model.num_layers: 'two': Input should be a valid integer"),
        ({"preset": "nano", "num_layers": 0}, "model.num_layers: 0: Input should be greater than or equal to 1"),
        ({"d_model": 96}, "model.num_layers: is missing"),
        ({"preset": "nano", "norm": {"colour": 1}}, "norm.colour: unknown key (known: eps, kind)"),
        ({"preset": "nano", "norm": 3}, "norm: 3 names no kind (for example {kind: layernorm})"),
        (
            {"preset": "nano", "attention": {"num_kv_heads": 2}},
            "attention.num_kv_heads: 2 does not divide num_heads, which is 3",
        ),
        (
            {"preset": "nano", "attention": {"num_heads": 4}},
            "attention.num_heads: head_dim is 24 (one of (32, 64, 80, 96, 112, 128, 160, 192, 224, 256))",
        ),
        (["nano"], "model: ['nano'] is no model (for example {preset: nano})"),
    ],
    ids=str,
)
def test_a_mistake_in_a_model_section_names_place_value_and_remedy(given, text):
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.parse(given)
    assert text in str(caught.value)


@pytest.mark.parametrize("given", ["gqq", {"kind": "gqq"}], ids=str)
def test_an_unknown_kind_is_guessed(given):
    with pytest.raises(UnknownKindError, match=r"^attention\.kind: no kind 'gqq' \(did you mean 'gqa'\?\)$"):
        ulm.ModelSpec.preset("nano", attention=given)


def test_a_spec_from_yaml_equals_the_section_it_holds(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("preset: nano\nvocab_size: 300\nattention: {num_kv_heads: 3}\n", encoding="utf-8")
    assert ulm.ModelSpec.from_yaml(path) == ulm.ModelSpec.preset("nano", vocab_size=300, attention={"num_kv_heads": 3})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"preset: [nano", "not YAML: "),
        (b"- nano", "model: ['nano'] is no model"),
        (b"", "model: None is no model"),
        (b"\xff\xfe\x00nano", "not readable: "),
    ],
    ids=["missing", "broken", "a list", "empty", "binary"],
)
def test_a_bad_yaml_file_is_named_with_its_fault(tmp_path, content, text):
    path = tmp_path / "model.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.from_yaml(path)
    assert text in str(caught.value)
