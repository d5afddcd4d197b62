"""Any decoder as a Hugging Face folder that brings its own modelling code; vLLM opens it by the plugin in serve."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ulm import artefacts
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange.folder import DTYPES, checked, empty, write_config, write_json, write_tokenizer
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import Tokenizer

CODE = Path(__file__).parent / "carried"
CODE_FILES = ("configuration_ulm.py", "positions_ulm.py", "attention_ulm.py", "layers_ulm.py", "modeling_ulm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_ulm.UlmConfig",
    "AutoModel": "modeling_ulm.UlmModel",  # vLLM's transformers backend asks for it
    "AutoModelForCausalLM": "modeling_ulm.UlmForCausalLM",
}
# What the code computes, by slot.
CARRIED = {
    "embedding": {"token", "value"},
    "position": {"none", "learned", "sinusoidal", "rope", "longrope", "alibi", "t5"},
    "attention": {"gqa", "sliding", "linear", "performer"},
    "feedforward": {"swiglu", "geglu", "gelu", "relu", "relu2", "moe"},
    "norm": {"rmsnorm", "layernorm"},
    "head": {"logits", "soft_cap"},
    "mask": {"causal", "document", "padding"},  # of one text a row the last two take nothing away
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
VLLM_POSITIONS = CARRIED["position"] - {"t5"}
VLLM_ATTENTIONS = {"gqa", "sliding"}


def export_own(model: Any, tokenizer: Tokenizer, folder: Path | str, *, dtype: str = "float32") -> Path:
    """A folder for `trust_remote_code=True` at `folder`, whole or not at all; returns it.

    It needs torch and transformers alone. `vllm_refusals` says what of its spec vLLM cannot run. UnsupportedError for a
    spec that `refusals` has reasons against, ConfigError for a folder that is taken, an unknown dtype or a tokenizer of
    another vocabulary.
    """
    folder = checked(model, tokenizer, folder, dtype)
    if reasons := refusals(model.spec):
        raise UnsupportedError(f"no Hugging Face folder for this model: {'; '.join(reasons)}")
    with artefacts.new_folder(folder) as partial:
        save_file(own_weights(model, DTYPES[dtype]), partial / "model.safetensors", metadata={"format": "pt"})
        write_config(partial, own_config(model), tokenizer, dtype)
        write_tokenizer(tokenizer, partial, model.spec.context_tokens)
        for name in CODE_FILES:
            shutil.copyfile(CODE / name, partial / name)
    return folder


def export_mixture(experts: Mapping[str, Path | str], folder: Path | str) -> Path:
    """A folder at `folder` that vLLM opens, with our plugin, as one model that mixes several; returns it.

    `experts` are exported folders by id, stock or of `export_own`. The new folder holds none of their weights but where
    they are, as seen from itself: they move together. Equal weights hold where a request names none. ConfigError for
    a folder that is taken or holds no model, and for experts with different tokenizers.
    """
    folder = empty(folder)
    if not experts:
        raise ConfigError("experts", "there are none", "at least one exported folder")
    sources = {name: Path(source).expanduser().absolute() for name, source in experts.items()}
    configs = {name: _config(source) for name, source in sources.items()}
    first = next(iter(sources))
    for name, source in sources.items():
        if (source / "tokenizer.json").read_bytes() != (sources[first] / "tokenizer.json").read_bytes():
            raise ConfigError(
                f"experts.{name}", f"another tokenizer than that of {first}", "experts with one tokenizer"
            )
    config = {
        "architectures": ["UlmMixtureForCausalLM"],
        "model_type": "ulm_mixture",
        "experts": {name: os.path.relpath(source, folder) for name, source in sources.items()},
        **{field: configs[first][field] for field in ("vocab_size", "bos_token_id", "eos_token_id", "dtype")},
        **{field: max(_size(config, field) for config in configs.values()) for field in SIZES},
        "max_position_embeddings": min(_size(config, "max_position_embeddings") for config in configs.values()),
        "tie_word_embeddings": False,
    }
    with artefacts.new_folder(folder) as partial:
        save_file({"weights": torch.full((len(experts),), 1 / len(experts))}, partial / "model.safetensors")
        write_json(partial / "config.json", config)
        for path in sources[first].iterdir():
            if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "generation_config")):
                shutil.copyfile(path, partial / path.name)
    return folder


def own_config(model: Any) -> dict[str, Any]:
    """config.json of a spec without `refusals`, but for the ids of special tokens and the dtype."""
    spec: ModelSpec = model.spec
    layers = [block.attention for block in spec.blocks_of_weights for _ in range(spec.layers_per_block)]
    windows = [getattr(attention, "window_tokens", None) for attention in layers]
    keeps_first = any(getattr(attention, "num_sink_tokens", 0) for attention in layers)
    # Where one window is all, caches of transformers keep no more; of a window of 1 they keep all, if they are told.
    is_bounded = len(set(windows) - {None}) == 1 and 1 not in windows and not keeps_first
    types = ["sliding_attention" if window and is_bounded else "full_attention" for window in windows]
    feedforward = model.blocks[0].feedforward
    return {
        "architectures": ["UlmForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "ulm",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": getattr(feedforward, "experts", [feedforward])[0].out.in_features,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context_tokens,
        "tie_word_embeddings": spec.embedding.model_dump()["tied"],
        "attn_logit_softcapping": getattr(spec.attention, "soft_cap", None),
        "final_logit_softcapping": getattr(spec.head, "cap", None),
        "sliding_window": next(filter(None, windows)) if is_bounded else None,
        "layer_types": types,
        "spec": spec.model_dump(mode="json"),
    }


def own_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under their own names below `model.`, tables cut to the vocabulary, a head of its own as lm_head.

    A tied head is left out, as tie_word_embeddings says: vLLM takes a stored head for an untied one.
    """
    parameters = dict(model.named_parameters())  # one name for each, where a state dict has one for each place
    others = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tables = ("head.weight", "embedding.weight", "embedding.tables.")
    found = {}
    for name, weight in (parameters | {name: model.get_buffer(name) for name in sorted(others)}).items():
        kept = weight[: model.vocab_size] if name.startswith(tables) else weight
        theirs = "lm_head.weight" if name == "head.weight" else f"model.{name}"
        found[theirs] = kept.detach().to("cpu", dtype).contiguous().clone()
    return found


