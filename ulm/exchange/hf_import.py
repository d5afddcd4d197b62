"""A Hugging Face folder of a stock architecture as a checkpoint of ours: a member, a seed, something to train on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ulm
from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.components.position import longrope
from ulm.errors import ArtefactError, ConfigError, did_you_mean
from ulm.exchange.contract import Architecture, Config
from ulm.exchange.hf import architectures
from ulm.exchange.hf_tokenizer import read_json, read_tokenizer
from ulm.exchange.plain import plain
from ulm.exchange.weights import Weights, imported
from ulm.recipes.base import checked_name
from ulm.spec import ModelSpec

# Read together by architectures; several ways to say one thing.
ROPE = {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
ROPE |= {"original_max_position_embeddings"}
# Of training, of tools, of the tokenizer, or of how numbers are stored: nothing that a logit depends on.
NOT_OF_THE_MODEL = {
    "_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "task_specific_params", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_decoder",
    "is_encoder_decoder", "use_cache", "cache_implementation", "initializer_range", "gradient_checkpointing",
    "pretraining_tp", "slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion",
    "reorder_and_upcast_attn", "output_router_logits", "router_aux_loss_coef", "n_ctx", "n_embed", "max_window_layers",
    "sliding_window_pattern", "_sliding_window_pattern", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
}  # fmt: skip
ABSENT = (None, False, 0, 0.0, "")


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was made, what it came from, and what is worth knowing."""

    checkpoint: Path
    digest: str
    architecture: str
    spec: ModelSpec
    notes: tuple[str, ...]


def import_hf(source: Path | str, *, root: Path, name: str, context_tokens: int | None = None) -> Imported:
    """A checkpoint under runs/<name>, its name under models/ and its tokenizer's, of a folder of transformers.

    `context_tokens` gives it a shorter context than the folder's. ConfigError for a setting that ours has no word for
    and for a name that is taken, ArtefactError for files that are missing, damaged or of another model.
    """
    source = Path(source).expanduser().absolute()
    run = root / "runs" / checked_name(name)
    config = read_json(source / "config.json")
    tokenizer, notes = read_tokenizer(source, config)
    if config.get("model_type") == "ulm":
        architecture, spec = "UlmForCausalLM", _own_spec(config, context_tokens)
        weights = _own_weights(source)
    else:
        stock = _architecture(config)
        whole = {**stock.defaults, **config}
        architecture, spec = stock.name, _spec(stock, whole, context_tokens)
        weights, notes = _weights(source, stock, spec), (*notes, *_notes(stock, whole, spec))
    if (more := spec.vocab_size - tokenizer.vocab_size) < 0:
        problem = f"{tokenizer.vocab_size} tokens, and the model has {spec.vocab_size}"
        raise ArtefactError(f"{source / 'tokenizer.json'}: {problem}")
    if more:
        notes = (*notes, f"{more} rows of the tables that no token has are left out")
        spec = spec.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = ulm.build(spec)
    _fill(model, weights, more)
    step = store.step_folder(run, 0)
    if run.exists():
        raise ConfigError("name", f"there is a run {name} already", "another name, or remove its folder")
    with artefacts.shared_lock(root):  # so that `ulm gc` never sees it without its name
        store.write(store.snapshot(model, tokenizer, copy=False), step)
        artefacts.point(root / "models" / name, step)
        artefacts.point(root / "tokenizers" / "names" / name, tokenizer.save(root))  # corpora for it are built with it
    return Imported(step, read_manifest(step).digest, architecture, spec, notes)


def _architecture(config: Config) -> Architecture:
    """The file of architectures/ that a config.json names."""
    names = {architecture.name: architecture for architecture in architectures()}
    given = config.get("architectures")
    name = given[0] if isinstance(given, list) and given and isinstance(given[0], str) else None
    if name in names:
        return names[name]
    of_type = {architecture.model_type: architecture for architecture in architectures()}
    if name is None and config.get("model_type") in of_type:
        return of_type[config["model_type"]]
    raise ConfigError("config.json: architectures", f"ours has no {name!r}", did_you_mean(str(name), names))


def _spec(architecture: Architecture, config: Config, context_tokens: int | None) -> ModelSpec:
    """The spec that a config.json means. ConfigError by name for a setting that it says and the spec does not."""
    try:
        fields = architecture.fields(config)
        spec = ModelSpec.parse(fields)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError("config.json", f"not a {architecture.name}'s: {type(error).__name__}: {error}") from None
    said = json.loads(json.dumps(architecture.config(plain(spec))))
    for key, ours in said.items():
        theirs = config.get(key)
        is_same = theirs is None or theirs == ours or (theirs in ABSENT and ours in ABSENT)  # None: left open
        if key not in ROPE and not key.endswith(("dropout", "pdrop")) and not is_same:
            raise ConfigError(f"config.json: {key}", f"{theirs!r} here, and a spec of ours can only have {ours!r}")
    if context_tokens is None:
        return spec
    if not 2 <= context_tokens <= spec.context_tokens:
        raise ConfigError("context", f"{context_tokens} tokens", f"from 2 to the folder's {spec.context_tokens:,}")
    position = spec.position.model_dump()  # a table of positions stays as long as it is
    if isinstance(spec.position, longrope.Config):  # and so do queries and keys, whichever factors hold
        position["attention_factor"] = spec.position.length_at(spec.context_tokens)
    return ModelSpec.parse({**fields, "position": position, "context_tokens": context_tokens})


