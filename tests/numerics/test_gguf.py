"""A GGUF file holds the model's weights, settings and tokens, and llama.cpp computes our logits from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics._llama_cpp import python_with_llama_cpp
from tests.numerics._stock import drawn
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange import llama_cpp
from ulm.exchange.gguf import export_gguf
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

RELATIVE = 3e-5  # of the largest logit, both in float32: sums in another order make 1e-6 to 7e-6
RELATIVE_WITH_GELU = 1e-2  # llama.cpp looks GELU up in a table of float16, of 11 bits: 6e-4 in 3 layers, 4e-3 in 46
# Weights, and what llama.cpp multiplies them by, have 11 and 8 bits, or 8 for the largest of 32. Random weights make
# much of it: 0.005, 0.03 and 0.15 found, where a wrong order of bytes or of weights gives 1.
ROUNDED = {"float16": 0.02, "bfloat16": 0.1, "q8_0": 0.3}
SMALLEST_FLOAT16 = 2.0**-24
BYTES = byte_tokenizer()
BPE = train_bpe(["the cat sat on the mat and didn't stop\n", "def f(x):\n    return [x, 1]\n"] * 5, 290, ["<|user|>"])
TEXTS = [
    "",
    " ",
    f"a {END_OF_TEXT} inside",
    "don't  stop,\n\n\tnow . !? the cat's mat\n",
    "é ﬁ Å 😀 \u200b\ufeff 中文 ١٢٣ \u00a0 end",
    "x = [1, 22, 333]  # 1234567\r\n\r\n  y",
]

YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 16, "fast_turns": 3.0, "attention_factor": 1.0}
GEMMA = {
    "embedding": {"kind": "token", "scaled": True, "tied": True},
    "feedforward": {"kind": "geglu", "approximate": True},
    "norm_placement": "around",
}
WINDOW = {"kind": "sliding", "window_tokens": 8}
GPT2 = {"attention": {"num_kv_heads": 3, "bias": True}, "norm": "layernorm", "position": "learned"}
GELU = {"kind": "gelu", "bias": True, "approximate": True, "d_hidden": None}
# name -> the architecture of llama.cpp, the spec
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, untied, wide heads, linear": (
        "llama",
        {
            "embedding": {"tied": False},
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
            "position": {"scaling": {"kind": "linear", "factor": 3.0}},
        },
    ),
    "Llama, YaRN": ("llama", {"position": {"scaling": YARN}}),
    "Llama, NTK": ("llama", {"position": {"scaling": {"kind": "ntk", "factor": 3.0}}}),
    "Mixtral": ("llama", {"feedforward": {"kind": "moe", "num_experts": 4}}),
    "Qwen3": ("qwen3", {"attention": {"qk_norm": True, "qk_norm_eps": 1e-5}, "norm": {"eps": 1e-5}}),
    "Phi-3, a part that turns": ("phi3", {"position": {"rotary_dim": 16}}),
    "Phi-3, LongRoPE": (
        "phi3",
        {"position": {"kind": "longrope", "long_factors": [1 + n for n in range(16)], "original_context_tokens": 12}},
    ),
    "GPT-2": ("gpt2", {**GPT2, "feedforward": GELU}),
    "GPT-2, sinusoidal, no biases, shared heads": (
        "gpt2",
        {
            "position": "sinusoidal",
            "feedforward": {**GELU, "bias": False},
            "norm": {"kind": "layernorm", "bias": False},
        },
    ),
    "Gemma-2": (
        "gemma2",
        {
            **GEMMA,
            "attention": {"soft_cap": 4.0, "scale": 0.1},
            "head": {"kind": "soft_cap", "cap": 5.0},
            "blocks": [{}, {"attention": WINDOW}],
        },
    ),
    "Gemma-2 without caps and windows": ("gemma2", GEMMA),
    "Gemma-2 of as many layers as 27B": (
        "gemma2",
        {**GEMMA, "num_layers": 46, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}},
    ),
    "Gemma-3": (
        "gemma3",
        {
            **GEMMA,
            "embedding": {"kind": "token", "scaled": True, "tied": False},
            "attention": {"qk_norm": True, "scale": 0.1},
            "head": {"kind": "soft_cap", "cap": 5.0},
            "position": {"theta": 5_000.0, "scaling": {"kind": "linear", "factor": 2.0}},
            "blocks": [{"attention": WINDOW, "position": {"kind": "rope", "theta": 100.0, "scaling": None}}, {}],
        },
    ),
    "OLMo-2": ("olmo2", {"attention": {"qk_norm": "whole", "num_kv_heads": 1}, "norm_placement": "output"}),
    "Starcoder2": ("starcoder2", {"feedforward": {**GELU, "bias": False}, "norm": "layernorm"}),
    "Bloom": ("bloom", {**GPT2, "position": "alibi", "embedding_norm": True, "feedforward": GELU}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(nano: Callable[..., Any], name: str, tokenizer: Tokenizer = BYTES) -> Any:
    return drawn(nano(vocab_size=tokenizer.vocab_size, **MODELS[name][1]))


class File:
    """What the `gguf` reader finds."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }

    def of(self, key: str) -> Any:
        return self.fields.get(f"{self.fields['general.architecture']}.{key}")


