"""A spec in plain words: what is computed for one text, layer by layer, however the spec put it.

Two specs that say the same by other means (a pattern, shared weights, a window longer than the context, angles by
another name) are equal here. An export compares what it was given with what the exported folder means, in these words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ulm.components.position import longrope, rope
from ulm.registry import KindConfig
from ulm.spec import LAYER_SLOTS, LayerSpec, ModelSpec

MASKS_OF_ONE_TEXT = {"causal", "document", "padding"}  # the same, where a row is one text
TRAINING_ONLY = {"feedforward.balance"}
GATED, UNGATED = ("swiglu", "geglu", "moe"), ("gelu", "relu", "relu2")  # by the width they take where none is given

Plain = dict[str, Any]


@dataclass(frozen=True)
class Turning:
    """How queries and keys are turned: radians per position of each pair, what they are multiplied by."""

    frequencies: tuple[float, ...]  # to twelve digits: one rounding more or less is no difference
    length: float
    num_kept: int  # first positions that are turned by the unscaled frequencies
    config: KindConfig = field(compare=False)  # what said so

    def __str__(self) -> str:
        """The settings, without those left as they are by default."""
        fields = type(self.config).model_fields
        return str({name: value for name, value in self.config if name == "kind" or value != fields[name].default})


def turning(config: Any, spec: ModelSpec) -> Turning:
    """What a rotary kind does in a model of this spec."""
    if config.kind == "rope":
        frequencies, length, num_kept = rope.scaled(config, spec.head_dim), rope.attention_factor(config.scaling), 0
    else:
        assert isinstance(config, longrope.Config)
        usual = config.frequencies(spec.head_dim)
        factors = config.factors_at(spec.context_tokens) or (1.0,) * len(usual)
        frequencies = [frequency / factor for frequency, factor in zip(usual, factors, strict=True)]
        length, num_kept = config.length_at(spec.context_tokens), config.keep_first_tokens
        num_kept = 0 if set(factors) == {1.0} else num_kept
    return Turning(tuple(float(f"{x:.12g}") for x in frequencies), float(f"{length:.12g}"), num_kept, config)


def plain(spec: ModelSpec) -> Plain:
    """{setting: value}; of a setting that differs by layer the values of all layers, as a tuple."""
    layers = [_layer(spec, layer) for layer in spec.blocks_of_weights for _ in range(spec.layers_per_block)]
    found: Plain = {name: getattr(spec, name) for name in ("model", "vocab_size", "context_tokens")}
    found |= {"d_model": spec.d_model, "num_layers": spec.num_layers}
    found["mask"] = ", ".join(sorted({config.kind for config in spec.mask} - MASKS_OF_ONE_TEXT)) or None
    found |= _settings("embedding", spec.embedding) | _settings("head", spec.head)
    if is_added(spec):
        found |= {**_settings("added_position", spec.position), "added_position.max_tokens": spec.context_tokens}
    if spec.norm_placement != "after":
        found |= _settings("final_norm", spec.norm)
    if spec.embedding_norm:
        found |= _settings("embedding_norm", spec.norm)
    for key in dict.fromkeys(key for layer in layers for key in layer):
        values = tuple(layer.get(key) for layer in layers)
        found[key] = values[0] if len(set(values)) == 1 else values
    return found


def is_added(spec: ModelSpec) -> bool:
    """Whether its positions are vectors that are added to those of tokens."""
    return spec.position.kind in ("learned", "sinusoidal")


def _layer(spec: ModelSpec, layer: LayerSpec) -> Plain:
    found: Plain = {"norm_placement": layer.norm_placement}
    for slot in LAYER_SLOTS:
        found |= _settings(slot, getattr(layer, slot))
    if layer.position.kind in ("rope", "longrope") or (layer.position == spec.position and is_added(spec)):
        turns = turning(layer.position, spec) if not is_added(spec) or layer.position != spec.position else None
        found = {key: value for key, value in found.items() if not key.startswith("position.")}
        found |= {"position.kind": "rotary", "position.turning": turns} if turns else {"position.kind": "none"}
    if not found.get("attention.qk_norm"):
        found.pop("attention.qk_norm_eps", None)
    if layer.attention.kind in ("gqa", "sliding"):
        found["attention.head_dim"] = spec.head_dim
        scale, window = found["attention.scale"], found.get("attention.window_tokens")
        found["attention.scale"] = spec.head_dim**-0.5 if scale is None else scale
        sees_all = window is None or window >= spec.context_tokens
        found["attention.kind"] = "gqa"
        found["attention.window_tokens"] = None if sees_all else window
        found["attention.num_sink_tokens"] = 0 if sees_all else found["attention.num_sink_tokens"]
    if layer.feedforward.kind in (*GATED, *UNGATED) and found["feedforward.d_hidden"] is None:
        gated = -(-8 * spec.d_model // (3 * 32)) * 32
        found["feedforward.d_hidden"] = gated if layer.feedforward.kind in GATED else 4 * spec.d_model
    return found


def _settings(slot: str, config: KindConfig) -> Plain:
    return {f"{slot}.{name}": value for name, value in config if f"{slot}.{name}" not in TRAINING_ONLY}


def one(settings: Plain, key: str, default: Any = None) -> Any:
    """The value of a setting, of the first layer that has it where layers differ."""
    value = settings.get(key, default)
    return next((of for of in value if of is not None), default) if isinstance(value, tuple) else value


def by_layer(settings: Plain, key: str) -> tuple[Any, ...]:
    """The values of a setting in all layers."""
    value = settings.get(key)
    return value if isinstance(value, tuple) else (value,) * int(settings["num_layers"])


def differences(has: Plain, wants: Plain, owner: str) -> list[str]:
    """What `has` and `wants` say of each setting that is not the same in both."""
    of_kind = tuple(
        key.removesuffix("kind") for key in {**has, **wants} if key.endswith(".kind") and has.get(key) != wants.get(key)
    )
    found = []
    for key in {**has, **wants}:
        is_said_by_kind = key.startswith(of_kind) and not key.endswith(".kind") if of_kind else False
        if has.get(key) != wants.get(key) and not is_said_by_kind:
            found.append(f"{key} is {_said(has.get(key))}, a {owner}'s is {_said(wants.get(key))}")
    return found


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return "by layer " + ", ".join(map(str, value[:6])) + (", …" if len(value) > 6 else "")
    return "none" if value is None else str(value)
