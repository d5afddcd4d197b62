"""A model as a stock Hugging Face Llama folder, which transformers, vLLM and llama.cpp's converter open unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ulm import artefacts
from ulm.errors import ConfigError, UnsupportedError
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a LlamaForCausalLM is made of, in our words.
LLAMA = {
    "embedding": "token",
    "position": "rope",
    "attention": "gqa",
    "feedforward": "swiglu",
    "norm": "rmsnorm",
    "head": "logits",
}
SIZES = ("model", "vocab_size", "context_tokens", "d_model", "num_layers")
# Settings that a Llama has a word for; every other one must be as it is by default.
KNOWN = {
    "embedding": {"tied"},
    "position": {"theta"},
    "attention": {"num_heads", "num_kv_heads", "head_dim"},
    "feedforward": {"d_hidden"},
    "norm": {"eps"},
    "head": set[str](),
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
    "feedforward.gate.weight": "mlp.gate_proj.weight",
    "feedforward.up.weight": "mlp.up_proj.weight",
    "feedforward.out.weight": "mlp.down_proj.weight",
}


def export_hf(model: Any, tokenizer: Tokenizer, folder: Path | str, *, dtype: str = "float32") -> Path:
    """A LlamaForCausalLM folder at `folder`, whole or not at all; returns it.

    The exported tokenizer gives `tokenizer.encode`'s ids, and puts <|endoftext|> before them where special tokens are
    asked for (transformers' default), as `ulm.generate` does with a text prompt. UnsupportedError for a spec that is
    no Llama, ConfigError for a folder that is taken, an unknown dtype or a tokenizer of another vocabulary.
    """
    folder = Path(folder).expanduser().absolute()
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"no dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(str(folder), "already exists and is not an empty folder", "name a new folder")
    if tokenizer.vocab_size != model.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ConfigError("tokenizer", sizes, "export a model with the tokenizer it was trained with")
    check_llama(model.spec)
    config = llama_config(model.spec, model.blocks[0].feedforward.gate.out_features, tokenizer.eot_id, dtype)
    with artefacts.new_folder(folder) as partial:
        save_file(llama_weights(model, DTYPES[dtype]), partial / "model.safetensors", metadata={"format": "pt"})
        _write_json(partial / "config.json", config)
        end = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.eot_id}
        _write_json(partial / "generation_config.json", {"_from_model_config": False, "do_sample": False, **end})
        _write_tokenizer(tokenizer, partial, model.spec.context_tokens)
    return folder


def llama_config(spec: ModelSpec, d_hidden: int, eot_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a spec that `check_llama` accepts."""
    given: dict[str, dict[str, Any]] = {slot: getattr(spec, slot).model_dump() for slot in LLAMA}
    theta = given["position"]["theta"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": d_hidden,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": given["attention"]["num_heads"],
        "num_key_value_heads": given["attention"]["num_kv_heads"],
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context_tokens,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # transformers 5
        "rope_theta": theta,  # transformers 4 and converters
        "rms_norm_eps": given["norm"]["eps"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": given["embedding"]["tied"],
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "pad_token_id": None,
        "dtype": dtype,
    }


def check_llama(spec: ModelSpec) -> None:
    """Nothing, or UnsupportedError with every part that a Llama does not have."""
    parts = {"model": (spec.model, "decoder")}
    parts |= {slot: (getattr(spec, slot).kind, kind) for slot, kind in LLAMA.items()}
    foreign = [f"{slot} is {has!r}, a Llama's is {wants!r}" for slot, (has, wants) in parts.items() if has != wants]
    plain = ModelSpec(**{name: getattr(spec, name) for name in (*SIZES, *LLAMA)})
    foreign += [f"{name} is set" for name in type(spec).model_fields if getattr(spec, name) != getattr(plain, name)]
    foreign += [
        f"{slot}.{name} is {value!r}"
        for slot, kind in LLAMA.items()
        if getattr(spec, slot).kind == kind
        for name, value in getattr(spec, slot)
        if name not in {"kind", *KNOWN[slot]} and value != type(getattr(spec, slot)).model_fields[name].default
    ]
    num_heads = getattr(spec.attention, "num_heads", 1)
    if spec.d_model % num_heads:  # transformers refuses it even where head_dim is given
        foreign.append(f"d_model {spec.d_model} is no multiple of its {num_heads} heads")
    if foreign:
        raise UnsupportedError(f"no stock Llama folder for this model: {'; '.join(foreign)}")


def llama_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under Llama's names, tables cut to the vocabulary.

    A tied head is left out, as tie_word_embeddings says: vLLM takes a stored head for an untied one.
    """
    weights = {"model.embed_tokens.weight": model.embedding.weight[: model.vocab_size]}
    weights["model.norm.weight"] = model.norm.weight
    if model.head.weight is not model.embedding.weight:
        weights["lm_head.weight"] = model.head.weight[: model.vocab_size]
    for layer, block in enumerate(model.blocks):
        parameters = dict(block.named_parameters())
        weights |= {f"model.layers.{layer}.{theirs}": parameters.pop(ours) for ours, theirs in LAYER_NAMES.items()}
        assert not parameters, f"not exported: {sorted(parameters)}"
    return {name: w.detach().to("cpu", dtype).contiguous().clone() for name, w in weights.items()}


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, context_tokens: int) -> None:
    stored = json.loads(tokenizer.inner.to_str())
    begin = {"id": END_OF_TEXT, "type_id": 0}
    text = [{"Sequence": {"id": id_, "type_id": type_id}} for type_id, id_ in enumerate("AB")]
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": begin}, text[0]],
        "pair": [{"SpecialToken": begin}, *text],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.eot_id], "tokens": [END_OF_TEXT]}},
    }
    _write_json(folder / "tokenizer.json", stored)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    others = [token for token in tokenizer.special_ids if token != END_OF_TEXT]
    _write_json(folder / "special_tokens_map.json", special)
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": True,
            "additional_special_tokens": others,
            "added_tokens_decoder": {str(i): {"content": token, **added} for token, i in tokenizer.special_ids.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_tokens,
            # Text that spells <|endoftext|> stays text. Further tokens are for chat templates, and those write text.
            "split_special_tokens": not others,
        },
    )
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