@every_model
def test_every_weight_stands_in_the_file_and_nothing_else(name, nano, tmp_path):
    model = made(nano, name)
    file = File(export_gguf(model, BYTES, tmp_path / "it.gguf", dtype="float32"))
    assert file.fields["general.architecture"] == MODELS[name][0]
    left = dict(file.tensors)
    for parameter, weight in model.named_parameters():
        expected = weight.detach()
        if parameter in ("embedding.weight", "head.weight"):
            expected = expected[: BYTES.vocab_size]
        found = taken(left, parameter, model.spec, file)
        if name.startswith("Gemma") and parameter.endswith(
            "attention.q.weight" if name.startswith("Gemma-2") else "q_norm.weight"
        ):
            width, divisor = model.spec.head_dim, 96 // 2 if model.spec.num_layers == 46 else model.spec.head_dim
            scale = model.spec.attention.scale or width**-0.5
            torch.testing.assert_close(found, expected * (scale * divisor**0.5))
        elif "no biases, shared heads" in name and parameter.endswith(("k.weight", "v.weight")):
            torch.testing.assert_close(found, expected.unflatten(0, (1, 32)).repeat(3, 1, 1).flatten(0, 1))
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected = {key for key in left if key.endswith(".bias") and not left[key].any()}  # theirs, for biases of none
    expected |= {"position_embd.weight"} if "sinusoidal" in name else set()
    expected |= {"output.weight"} if name == "OLMo-2" else set()
    expected |= {"rope_freqs.weight"} if "YaRN" in name else set()
    expected |= {"rope_factors_long.weight", "rope_factors_short.weight"} if "LongRoPE" in name else set()
    assert left.keys() == expected


def taken(left: dict[str, Tensor], parameter: str, spec: Any, file: File) -> Tensor:
    """One of our parameters out of the file's tensors: written from llama.cpp's side, apart from what exports.

    A tensor that holds several is cut as llama.cpp cuts it, and leaves when its last part is taken.
    """
    names = {
        "embedding.weight": "token_embd.weight",
        "head.weight": "output.weight",
        "norm": "output_norm",
        "embedding_norm": "token_embd_norm",
        "position.weight": "position_embd.weight",
    }
    head, _, part = parameter.rpartition(".")
    if parameter in names or head in names:
        return left.pop(names.get(parameter) or f"{names[head]}.{part}")
    _, layer, sub, *rest = parameter.split(".")
    arch = file.fields["general.architecture"]
    num_heads, num_kv, width = file.of("attention.head_count"), file.of("attention.head_count_kv"), 0
    width = file.of("attention.key_length")
    if rest[0] in ("q", "k", "v") and f"blk.{layer}.attn_qkv.{part}" in left:
        whole = left[f"blk.{layer}.attn_qkv.{part}"]
        q, k, v = whole.split([num_heads * width, num_kv * width, num_kv * width])
        if rest[0] == "v":
            del left[f"blk.{layer}.attn_qkv.{part}"]
        return {"q": q, "k": k, "v": v}[rest[0]]
    if arch == "phi3" and rest[0] in ("gate", "up"):
        name = f"blk.{layer}.ffn_up.weight"
        return left[name].chunk(2)[0] if rest[0] == "gate" else left.pop(name).chunk(2)[1]
    if rest[0] == "experts":
        number, kind = int(rest[1]), {"gate": "gate", "up": "up", "out": "down"}[rest[2]]
        name = f"blk.{layer}.ffn_{kind}_exps.weight"
        return left.pop(name)[number] if number == file.of("expert_count") - 1 else left[name][number]
    after = arch == "olmo2"
    theirs = {
        ("attention_norm",): "post_attention_norm" if after else "attn_norm",
        ("feedforward_norm",): "post_ffw_norm" if after else "ffn_norm",
        ("attention_out_norm",): "post_attention_norm",
        ("feedforward_out_norm",): "post_ffw_norm",
        ("attention", "q"): "attn_q",
        ("attention", "k"): "attn_k",
        ("attention", "v"): "attn_v",
        ("attention", "out"): "attn_output",
        ("attention", "q_norm"): "attn_q_norm",
        ("attention", "k_norm"): "attn_k_norm",
        ("feedforward", "gate"): "ffn_gate",
        ("feedforward", "up"): "ffn_up",
        ("feedforward", "out"): "ffn_down",
        ("feedforward", "router"): "ffn_gate_inp",
    }[(sub, *rest[:-1])]
    found = left.pop(f"blk.{layer}.{theirs}.{part}")
    if arch == "llama" and rest[0] in ("q", "k"):  # pairs of neighbours: even rows are the first half of a head
        heads = found.reshape(-1, width, found.shape[1])
        found = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(found.shape)
    return found


