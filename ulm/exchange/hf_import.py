"""A Hugging Face folder of a stock architecture as a checkpoint of ours: a member, a seed, something to train on."""

from __future__ import annotations

import json
import os
import reprlib
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
from ulm.exchange.folder import writing
from ulm.exchange.hf import architectures
from ulm.exchange.hf_tokenizer import read_json, read_tokenizer
from ulm.exchange.plain import plain
from ulm.exchange.weights import Weights, imported
from ulm.models.account import on_meta
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
WINDOW, WHOLE = "sliding_attention", "full_attention"  # of layer_types
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_TABLE_BYTES = 1 << 32
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
        weights = _own_weights(source, spec)
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
    without_weights = on_meta(spec)  # sizes are what a file says of itself: no memory for them before they are held
    _check_tables(without_weights)
    list(_places(without_weights, weights, more))
    model = ulm.build(spec)
    _fill(model, weights, more)
    step = store.step_folder(run, 0)
    if run.exists() and not all(path.name.endswith(artefacts.PARTIAL) for path in run.iterdir()):  # left by a kill
        raise ConfigError("name", f"there is a run {name} already", "another name, or remove its folder")
    with writing(run), artefacts.shared_lock(root):  # so that `ulm gc` never sees it without its name
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
        of_type, usual = config.get("model_type"), names[name].model_type
        if of_type not in (None, usual):  # by which transformers chooses
            raise ConfigError("config.json: model_type", f"{of_type!r}, and a {name}'s is {usual!r}")
        return names[name]
    same_type = [each for each in architectures() if each.model_type == config.get("model_type")]
    if name is None and same_type:
        return same_type[0]
    raise ConfigError("config.json: architectures", f"ours has no {name!r}", did_you_mean(str(name), names))


def _spec(architecture: Architecture, config: Config, context_tokens: int | None) -> ModelSpec:
    """The spec that a config.json means. ConfigError by name for a setting that it says and the spec does not."""
    try:
        fields = architecture.fields(config)
        spec = ModelSpec.parse(fields)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError("config.json", f"not a {architecture.name}'s: {type(error).__name__}: {error}") from None
    said = json.loads(json.dumps(architecture.config(plain(spec))))
    whole = _without_idle_window(config, spec)
    for key, ours in said.items():
        theirs = whole.get(key)
        is_same = theirs is None or theirs == ours or (theirs in ABSENT and ours in ABSENT)  # None: left open
        if key not in ROPE and not key.endswith(("dropout", "pdrop")) and not is_same:
            raise ConfigError(f"config.json: {key}", f"{theirs!r} here, and a spec of ours can only have {ours!r}")
    if context_tokens is None:
        return spec
    _check_context(context_tokens, spec)
    position = spec.position.model_dump()  # a table of positions stays as long as it is
    if isinstance(spec.position, longrope.Config):  # and so do queries and keys, whichever factors hold
        position["attention_factor"] = spec.position.length_at(spec.context_tokens)
    return ModelSpec.parse({**fields, "position": position, "context_tokens": context_tokens})


def _check_context(context_tokens: int, spec: ModelSpec) -> None:
    if not 2 <= context_tokens <= spec.context_tokens:
        raise ConfigError("context", f"{context_tokens} tokens", f"from 2 to the folder's {spec.context_tokens:,}")


