"""A model as a stock Hugging Face folder, which transformers, vLLM and llama.cpp's converter open unchanged."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ulm import artefacts, registry
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange.contract import Architecture
from ulm.exchange.folder import DTYPES, checked, write_config, write_tokenizer
from ulm.exchange.plain import Plain, by_layer, differences, plain
from ulm.exchange.rewrites import Rewrite
from ulm.exchange.weights import Weights, exported
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import Tokenizer


def export_hf(model: Any, tokenizer: Tokenizer, folder: Path | str, *, dtype: str = "float32") -> Path:
    """A folder of a stock architecture at `folder`, whole or not at all; returns it.

    The exported tokenizer gives `tokenizer.encode`'s ids, and puts <|endoftext|> before them where special tokens are
    asked for (transformers' default), as `ulm.generate` does with a text prompt. UnsupportedError with the reasons for
    a spec that no architecture has, ConfigError for a folder that is taken, an unknown dtype or a tokenizer of another
    vocabulary.
    """
    folder = checked(model, tokenizer, folder, dtype)
    architecture, settings, weights = stock(model)
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **architecture.config(settings),
        "initializer_range": 0.02,
        "use_cache": True,
    }
    tensors = exported(weights, architecture.rules(settings))
    with artefacts.new_folder(folder) as partial:
        stored = {name: tensor.to("cpu", DTYPES[dtype]).contiguous().clone() for name, tensor in tensors.items()}
        save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
        write_config(partial, config, tokenizer, dtype)
        write_tokenizer(tokenizer, partial, model.spec.context_tokens)
    return folder


def _distance(reasons: list[str]) -> int:
    """How far an architecture is: another kind is farther than a setting, and what cannot be said farther still."""
    return sum(10 if ".kind is" in reason else 1 if " is " in reason else 100 for reason in reasons)


@cache
def architectures() -> tuple[Architecture, ...]:
    """All of them, those that most tools read first."""
    found = [registry.find("architecture", kind)() for kind in registry.kinds("architecture")]
    return tuple(sorted(found, key=lambda architecture: architecture.preference))


def stock(model: Any) -> tuple[Architecture, Plain, Weights]:
    """The architecture that `fitting` finds, with the model's settings and weights in words that it has."""
    architecture, rewrites = fitting(model.spec)
    settings, weights = plain(model.spec), plain_weights(model)
    for rewrite in rewrites:
        settings, weights = rewrite(settings, weights)
    return architecture, settings, weights


def fitting(spec: ModelSpec) -> tuple[Architecture, tuple[Rewrite, ...]]:
    """The first architecture that has all settings of a spec, and the rewrites by which it has them; no weights needed.

    UnsupportedError with what differs from the nearest one.
    """
    nearest, distance = "", math.inf
    for is_rewritten in (False, True):
        for architecture in architectures():
            settings, rewrites = plain(spec), architecture.rewrites if is_rewritten else ()
            for rewrite in rewrites:
                settings, _ = rewrite(settings, {})
            reasons = refusals(architecture, settings)
            if not reasons:
                return architecture, rewrites
            if _distance(reasons) < distance:
                nearest, distance = f"{architecture.name}: {'; '.join(reasons)}", _distance(reasons)
    raise UnsupportedError(f"no stock architecture for this model; the nearest is {nearest}")


def refusals(architecture: Architecture, settings: Plain) -> list[str]:
    """What an architecture does not have of a model, by what its own config.json would mean; empty where it has all."""
    if 1 in by_layer(settings, "attention.window_tokens"):
        return ["attention.window_tokens is 1, of which transformers' caches keep every token"]
    try:
        config = architecture.config(settings)
        meant = plain(ModelSpec.parse(architecture.fields({**architecture.defaults, **config})))
    except ConfigError as error:
        return [str(error)]
    return differences(settings, meant, architecture.name)


def plain_weights(model: Any) -> Weights:
    """A model's weights for each layer, also where layers share them, tables cut to what is used."""
    spec = model.spec
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name in ("embedding.weight", "head.weight") or name.startswith("embedding.tables."):
            weight = weight[: spec.vocab_size]
        elif name == "position.weight":
            weight = weight[: spec.context_tokens]
        if not name.startswith("blocks."):
            found[name] = weight
            continue
        number, _, rest = name.removeprefix("blocks.").partition(".")
        first = int(number) * spec.layers_per_block
        found |= {f"blocks.{layer}.{rest}": weight for layer in range(first, first + spec.layers_per_block)}
    return {name: weight.to("cpu", torch.float32) for name, weight in found.items()}