def test_settings_stand_under_llama_cpps_keys(nano, tmp_path):
    def file(name: str) -> File:
        return File(export_gguf(made(nano, name), BYTES, tmp_path / f"{name.split(',')[0]}.gguf"))

    llama = file("Llama, untied, wide heads, linear")
    sizes = ("block_count", "embedding_length", "context_length", "feed_forward_length", "vocab_size")
    assert [llama.of(key) for key in sizes] == [3, 96, 64, 256, 257]
    heads = ("head_count", "head_count_kv", "key_length", "value_length")
    assert [llama.of(f"attention.{key}") for key in heads] == [2, 1, 64, 64]
    assert (llama.of("rope.dimension_count"), llama.of("rope.freq_base")) == (64, 10_000.0)
    assert (llama.of("rope.scaling.type"), llama.of("rope.scaling.factor")) == ("linear", 3.0)
    assert llama.fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert file("Qwen3").of("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert file("GPT-2").of("attention.layer_norm_epsilon") == pytest.approx(1e-5)
    mixtral = file("Mixtral")
    assert (mixtral.of("expert_count"), mixtral.of("expert_used_count")) == (4, 2)
    gemma = file("Gemma-3")
    assert (gemma.of("attention.sliding_window"), gemma.of("final_logit_softcapping")) == (8, 5.0)
    assert gemma.of("attention.sliding_window_pattern") == [True, False, True]
    assert (gemma.of("rope.freq_base"), gemma.of("rope.freq_base_swa")) == (5_000.0, 100.0)
    assert file("Phi-3, a part that turns").of("rope.dimension_count") == 16


def test_tokens_merges_and_the_chat_template_stand_in_the_file(nano, tmp_path):
    file = File(export_gguf(made(nano, "Llama", BPE), BPE, tmp_path / "it.gguf"))
    stored = json.loads(BPE.inner.to_str())
    vocabulary = {**stored["model"]["vocab"], **{token["content"]: token["id"] for token in stored["added_tokens"]}}
    assert dict(zip(file.fields["tokenizer.ggml.tokens"], range(BPE.vocab_size), strict=True)) == vocabulary
    pairs = [tuple(merge.split(" ")) for merge in file.fields["tokenizer.ggml.merges"]]
    assert len(pairs) > 20 and pairs == [tuple(pair) for pair in stored["model"]["merges"]]
    kinds = file.fields["tokenizer.ggml.token_type"]
    special = [number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert special == sorted(BPE.special_ids.values())
    assert (file.fields["tokenizer.ggml.model"], file.fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    for which in ("bos", "eos"):
        assert file.fields[f"tokenizer.ggml.{which}_token_id"] == BPE.eot_id
    assert file.fields["tokenizer.ggml.add_bos_token"] is True
    assert file.fields["tokenizer.chat_template"] == BPE.chat_template


@pytest.mark.parametrize(
    ("dtype", "kind", "error"),
    # Half of the last place; of q8_0 half of 1 / 127 of the block's largest, and its scale is a float16.
    [("float16", "F16", 2**-11), ("bfloat16", "BF16", 2**-8), ("q8_0", "Q8_0", 1 / 254 + 2**-11)],
)
def test_matrices_are_rounded_as_asked_for_and_norms_are_not(dtype, kind, error, nano, tmp_path):
    model = made(nano, "GPT-2")
    file = File(export_gguf(model, BYTES, tmp_path / "it.gguf", dtype=dtype))
    assert {key: kind for key, kind in file.kinds.items() if "norm" in key or "bias" in key or "position" in key} == {
        key: "F32" for key in file.kinds if "norm" in key or "bias" in key or "position" in key
    }
    weight = model.blocks[0].feedforward.up.weight.detach()
    assert file.kinds["blk.0.ffn_up.weight"] == kind
    largest = weight.abs() if dtype != "q8_0" else weight.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    difference = (file.tensors["blk.0.ffn_up.weight"] - weight).abs()
    assert (difference <= error * largest + SMALLEST_FLOAT16).all()
    assert difference.max() > error * largest.max() / 3


def test_rows_that_no_block_of_q8_0_fits_stay_float16(nano, tmp_path):
    model = drawn(nano(vocab_size=BYTES.vocab_size, feedforward={"d_hidden": 80}))
    kinds = File(export_gguf(model, BYTES, tmp_path / "it.gguf", dtype="q8_0")).kinds
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": WINDOW}, "attention.window_tokens is set, and llama.cpp's phi3 has no window"),
        ({**GPT2, "feedforward": "relu2"}, "feedforward.kind is relu2, and llama.cpp's gpt2 has GELU"),
        ({**GPT2, "feedforward": {**GELU, "approximate": False}}, "feedforward.kind is gelu without approximate"),
        ({**GEMMA, "embedding": {"kind": "token", "scaled": True, "tied": False}}, "llama.cpp's gemma2 reads no head"),
        (
            {"attention": {"qk_norm": True}, "position": {"scaling": YARN}},
            "position scales some frequencies more than others, and llama.cpp's qwen3 scales all alike",
        ),
        (
            {
                **GEMMA,
                "attention": {"qk_norm": True},
                "position": {"scaling": {"kind": "linear", "factor": 2.0}},
                "blocks": [{"attention": WINDOW}, {}],
            },
            "position is scaled in layers with a window, and llama.cpp's gemma3 scales it in the others alone",
        ),
        ({"attention": {"sinks": True}}, "no stock architecture for this model"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_with_the_reason(fields, reason, nano, tmp_path):
    with pytest.raises(UnsupportedError) as refused:
        export_gguf(nano(vocab_size=BYTES.vocab_size, **fields), BYTES, tmp_path / "it.gguf")
    assert reason in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_taken_path_an_unknown_dtype_and_a_foreign_tokenizer_are_refused(nano, tmp_path, monkeypatch):
    model = nano(vocab_size=BYTES.vocab_size)
    (tmp_path / "it.gguf").write_text("mine")
    with pytest.raises(ConfigError, match=r"it\.gguf: already exists"):
        export_gguf(model, BYTES, tmp_path / "it.gguf")
    with pytest.raises(ConfigError, match="no dtype 'q4_0' .one of float32, float16, bfloat16, q8_0"):
        export_gguf(model, BYTES, tmp_path / "other.gguf", dtype="q4_0")
    with pytest.raises(ConfigError, match="tokenizer: has 290 tokens, the model 257"):
        export_gguf(model, BPE, tmp_path / "other.gguf")
    letters = char_tokenizer("abcdefgh")
    with pytest.raises(UnsupportedError, match="a char tokenizer refuses characters"):
        export_gguf(nano(vocab_size=letters.vocab_size), letters, tmp_path / "other.gguf")
    with torch.no_grad():
        model.blocks[0].feedforward.up.weight[0, 0] = 1e5
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight has numbers beyond float16's"):
        export_gguf(model, BYTES, tmp_path / "other.gguf")
    with monkeypatch.context() as without:
        without.delitem(llama_cpp.KNOWN, "LlamaForCausalLM")
        with pytest.raises(UnsupportedError, match=r"no GGUF of this model: .*does not know LlamaForCausalLM"):
            export_gguf(model, BYTES, tmp_path / "other.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="need the package gguf: pip install 'gguf==0"):
        export_gguf(model, BYTES, tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["it.gguf"]


@torch.no_grad()
def test_llama_cpp_computes_our_logits_and_tokens_of_every_architecture(nano, tmp_path):
    python = python_with_llama_cpp()
    generator = torch.Generator().manual_seed(6)
    tokens_T = torch.randint(BYTES.eot_id, (40,), generator=generator).tolist()
    models = {name: made(nano, name) for name in MODELS}
    files = {
        name: export_gguf(models[name], BYTES, tmp_path / f"{n}.gguf", dtype="float32") for n, name in enumerate(models)
    }
    rounded = {dtype: export_gguf(models["Llama"], BYTES, tmp_path / f"{dtype}.gguf", dtype=dtype) for dtype in ROUNDED}
    bpe = export_gguf(made(nano, "Llama", BPE), BPE, tmp_path / "bpe.gguf")
    asked = {
        "logits": {name: [str(path), tokens_T] for name, path in {**files, **rounded}.items()},
        "tokens": {"bytes": [str(files["Llama"]), TEXTS], "bpe": [str(bpe), TEXTS]},
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("_llama_cpp.py")
    subprocess.run([python, script, tmp_path / "asked.json", tmp_path], check=True, timeout=250)
    errors = {}
    for name in [*models, *rounded]:
        expected = models["Llama" if name in rounded else name](torch.tensor([tokens_T]))[0]
        found = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
        errors[name] = float((found - expected).abs().max() / expected.abs().max())
    for name, error in errors.items():
        has_gelu = name not in rounded and ("gelu" in json.dumps(MODELS[name][1]) or name.startswith("Gemma"))
        assert error < ROUNDED.get(name, RELATIVE_WITH_GELU if has_gelu else RELATIVE), errors
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    for which, tokenizer in (("bytes", BYTES), ("bpe", BPE)):
        assert tokens[which] == [[tokenizer.eot_id, *tokenizer.encode(text)] for text in TEXTS]