def _without_idle_window(config: Config, spec: ModelSpec) -> Config:
    """A config.json without a window where none of its layers has it, or it is as long as the context."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    sees_all = isinstance(window, int) and window >= spec.context_tokens
    if not sees_all and not (isinstance(kinds, list) and WINDOW not in kinds):
        return config
    whole = [WHOLE if kind == WINDOW else kind for kind in kinds] if isinstance(kinds, list) else kinds
    return {**config, "sliding_window": None, "layer_types": whole}


def _own_spec(config: Config, context_tokens: int | None) -> ModelSpec:
    """The spec that a folder with its own code holds. ConfigError for kinds by module: a folder may not import any."""
    place, given = "config.json: spec", config.get("spec")
    if not isinstance(given, dict):
        raise ConfigError(place, "no spec in it", "a folder of `ulm export`")
    try:
        # Any text, since a kind may be named by itself, in a list or by `kind`; no setting of ours has a colon.
        if foreign := [text for text in _texts(given) if ":" in text]:
            problem = f"{reprlib.repr(foreign[0])} is no kind of ours"
            raise ConfigError(place, problem, "a folder names no modules of its own")
        spec = ModelSpec.parse(given)
    except RecursionError:
        raise ConfigError(place, "parts within parts without end", "a folder of `ulm export`") from None
    if context_tokens is None:
        return spec
    _check_context(context_tokens, spec)
    position = spec.position.model_dump()
    if isinstance(spec.position, longrope.Config):  # the folder's code has these factors for texts of any length
        factors = spec.position.factors_at(spec.context_tokens)
        position |= {"short_factors": factors, "attention_factor": spec.position.length_at(spec.context_tokens)}
    return ModelSpec.parse({**given, "position": position, "context_tokens": context_tokens})


def _texts(given: Any) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict | list):
        for part in [*given, *(given.values() if isinstance(given, dict) else ())]:
            yield from _texts(part)


def _own_weights(source: Path, spec: ModelSpec) -> Weights:
    """Tensors under our names of a folder with its own code."""
    stored, found = _read(source), Weights()
    for name, tensor in stored.items():
        ours = "head.weight" if name == "lm_head.weight" else name.removeprefix("model.")
        if ours in found:
            raise ArtefactError(f"{source}: two tensors for {ours}")
        found[ours] = tensor
    if len(spec.blocks_of_weights) > len(found):  # told before so many layers are made
        raise ArtefactError(f"{source}: {len(found)} tensors for {len(spec.blocks_of_weights):,} layers")
    return _in_float32(found)


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

    return _in_float32(imported(tensors, rules, is_unused))


def _in_float32(weights: Weights) -> Weights:
    """ArtefactError for integers, booleans and floats of eight bits: their scales, if they have any, are elsewhere."""
    if odd := [name for name, weight in weights.items() if weight.dtype not in DTYPES]:
        dtype = str(weights[odd[0]].dtype).removeprefix("torch.")
        problem = f"{odd[0]} is {dtype}; weights are read as float32, float16, bfloat16 or float64"
        raise ArtefactError(f"model.safetensors: {problem}")
    return {name: weight.float() for name, weight in weights.items()}


def _read(source: Path) -> Weights:
    """All tensors of model.safetensors, or of the files that its index names."""
    index = source / "model.safetensors.index.json"
    names: list[Any] = ["model.safetensors"]
    if index.is_file():
        of = read_json(index).get("weight_map")
        names = list(of.values()) if isinstance(of, dict) else []
        if foreign := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ArtefactError(f"{index}: {reprlib.repr(foreign[0])} is no file of this folder")
    found: dict[str, Tensor] = {}
    for name in sorted(set(names)):
        path = source / name
        try:
            if not os.path.isfile(path):  # nor a pipe, which nobody may write to
                remedy = "pickled weights (.bin) are not read, since they may run code; save the model as safetensors"
                raise ArtefactError(f"{path}: no such file; {remedy}")
            stored = load_file(path)
        except (SafetensorError, OSError, UnicodeError) as error:  # UnicodeError: half a surrogate pair in a name
            raise ArtefactError(f"{path}: not readable: {error}") from None
        if twice := found.keys() & stored.keys():
            raise ArtefactError(f"{path}: has {min(twice)}, and so does another file of the folder")
        found |= stored
    return found


def _check_tables(model: Any) -> None:
    """ConfigError where what a model computes for all positions is larger than a machine should find out by trying."""
    num_bytes = sum(buffer.nbytes for buffer in model.buffers())
    if num_bytes > MAX_TABLE_BYTES:
        problem = f"{model.spec.context_tokens:,} tokens, whose positions alone take {num_bytes / 2**30:.0f} GiB"
        raise ConfigError("config.json: context", problem, "--context takes a shorter one")


def _places(model: Any, weights: Mapping[str, Tensor], num_idle: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each tensor of a model, the rows of it that are used, and the weight for them, its last `num_idle` rows left out.

    ArtefactError where weights and model do not fit together.
    """
    held, stored = dict(model.named_parameters()), model.state_dict().keys()
    held |= {name: buffer for name, buffer in model.named_buffers() if name in stored and name in weights}
    if lost := sorted(held.keys() - weights.keys()):
        raise ArtefactError(f"model.safetensors: no tensor {lost[0]}")
    if foreign := sorted(weights.keys() - held.keys()):
        raise ArtefactError(f"model.safetensors: {len(foreign)} tensors that the model has no place for: {foreign[0]}")
    for name, parameter in held.items():
        weight, kept = weights[name], parameter
        if name.startswith("embedding.tables.") or name in ("embedding.weight", "head.weight"):
            kept = parameter[: model.vocab_size]
            weight = weight[: max(0, len(weight) - num_idle)] if weight.dim() else weight
        if kept.shape != weight.shape:
            problem = f"{name} is {list(weight.shape)}, where config.json means {list(kept.shape)}"
            raise ArtefactError(f"model.safetensors: {problem}")
        if not weight.isfinite().all():
            raise ArtefactError(f"model.safetensors: {name} has numbers that are not finite")
        yield parameter, kept, weight


@torch.no_grad()
def _fill(model: Any, weights: Mapping[str, Tensor], num_idle: int) -> None:
    """Weights into a model; what is left of its own rows are zeros."""
    for parameter, kept, weight in _places(model, weights, num_idle):
        parameter.zero_()
        kept.copy_(weight)
