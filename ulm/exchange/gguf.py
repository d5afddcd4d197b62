"""A model as one GGUF file, which llama.cpp and what is built on it read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ulm import artefacts
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange import llama_cpp
from ulm.exchange.hf import stock
from ulm.exchange.llama_cpp import Known, Rotation
from ulm.exchange.plain import Plain, by_layer, one
from ulm.exchange.rewrites import with_biases
from ulm.tokenizers.tokenizer import Tokenizer

DTYPES = ("float32", "float16", "bfloat16", "q8_0")
# llama.cpp adds and multiplies these as float32 alone, and its own converter keeps them so.
ALWAYS_FLOAT32 = ("position_embd", "ffn_gate_inp", "rope_f", "norm.")
Q8_0_BLOCK = 32  # numbers that share a scale; rows of another length stay float16
NO_CAP = 2.0**20  # of scores and logits up to 1,000: what it bends them by is beyond float32


def export_gguf(model: Any, tokenizer: Tokenizer, path: Path | str, *, dtype: str = "float16") -> Path:
    """A .gguf file at `path`, whole or not at all; returns it.

    `dtype` is that of the matrices; q8_0 has eight bits a weight and a scale for 32 of them. UnsupportedError with the
    reasons for a model or a tokenizer that llama.cpp would compute otherwise, ConfigError for a path that is taken, an
    unknown dtype or a tokenizer of another vocabulary.
    """
    gguf = _gguf()
    path = Path(path).expanduser().absolute()
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"no dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if tokenizer.vocab_size != model.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ConfigError("tokenizer", sizes, "export a model with the tokenizer it was trained with")
    if path.exists():
        raise ConfigError(str(path), "already exists", "name a new file")
    architecture, settings, weights = stock(model)
    if (known := llama_cpp.KNOWN.get(architecture.name)) is None:
        raise UnsupportedError(f"no GGUF of this model: ulm/exchange/llama_cpp.py does not know {architecture.name}")
    config = architecture.config(settings)
    rotations = llama_cpp.rotations(known, settings, config) if one(settings, "position.turning") else {}
    if reasons := [*llama_cpp.refusals(known, settings, rotations), *_refused_tokenizer(tokenizer)]:
        raise UnsupportedError(f"no GGUF of this model: {'; '.join(reasons)}")
    if one(settings, "norm.kind") == "layernorm":
        settings, weights = with_biases(settings, weights)
    tensors = llama_cpp.stored(known, settings, llama_cpp.scaled(known, settings, weights))
    if (factors := rotations[""].factors if rotations else None) is not None:
        tensors |= {f"{name}.weight": factors for name in known.factor_tensors}
    with artefacts.new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, known.name)
        writer.add_name(path.stem)
        writer.add_file_type(getattr(gguf.LlamaFileType, {"float32": "ALL_F32"}.get(dtype, f"MOSTLY_{_short(dtype)}")))
        _describe(writer, gguf, known, settings, config, rotations)
        _describe_tokenizer(writer, gguf, tokenizer)
        for name, tensor in tensors.items():
            numbers, kind = _numbers(gguf, name, tensor, dtype)
            writer.add_tensor(name, numbers, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("GGUF files need the package gguf: pip install 'gguf==0.19.0'") from None
    return gguf


def _short(dtype: str) -> str:
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]


def _describe(
    writer: Any, gguf: Any, known: Known, settings: Plain, config: dict[str, Any], rotations: dict[str, Rotation]
) -> None:
    """Sizes and settings, under the keys of the architecture."""
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(settings["context_tokens"])
    writer.add_embedding_length(settings["d_model"])
    writer.add_block_count(settings["num_layers"])
    writer.add_feed_forward_length(one(settings, "feedforward.d_hidden"))
    writer.add_head_count(one(settings, "attention.num_heads"))
    writer.add_head_count_kv(one(settings, "attention.num_kv_heads"))
    writer.add_key_length(one(settings, "attention.head_dim"))
    writer.add_value_length(one(settings, "attention.head_dim"))
    is_rms = one(settings, "norm.kind") == "rmsnorm"
    (writer.add_layer_norm_rms_eps if is_rms else writer.add_layer_norm_eps)(one(settings, "norm.eps"))
    if experts := one(settings, "feedforward.num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(one(settings, "feedforward.experts_per_token"))
    if rotations:
        _describe_rotation(writer, gguf, rotations)
    windows = by_layer(settings, "attention.window_tokens")
    if any(windows):
        writer.add_sliding_window(max(window for window in windows if window))
        writer.add_sliding_window_pattern([bool(window) for window in windows])
    elif known.name == "gemma2":  # has a window of 4,096 unless it is told of another
        writer.add_sliding_window(settings["context_tokens"])
    if known.name == "gemma2":  # and caps of 50 and 30
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"] or NO_CAP)
        writer.add_final_logit_softcapping(config["final_logit_softcapping"] or NO_CAP)
    elif cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)


def _describe_rotation(writer: Any, gguf: Any, rotations: dict[str, Rotation]) -> None:
    whole = rotations[""]
    writer.add_rope_dimension_count(whole.num_dims)
    writer.add_rope_freq_base(whole.theta)
    if "_swa" in rotations:
        writer.add_rope_freq_base_swa(rotations["_swa"].theta)
    if whole.factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(whole.factor)
    if whole.length != 1:
        writer.add_rope_scaling_attn_factors(whole.length)


def _refused_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Why llama.cpp would give other tokens; empty where it gives these."""
    match tokenizer.kind:
        case "bpe" | "byte":
            return []
        case "char":
            return ["a char tokenizer refuses characters that it does not know, and llama.cpp has none like it"]
        case kind:
            remedy = "llama.cpp's own convert_hf_to_gguf.py, on the exported Hugging Face folder, may know it by name"
            return [f"this {kind} tokenizer splits words in a way that has no name here; {remedy}"]


def _describe_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer) -> None:
    """Tokens, merges and special tokens; <|endoftext|> begins a text, as where ours is given one, and ends it."""
    vocabulary = sorted(tokenizer.inner.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    tokens = [token for token, _ in vocabulary]
    merges = json.loads(tokenizer.inner.to_str())["model"]["merges"]
    # A byte tokenizer has none, and llama.cpp refuses a file without: one that never applies, since no text is first
    # merged to all of a special token but its last letter.
    last = max(tokenizer.special_ids, key=tokenizer.special_ids.__getitem__)
    pairs = merges or [[last[:-1], last[-1]]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in tokenizer.special_ids else kinds.NORMAL for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id, writer.add_pad_token_id):
        add(tokenizer.eot_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _numbers(gguf: Any, name: str, tensor: Tensor, dtype: str) -> tuple[Any, Any]:
    """The numbers of a tensor as the file has them, and the kind that says so."""
    if tensor.dim() < 2 or any(part in name for part in ALWAYS_FLOAT32):
        dtype = "float32"
    elif dtype == "q8_0" and tensor.shape[-1] % Q8_0_BLOCK:
        dtype = "float16"
    if dtype == "float16" and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UnsupportedError(f"{name} has numbers beyond float16's (export as bfloat16 or float32)")
    kind = getattr(gguf.GGMLQuantizationType, _short(dtype))
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), kind
