"""What llama.cpp computes of each stock architecture, and how it names and stores the weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, Turning, by_layer, one
from ulm.exchange.weights import Weights

# Ours by theirs, where an architecture has no name of its own for it; parts of one tensor in the order they stand in.
STEMS = {
    "embedding": "token_embd",
    "embedding_norm": "token_embd_norm",
    "position": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention_out_norm": "post_attention_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "feedforward_norm": "ffn_norm",
    "feedforward_out_norm": "post_ffw_norm",
    "feedforward.router": "ffn_gate_inp",
    "feedforward.gate": "ffn_gate",
    "feedforward.up": "ffn_up",
    "feedforward.out": "ffn_down",
}
PARAMETER = re.compile(r"(?:blocks\.(?P<layer>\d+)\.)?(?P<stem>.+)\.(?P<part>weight|bias)")
EXPERT = re.compile(r"\.experts\.(\d+)(?=\.)")
FUSED_QKV = {f"attention.{part}": "attn_qkv" for part in "qkv"}
SAME_FREQUENCY = 1e-9  # a frequency is kept to twelve digits, so that quotients of two are known to eleven


@dataclass(frozen=True)
class Known:
    """An architecture of llama.cpp, where one differs from another."""

    name: str  # general.architecture
    stems: Mapping[str, str] = field(default_factory=dict)  # names that are not those of STEMS
    turns_neighbours: bool = False  # elements 0 and 1 of a head are a pair, 2 and 3; ours, and the others': 0 and E/2
    factor_tensors: tuple[str, ...] = ()  # whose numbers divide the frequencies of all pairs, one each
    has_windows: bool = False
    is_always_tied: bool = False
    is_never_tied: bool = False
    layers_of_27b: int = 0  # the number of layers by which it takes a model for one that divides by another number


KNOWN = {
    "LlamaForCausalLM": Known("llama", turns_neighbours=True, factor_tensors=("rope_freqs",)),
    "MixtralForCausalLM": Known("llama", turns_neighbours=True, factor_tensors=("rope_freqs",)),
    "Qwen3ForCausalLM": Known("qwen3"),
    "Phi3ForCausalLM": Known(
        "phi3",
        stems={**FUSED_QKV, "feedforward.gate": "ffn_up"},
        factor_tensors=("rope_factors_long", "rope_factors_short"),  # by the context that is served; here the same
    ),
    "GPT2LMHeadModel": Known("gpt2", stems=FUSED_QKV),
    "BloomForCausalLM": Known("bloom", stems=FUSED_QKV),
    "Starcoder2ForCausalLM": Known("starcoder2"),
    "Olmo2ForCausalLM": Known(
        "olmo2",
        stems={"attention_norm": "post_attention_norm", "feedforward_norm": "post_ffw_norm"},
        is_never_tied=True,
    ),
    "Gemma2ForCausalLM": Known("gemma2", has_windows=True, is_always_tied=True, layers_of_27b=46),
    "Gemma3ForCausalLM": Known("gemma3", has_windows=True, layers_of_27b=62),
}


@dataclass(frozen=True)
class Rotation:
    """How llama.cpp turns queries and keys: by theta, divided by one `factor` or by `factors` of all pairs."""

    theta: float
    num_dims: int
    factor: float
    factors: Tensor | None
    length: float  # of queries and keys, multiplied


def rotations(known: Known, settings: Plain, config: Config) -> dict[str, Rotation]:
    """The rotation of layers that see all, as "", and of those with a window where theirs is another, as "_swa"."""
    turnings, windows = (by_layer(settings, key) for key in ("position.turning", "attention.window_tokens"))
    of = {bool(window): turning for window, turning in zip(windows, turnings, strict=True)}
    local = config.get("rope_local_base_freq")
    found = {}
    if whole := of.get(False, turnings[0]):
        found[""] = _rotation(whole, config["rope_theta"])
    if local is not None and any(windows):
        found["_swa"] = _rotation(of[True], local)
    return found


def _rotation(turning: Turning, theta: float) -> Rotation:
    num_dims = 2 * len(turning.frequencies)
    pairs = torch.arange(0, num_dims, 2, dtype=torch.float64)
    factors = theta ** (-pairs / num_dims) / torch.tensor(turning.frequencies, dtype=torch.float64)
    is_one = bool((factors / factors[0] - 1).abs().max() < SAME_FREQUENCY)
    factor = float(f"{factors[0].item():.9g}") if is_one else 1.0
    return Rotation(theta, num_dims, factor, None if is_one else factors.float(), turning.length)


def refusals(known: Known, settings: Plain, found: Mapping[str, Rotation]) -> list[str]:
    """What llama.cpp computes otherwise; empty where it computes the model."""
    of, reasons = f"llama.cpp's {known.name}", []
    if any(by_layer(settings, "attention.window_tokens")) and not known.has_windows:
        reasons.append(f"attention.window_tokens is set, and {of} has no window")
    kind = one(settings, "feedforward.kind")
    if kind in ("relu", "relu2") or (kind == "gelu" and not one(settings, "feedforward.approximate")):
        said = "gelu without approximate" if kind == "gelu" else kind
        reasons.append(f"feedforward.kind is {said}, and {of} has GELU in its tanh form")
    if known.is_always_tied and not settings["embedding.tied"]:
        reasons.append(f"embedding.tied is False, and {of} reads no head")
    if not known.factor_tensors and any(rotation.factors is not None for rotation in found.values()):
        reasons.append(f"position scales some frequencies more than others, and {of} scales all alike")
    if "_swa" in found and found["_swa"].factor != 1:
        reasons.append(f"position is scaled in layers with a window, and {of} scales it in the others alone")
    return reasons


def scaled(known: Known, settings: Plain, weights: Weights) -> Weights:
    """The weights with the scale of scores in those of the queries, where llama.cpp has one of its own for them."""
    if not known.layers_of_27b:
        return weights
    is_27b = settings["num_layers"] == known.layers_of_27b
    head_dim, num_heads = one(settings, "attention.head_dim"), one(settings, "attention.num_heads")
    theirs = (settings["d_model"] // num_heads if is_27b else head_dim) ** -0.5
    more = one(settings, "attention.scale") / theirs
    if math.isclose(more, 1):
        return weights
    queries = "attention.q_norm.weight" if one(settings, "attention.qk_norm") else "attention.q.weight"
    return {name: weight * more if name.endswith(queries) else weight for name, weight in weights.items()}


def stored(known: Known, settings: Plain, weights: Weights) -> Weights:
    """The tensors of llama.cpp: queries, keys and values in one, or all experts, where it has them so."""
    order = list(STEMS)
    parts: dict[str, dict[tuple[int, int], Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        expert = EXPERT.search(name)
        matched = PARAMETER.fullmatch(EXPERT.sub("", name))
        assert matched is not None
        layer, stem, part = matched["layer"], matched["stem"], matched["part"]
        theirs = {**STEMS, **known.stems}[stem] + ("_exps" if expert else "")
        if known.turns_neighbours and stem in ("attention.q", "attention.k"):
            weight = _with_neighbours(weight, one(settings, "attention.head_dim"))
        number = int(expert[1]) if expert else -1
        parts[f"{f'blk.{layer}.' if layer else ''}{theirs}.{part}"][number, order.index(stem)] = weight
    found = {name: _joined(several) for name, several in parts.items()}
    if known.is_never_tied and settings["embedding.tied"]:
        found["output.weight"] = found["token_embd.weight"]
    return found


def _joined(several: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """One below the other, or, of experts, each in its place of a dimension more."""
    in_order = [several[key] for key in sorted(several)]
    return torch.stack(in_order) if min(several)[0] >= 0 else torch.cat(in_order)


def _with_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys in another order, so that the two elements of a pair stand beside each other."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