def refusals(spec: ModelSpec) -> list[str]:
    """Why a spec cannot be a folder with its own code; empty where it can."""
    reasons = [] if spec.model == "decoder" else [f"model is {spec.model!r}, and the code is a decoder's"]
    for slot, config in dict.fromkeys(_kinds(spec)):
        if config.kind == "prefix":
            reasons.append("mask prefix: transformers does not say where a prompt ends, whose tokens see each other")
        elif config.kind not in CARRIED[slot]:
            reasons.append(f"{slot} is {config.kind!r}, which the folder's code does not have")
    return list(dict.fromkeys(reasons))


def vllm_refusals(spec: ModelSpec) -> list[str]:
    """Why vLLM cannot run a spec that has no stock architecture; empty where it can. Those are for the local engine."""
    reasons = refusals(spec)
    for slot, config in dict.fromkeys(_kinds(spec)):
        if slot == "position" and config.kind in CARRIED[slot] - VLLM_POSITIONS:
            reasons.append(f"position {config.kind}: vLLM's kernels take no bias of scores but ALiBi's")
        if slot == "attention" and config.kind in CARRIED[slot] - VLLM_ATTENTIONS:
            reasons.append(f"attention {config.kind}: vLLM has no kernel for it")
        if getattr(config, "num_sink_tokens", 0):
            reasons.append("attention.num_sink_tokens: a window of vLLM forgets a text's first tokens")
    return list(dict.fromkeys(reasons))


def _kinds(spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    """Every slot of the spec and of its layers, with what stands there."""
    for slot in ("embedding", "position", "head"):
        yield slot, getattr(spec, slot)
    for config in spec.mask:
        yield "mask", config
    yield "norm", spec.norm
    for layer in spec.blocks_of_weights:
        for slot in ("position", "attention", "feedforward", "norm"):
            yield slot, getattr(layer, slot)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(folder), "no config.json in it", "a folder of ulm export") from None
    return found


def _size(config: Mapping[str, Any], field: str) -> int:
    """A size from an expert's config.json, under the name that its architecture has for it."""
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    more = {"max_position_embeddings": "n_positions", "num_key_value_heads": "num_attention_heads"}
    for name in (field, {**names, **more}.get(field, field)):
        if config.get(name) is not None:
            return int(config[name])
    if field == "head_dim":
        return _size(config, "hidden_size") // _size(config, "num_attention_heads")
    return _size(config, "num_attention_heads")  # of keys and values, under a name that stands for the queries' too
