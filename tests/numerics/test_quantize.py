"""Quantised folders: transformers computes from them what our rounded model computes, and little is lost."""

from __future__ import annotations

import json
import math
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.numerics._stock import drawn
from ulm.errors import ArtefactError, ConfigError, UnsupportedError
from ulm.exchange.hf import export_hf
from ulm.exchange.quantize import bits_per_byte, change, quantize, rounded, rounded_to_integers
from ulm.tokenizers.byte import byte_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
transformers.utils.logging.disable_progress_bar()

SCHEMES = ("w8a8", "w4a16")
BYTES = byte_tokenizer()
TEXTS = [topics["assert"][:300], topics["while"][:200]]
SAME_SUM = 1e-6  # of a layer's largest output: the same numbers, summed in another order
SAME_LOGITS = 1e-4  # of the largest logit, for the same reason
# Where activations are rounded, a sum in another order now and then falls on the other side of a half: one step of 127,
# which later layers make more of. So the mean is compared, with that of all that rounding does.
SAME_MEAN = 0.3
OURS = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "feedforward.gate",
    "mlp.up_proj": "feedforward.up",
    "mlp.down_proj": "feedforward.out",
}


@pytest.fixture
def made(nano) -> Any:
    return drawn(nano(vocab_size=BYTES.vocab_size, context_tokens=128))


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_transformers_computes_from_the_folder_what_our_rounded_model_does(scheme, made, tmp_path):
    model, tokenizer = made, BYTES
    folder = quantize(export_hf(model, tokenizer, tmp_path / "whole"), tmp_path / "small", scheme=scheme)
    ours, theirs = rounded(model, scheme=scheme), opened(folder)
    tokens_BT = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(TEXTS[0])[:100]]])
    expected_BTV, whole_BTV, found_BTV = ours(tokens_BT), model(tokens_BT), theirs(tokens_BT).logits
    assert (found_BTV - expected_BTV).abs().mean() < SAME_MEAN * (whole_BTV - expected_BTV).abs().mean()
    for layer, block in enumerate(ours.blocks):
        for name, our_name in OURS.items():
            linear = theirs.model.layers[layer].get_submodule(name)
            x_BTD = torch.randn(1, 50, linear.in_features, generator=torch.Generator().manual_seed(layer))
            found_BTD, expected_BTD = linear(x_BTD), block.get_submodule(our_name)(x_BTD)
            assert (found_BTD - expected_BTD).abs().max() <= SAME_SUM * expected_BTD.abs().max()
            whole_BTD = model.blocks[layer].get_submodule(our_name)(x_BTD)
            assert (whole_BTD - expected_BTD).abs().max() > 1e-3 * expected_BTD.abs().max(), "nothing was rounded"


GELU = {"kind": "gelu", "approximate": True, "bias": True, "d_hidden": 128}
GEMMA = {
    "embedding": {"scaled": True},
    "feedforward": {"kind": "geglu", "approximate": True},
    "norm_placement": "around",
}
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"attention": {"qk_norm": True}, "embedding": {"tied": False}},
    "Phi3ForCausalLM": {"position": {"rotary_dim": 16}},
    "Olmo2ForCausalLM": {"attention": {"qk_norm": "whole"}, "norm_placement": "output"},
    "Starcoder2ForCausalLM": {"attention": {"bias": True}, "feedforward": GELU, "norm": "layernorm"},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": {**GEMMA, "attention": {"qk_norm": True}},
    "BloomForCausalLM": {
        "position": "alibi",
        "embedding_norm": True,
        "attention": {"num_kv_heads": 3, "bias": True},
        "feedforward": {**GELU, "d_hidden": None},
        "norm": "layernorm",
    },
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_every_architecture_of_plain_matrices_can_be_quantised(name, nano, tmp_path):
    model = drawn(nano(vocab_size=BYTES.vocab_size, **OTHERS[name]))
    folder = quantize(export_hf(model, BYTES, tmp_path / "whole"), tmp_path / "small", scheme="w4a16")
    theirs = opened(folder)
    assert type(theirs).__name__ == name
    tokens_BT = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    expected_BTV = rounded(model, scheme="w4a16")(tokens_BT)
    largest = expected_BTV.abs().max()
    assert (theirs(tokens_BT).logits - expected_BTV).abs().max() < SAME_LOGITS * largest
    assert (model(tokens_BT) - expected_BTV).abs().max() > 1e-2 * largest


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_change_in_bits_per_byte_is_that_of_transformers_folder(scheme, made, tmp_path):
    model, tokenizer = made, BYTES
    found = change(model, tokenizer, TEXTS, scheme=scheme)
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == bits_per_byte(model, tokenizer, TEXTS)
    theirs = opened(quantize(export_hf(model, tokenizer, tmp_path / "whole"), tmp_path / "small", scheme=scheme))
    nats = 0.0
    for text in TEXTS:
        tokens = [tokenizer.eot_id, *tokenizer.encode(text)]
        for start in range(0, len(tokens) - 1, 128):
            piece_T = torch.tensor(tokens[start : start + 129])
            logits_TV = theirs(piece_T[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits_TV, piece_T[1:], reduction="sum").item()
    assert found.rounded_bits_per_byte == pytest.approx(nats / math.log(2) / found.text_bytes, abs=2e-3)
    assert abs(found.rounded_bits_per_byte - found.bits_per_byte) > 5e-3


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_scales_clip_where_that_leaves_less_error_than_the_largest_number_does(num_bits, group_size):
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    integers, scale = rounded_to_integers(weight, num_bits, group_size)
    most = 2 ** (num_bits - 1) - 1
    groups = weight.unflatten(1, (-1, group_size or 128))
    found = (integers.unflatten(1, (-1, group_size or 128)) * scale[..., None] - groups).square().sum(-1)
    plain = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / most
    usual = ((groups / plain).round() * plain - groups).square().sum(-1)
    assert (found <= usual * (1 + 1e-5)).all()
    assert num_bits == 8 or found.sum() < 0.85 * usual.sum()
    assert integers[3].count_nonzero() == 0 and (scale > 0).all()
    for share in torch.linspace(0.35, 1.0, 131):  # nor is any one share for all groups better
        step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) * share / most
        error = ((groups / step).round().clamp(-most - 1, most) * step - groups).square().sum(-1)
        assert found.sum() <= error.sum() * (1 + 1e-5)