def _own_spec(config: Config, context_tokens: int | None) -> ModelSpec:
    """The spec that a folder with its own code holds. ConfigError for kinds by module: a folder may not import any."""
    given = config.get("spec")
    if not isinstance(given, dict):
        raise ConfigError("config.json: spec", "no spec in it", "a folder of `ulm export`")
    if ":" in (foreign := next(_kinds(given), "")):
        raise ConfigError(
            "config.json: spec", f"{foreign!r} is no kind of ours", "a folder names no modules of its own"
        )
    return ModelSpec.parse({**given, **({"context_tokens": context_tokens} if context_tokens else {})})


def _kinds(given: Any) -> Iterator[str]:
    """Names of kinds, those with a module first."""
    parts = given.values() if isinstance(given, dict) else given if isinstance(given, list) else ()
    found = [kind for part in parts for kind in _kinds(part)]
    if isinstance(given, dict) and isinstance(given.get("kind"), str):
        found.append(given["kind"])
    yield from sorted(found, key=lambda kind: ":" not in kind)


def _own_weights(source: Path) -> Weights:
    """Tensors under our names of a folder with its own code."""
    stored = _read(source)
    return {
        "head.weight" if name == "lm_head.weight" else name.removeprefix("model."): tensor.float()
        for name, tensor in stored.items()
    }


def _notes(architecture: Architecture, config: Config, spec: ModelSpec) -> tuple[str, ...]:
    """What was passed over, and what differs in use."""
    said = architecture.config(plain(spec))
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in said
        and key not in NOT_OF_THE_MODEL | ROPE | architecture.defaults.keys()
        and value not in ABSENT
        and not key.endswith(("dropout", "pdrop"))
    )
    found = [f"config.json: {', '.join(unknown)}: not known here, and passed over"] if unknown else []
    position = spec.position.model_dump()
    original = position.get("original_context_tokens")
    is_one_list = position.get("short_factors") == position.get("long_factors")
    if position["kind"] == "longrope" and original and spec.context_tokens > original and not is_one_list:
        problem = f"texts up to {original:,} tokens have other factors in transformers than longer ones; here all have"
        found.append(f"{problem} those of the longer; --context {original} for the shorter")
    return tuple(found)


def _weights(source: Path, architecture: Architecture, spec: ModelSpec) -> Weights:
    """Our tensors of the folder's, in float32."""
    settings = plain(spec)
    rules = list(architecture.rules(settings))
    tensors = _read(source)
    prefix = rules[0].theirs.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):  # a model that was saved without its head
        tensors = {name if name.startswith("lm_head") else prefix + name: tensor for name, tensor in tensors.items()}
    tied = tensors.get("lm_head.weight") if settings["embedding.tied"] else None
    if tied is not None and not torch.equal(tied, tensors.get(rules[0].theirs, torch.empty(0))):
        raise ArtefactError(f"{source}: lm_head.weight is no copy of the embeddings, and config.json ties them")

    def is_unused(name: str) -> bool:
        constants = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
        return name.endswith(constants) or (tied is not None and name == "lm_head.weight")

    return {name: tensor.float() for name, tensor in imported(tensors, rules, is_unused).items()}


def _read(source: Path) -> Weights:
    """All tensors of model.safetensors, or of the files that its index names."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        of = read_json(index).get("weight_map")
        names = sorted(set(of.values())) if isinstance(of, dict) else []
    else:
        names = ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtefactError(f"{index}: {name!r} is no file of this folder")
        path = source / name
        try:
            found |= load_file(path)
        except FileNotFoundError:
            remedy = "pickled weights (.bin) are not read, since they may run code; save the model as safetensors"
            raise ArtefactError(f"{path}: no such file; {remedy}") from None
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: not readable: {error}") from None
    return found


@torch.no_grad()
def _fill(model: Any, weights: Mapping[str, Tensor], num_idle: int) -> None:
    """Weights into a model, without the last `num_idle` rows of tables; what is left of its own rows are zeros."""
    held = dict(model.named_parameters())
    constants = [name for name in model.state_dict() if name in weights and name not in held]
    if lost := sorted(held.keys() - weights.keys()):
        raise ArtefactError(f"model.safetensors: no tensor {lost[0]}")
    for name, parameter in (held | {name: model.get_buffer(name) for name in constants}).items():
        weight, kept = weights[name], parameter
        if name.startswith("embedding.tables.") or name in ("embedding.weight", "head.weight"):
            weight, kept = weight[: max(0, len(weight) - num_idle)], parameter[: model.vocab_size]
        if kept.shape != weight.shape:
            problem = f"{name} is {list(weight.shape)}, where config.json means {list(kept.shape)}"
            raise ArtefactError(f"model.safetensors: {problem}")
        if not math.isfinite(weight.sum().item()):
            raise ArtefactError(f"model.safetensors: {name} has numbers that are not finite")
        parameter.zero_()
        kept.copy_(weight)