def test_the_folder_holds_what_compressed_tensors_means(made, tmp_path):
    from compressed_tensors.compressors import unpack_from_int32

    model, tokenizer = made, BYTES
    whole = export_hf(model, tokenizer, tmp_path / "whole", dtype="bfloat16")
    before = load_file(whole / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    small = quantize(whole, tmp_path / "w4", scheme="w4a16", group_size=32)
    after = load_file(small / "model.safetensors")
    assert after[f"{name}_shape"].tolist() == [96, 256]
    assert (after[f"{name}_scale"].dtype, after[f"{name}_scale"].shape) == (torch.bfloat16, (96, 8))
    integers = unpack_from_int32(after[f"{name}_packed"], 4, torch.Size([96, 256]))
    assert integers.min() < -5 and integers.max() > 5
    dense = integers.float().unflatten(1, (8, 32)) * after[f"{name}_scale"].float()[..., None]
    step = after[f"{name}_scale"].float().max()
    assert (dense.flatten(1) - before[name].float()).abs().median() < step / 2
    assert name not in after
    eight = load_file(quantize(whole, tmp_path / "w8") / "model.safetensors")
    assert (eight[name].dtype, eight[f"{name}_scale"].shape) == (torch.int8, (96, 1))
    assert quantize(whole, tmp_path / "w4b", scheme="w4a16").is_dir()
    config = json.loads((tmp_path / "w4b" / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == 32, "the widest that divides 96 and 256"
    untouched = [key for key in before if key in eight and "proj" not in key]
    assert len(untouched) > 5 and all(torch.equal(before[key], eight[key]) for key in untouched)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in small.iterdir()} == names
    assert (small / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_what_the_format_or_its_readers_do_not_take_is_refused(nano, tmp_path):
    def exported(name: str, **fields: Any) -> Any:
        return export_hf(drawn(nano(vocab_size=BYTES.vocab_size, **fields)), BYTES, tmp_path / name)

    llama = exported("llama")
    small = partial(quantize, target=tmp_path / "small")
    with pytest.raises(ConfigError, match="scheme: no scheme 'w2a16' .one of w8a8, w4a16"):
        small(llama, scheme="w2a16")
    with pytest.raises(ConfigError, match="group_size: 128 does not fit rows of 32 numbers"):
        small(llama, scheme="w4a16", group_size=128)
    with pytest.raises(ConfigError, match="group_size: w8a8 has one scale for a row"):
        small(llama, group_size=32)
    with pytest.raises(ConfigError, match="already exists and is not an empty folder"):
        quantize(llama, llama)
    odd = exported("odd", feedforward={"d_hidden": 80})
    with pytest.raises(ConfigError, match=r"group_size: .*rows of 16 numbers"):
        small(odd, scheme="w4a16", group_size=32)
    with pytest.raises(UnsupportedError, match=r"no w4a16 of this model: .*96 x 80, and kernels take multiples of 32"):
        small(odd, scheme="w4a16")
    gpt2 = exported("gpt2", attention={"num_kv_heads": 3}, feedforward="relu2", norm="layernorm", position="learned")
    with pytest.raises(UnsupportedError, match="no quantised GPT2LMHeadModel: its matrices are Conv1D's"):
        small(gpt2)
    with pytest.raises(UnsupportedError, match="is quantised already"):
        quantize(quantize(llama, tmp_path / "eight"), tmp_path / "small")
    with pytest.raises(ArtefactError, match=r"config\.json: no such file"):
        small(tmp_path / "nowhere")
    (llama / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="not readable"):
        small(llama)
    with pytest.raises(ConfigError, match="texts: no text to measure on"):
        change(nano(vocab_size=BYTES.vocab_size), BYTES, [])
    assert not (tmp_path / "small").exists()
