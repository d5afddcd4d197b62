"""A ulm decoder in transformers, from the spec in its configuration: embedding, layers, norm, head.

Shape letters, as suffixes of tensor names: B batch, T new tokens, S known tokens, D model width, H heads, K key/value
heads, E head width, F pairs of dimensions or features, J K x E, M tokens of all rows, N experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, embedding, gelu, relu, rms_norm, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ulm import UlmConfig


# ---- positions


@dataclass
class Places:
    """Where T new and S known tokens stand in their rows, B of them or one for all; -1 is padding among the known."""

    q_BT: Tensor
    k_BS: Tensor


class NoPosition(nn.Module):
    """Everything as it is; the other kinds change what they are there for."""

    has_bias = False

    def __init__(self, position: dict[str, Any], config: UlmConfig) -> None:
        super().__init__()
        self.position, self.config = position, config
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """What is looked up by position; made from the configuration, not stored."""
        return {}

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions."""
        return x_BTD

    def rotate(self, x_BHTE: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys, turned by their positions."""
        return x_BHTE

    def bias(self, distance_BTS: Tensor) -> Tensor:
        """What is added to the scores of a key that stands so many tokens before the query, as bias_BHTS."""
        raise NotImplementedError


class LearnedPosition(NoPosition):
    """x + weight[position] (arXiv 1706.03762, section 3.5)."""

    def __init__(self, position: dict[str, Any], config: UlmConfig) -> None:
        super().__init__(position, config)
        rows = position["max_tokens"] or config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions."""
        return x_BTD + embedding(positions_BT, self.weight)


class SinusoidalPosition(NoPosition):
    """x + (sin(m w_i), cos(m w_i)) side by side, w_i = theta^(-2i/D) (arXiv 1706.03762, section 3.5)."""

    table_SD: Tensor

    def tables(self) -> dict[str, Tensor]:
        """The waves at all positions."""
        width = self.config.hidden_size
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = _places(self.config) * self.position["theta"] ** -exponents
        return {"table_SD": torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()}

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions."""
        return x_BTD + self.table_SD[positions_BT].to(x_BTD.dtype)


class RotaryPosition(NoPosition):
    """x_i, x_{i+E/2} turned by position * frequency_i (arXiv 2104.09864, equation 34), halves paired as in Llama."""

    cos_SE: Tensor
    sin_SE: Tensor

    def tables(self) -> dict[str, Tensor]:
        """cos and sin of all angles; float64 angles, for float32 ones are wrong in the last bits from some 1,000 on."""
        angles_SF, factor = self.angles()
        cos_SF, sin_SF = angles_SF.cos() * factor, angles_SF.sin() * factor
        return {
            "cos_SE": torch.cat([cos_SF, cos_SF], dim=-1).float(),
            "sin_SE": torch.cat([-sin_SF, sin_SF], dim=-1).float(),
        }

    def angles(self) -> tuple[Tensor, float]:
        """Angles of all positions, and the factor of queries and keys that sharpens scores."""
        frequencies, factor = scaled(self.position, self.config.head_dim)
        return _places(self.config) * torch.tensor(frequencies, dtype=torch.float64), factor

    def rotate(self, x_BHTE: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys, turned by their positions; dimensions beyond the table's stay as they are."""
        width = self.cos_SE.shape[1]
        cos, sin = (table[positions_BT][:, None].to(x_BHTE.dtype) for table in (self.cos_SE, self.sin_SE))
        turned = x_BHTE[..., :width]
        first, second = turned.chunk(2, dim=-1)
        turned = torch.addcmul(turned * cos, torch.cat([second, first], dim=-1), sin)
        return torch.cat([turned, x_BHTE[..., width:]], dim=-1)


class LongRotaryPosition(RotaryPosition):
    """As rotary, each pair slowed by a factor of its own, beyond the first few positions (arXiv 2402.13753)."""

    def angles(self) -> tuple[Tensor, float]:
        """Angles of all positions, and sqrt(1 + ln(longer) / ln(original)) (arXiv 2404.14219, section 2)."""
        position, context = self.position, self.config.max_position_embeddings
        usual_F = torch.tensor(unscaled(position, self.config.head_dim), dtype=torch.float64)
        original = position["original_context_tokens"] or context
        factors = position["long_factors" if context > original else "short_factors"]
        factors_F = torch.ones_like(usual_F) if factors is None else torch.tensor(factors, dtype=torch.float64)
        places_S1 = _places(self.config)
        angles_SF = torch.where(
            places_S1 < position["keep_first_tokens"], places_S1 * usual_F, places_S1 * usual_F / factors_F
        )
        longer = max(1.0, context / original)
        return angles_SF, position["attention_factor"] or math.sqrt(1 + math.log(longer) / math.log(original))


class LinearBiasPosition(NoPosition):
    """score - slope_h * distance (arXiv 2108.12409, section 3)."""

    has_bias = True
    slopes_H: Tensor

    def tables(self) -> dict[str, Tensor]:
        """2^(-8/n), 2^(-16/n), … for n heads; between powers of two, every other one of twice as many."""
        num = self.config.num_attention_heads
        whole = 2 ** math.floor(math.log2(num))
        series = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
        between = [2.0 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (num - whole), 2)]
        return {"slopes_H": torch.tensor(series + between, dtype=torch.float32)}

    def bias(self, distance_BTS: Tensor) -> Tensor:
        """What is added to the scores, as bias_BHTS."""
        return -self.slopes_H[:, None, None] * distance_BTS[:, None]


class RelativePosition(NoPosition):
    """score + weight[bucket(distance), head], far distances in groups (arXiv 1910.10683, section 2.1)."""

    has_bias = True
    bucket_S: Tensor

    def __init__(self, position: dict[str, Any], config: UlmConfig) -> None:
        super().__init__(position, config)
        self.weight = nn.Parameter(torch.empty(position["num_buckets"], config.num_attention_heads))

    def tables(self) -> dict[str, Tensor]:
        """The bucket of each distance: itself at first, then by its logarithm, the last from max_distance on."""
        num = self.position["num_buckets"] // (2 if self.position["bidirectional"] else 1)  # the others look ahead
        exact, most = num // 2, self.position["max_distance"]

        def bucket(distance: int) -> int:
            if distance < exact:
                return distance
            return min(num - 1, exact + int(math.log(distance / exact) / math.log(most / exact) * (num - exact)))

        return {"bucket_S": torch.tensor([bucket(distance) for distance in range(most + 1)])}

    def bias(self, distance_BTS: Tensor) -> Tensor:
        """What is added to the scores, as bias_BHTS."""
        buckets_BTS = self.bucket_S[distance_BTS.clamp(0, len(self.bucket_S) - 1)]
        return self.weight[buckets_BTS].permute(0, 3, 1, 2)


POSITIONS = {
    "none": NoPosition,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rope": RotaryPosition,
    "longrope": LongRotaryPosition,
    "alibi": LinearBiasPosition,
    "t5": RelativePosition,
}


def _places(config: UlmConfig) -> Tensor:
    return torch.arange(config.max_position_embeddings + 1, dtype=torch.float64)[:, None]


def unscaled(position: dict[str, Any], head_dim: int) -> list[float]:
    """Radians per position of each pair of dimensions, theta^(-2i/E) (arXiv 2104.09864, equation 15)."""
    width = 2 * ((position["rotary_dim"] or head_dim) // 2)
    return [position["theta"] ** (-2 * i / width) for i in range(width // 2)]


def scaled(position: dict[str, Any], head_dim: int) -> tuple[list[float], float]:
    """The same for a longer context than the one that was trained on, and the factor of queries and keys."""
    usual, scaling = unscaled(position, head_dim), position["scaling"]
    if scaling is None:
        return usual, 1.0
    factor, width = scaling["factor"], 2 * len(usual)
    match scaling["kind"]:
        case "linear":  # arXiv 2306.15595, equation 4
            return [frequency / factor for frequency in usual], 1.0
        case "ntk":  # arXiv 2309.00071, section 3.1
            return unscaled(
                {**position, "theta": position["theta"] * factor ** (width / max(width - 2, 1))}, width
            ), 1.0
        case "yarn":  # arXiv 2309.00071, sections 3.2 and 3.3
            sharper = scaling["attention_factor"] or 0.1 * math.log(factor) + 1
            return [_by_turns(frequency, scaling) for frequency in usual], sharper
        case kind:
            raise ValueError(f"this folder's code knows no scaling {kind!r} of rotary positions")


def _by_turns(frequency: float, scaling: dict[str, Any]) -> float:
    """Slowed by the factor where the pair turns seldom within the original context, as it is where it turns often."""
    turns = scaling["original_context_tokens"] * frequency / (2 * math.pi)
    share = (turns - scaling["slow_turns"]) / (scaling["fast_turns"] - scaling["slow_turns"])
    share = min(1.0, max(0.0, share))
    return (1 - share) * frequency / scaling["factor"] + share * frequency


# ---- norms


class UlmRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467, equation 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Scaled over the last dimension."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_of(norm: dict[str, Any], config: UlmConfig) -> nn.Module:
    """A norm over D."""
    if norm["kind"] == "rmsnorm":
        return UlmRMSNorm(config.hidden_size, norm["eps"])
    return nn.LayerNorm(config.hidden_size, eps=norm["eps"], bias=norm["bias"])


# ---- attention


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling) v by its equation, as out_BTHE, and the shares: the one form that knows caps and sinks.

    `softcap` c makes scores c tanh(score / c) (arXiv 2408.00118, section 2.3); `s_aux` is a score of each head that
    belongs to no value (arXiv 2508.10925, section 2.1.2).
    """
    groups = query.shape[1] // key.shape[1]
    k_BHSE, v_BHSE = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores_BHTS = (query @ k_BHSE.transpose(2, 3) * scaling).float()
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    if s_aux is not None:
        sinks = s_aux.float()[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat([scores_BHTS, sinks], dim=-1)
    shares_BHTS = scores_BHTS.softmax(-1)[..., : k_BHSE.shape[2]].to(value.dtype)
    return (shares_BHTS @ v_BHSE).transpose(1, 2).contiguous(), shares_BHTS


class UlmAttention(nn.Module):
    """softmax(q k^T scale) v of H heads, in K groups that share keys and values (arXiv 2305.13245)."""

    is_causal = True

    def __init__(self, config: UlmConfig, spec: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.spec = config, layer_idx, spec
        self.num_heads, self.num_kv_heads, self.head_dim = spec["num_heads"], spec["num_kv_heads"], config.head_dim
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = spec.get("scale") or self.head_dim**-0.5
        self.soft_cap = spec.get("soft_cap")
        width, has_bias = config.hidden_size, spec["bias"]
        self.q = nn.Linear(width, self.num_heads * self.head_dim, bias=has_bias)
        self.k = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=has_bias)
        self.v = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=has_bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, width, bias=has_bias)
        if spec["qk_norm"]:  # of each head by itself, or whole: of all of them at once
            num_q, num_k = (self.num_heads, self.num_kv_heads) if spec["qk_norm"] == "whole" else (1, 1)
            self.q_norm = UlmRMSNorm(num_q * self.head_dim, spec["qk_norm_eps"])
            self.k_norm = UlmRMSNorm(num_k * self.head_dim, spec["qk_norm_eps"])
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if spec.get("sinks") else None

    def project(self, x_BTD: Tensor, values_BTJ: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q_BHTE, k_BKTE, v_BKTE; queries and keys normed, `values_BTJ` added to the values."""
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.spec["qk_norm"] == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        if self.spec["qk_norm"] is True:
            q, k = self.q_norm(q), self.k_norm(k)
        v = (v if values_BTJ is None else v + values_BTJ).unflatten(-1, (-1, self.head_dim))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        x_BTD: Tensor,
        layer: int,
        position: NoPosition,
        places: Places,
        mask: Tensor | None,
        values_BTJ: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What T tokens find among S known ones, as out_BTD; the cache takes in the new keys and values."""
        q_BHTE, k_BKTE, v_BKTE = self.project(x_BTD, values_BTJ)
        q_BHTE, k_BKTE = (position.rotate(x, places.q_BT) for x in (q_BHTE, k_BKTE))
        if past_key_values is not None:
            k_BKTE, v_BKTE = past_key_values.update(k_BKTE, v_BKTE, layer)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        out_BTHE, _ = attend(
            self,
            q_BHTE,
            k_BKTE,
            v_BKTE,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            softcap=self.soft_cap,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.out(out_BTHE.reshape(*x_BTD.shape[:2], -1))


class UlmKernelAttention(UlmAttention):
    """phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k), with phi of linear attention or of Performer.

    Both allow to keep one sum for all that came before (arXiv 2006.16236); here keys and values are kept and all pairs
    are scored, for that is what transformers' caches and masks are made for. In float32 at least.
    """

    w_FE: Tensor

    def __init__(self, config: UlmConfig, spec: dict[str, Any], layer_idx: int) -> None:
        super().__init__(config, spec, layer_idx)
        self.is_linear = spec["kind"] == "linear"
        if not self.is_linear:
            self.register_buffer("w_FE", torch.zeros(spec["num_features"], self.head_dim))

    def features(self, x_BHTE: Tensor, *, is_query: bool) -> Tensor:
        """elu(x) + 1 (arXiv 2006.16236, equation 7), or exp(w x' - |x'|^2 / 2), x' = x / E^(1/4) (2009.14794)."""
        if self.is_linear:
            return elu(x_BHTE) + 1
        x_BHTE = x_BHTE * x_BHTE.shape[-1] ** -0.25
        powers_BHTF = x_BHTE @ self.w_FE.to(x_BHTE.dtype).T - x_BHTE.square().sum(-1, keepdim=True) / 2
        # A query's largest is made 1, which its norm takes out again; keys have no scale that would not look ahead.
        return (powers_BHTF - powers_BHTF.amax(-1, keepdim=True) if is_query else powers_BHTF).exp()

    def forward(
        self,
        x_BTD: Tensor,
        layer: int,
        position: NoPosition,
        places: Places,
        mask: Tensor | None,
        values_BTJ: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What T tokens find among S known ones, as out_BTD; the cache takes in keys that are not turned yet."""
        q, k, v = self.project(x_BTD, values_BTJ)
        known_BS = places.k_BS.clamp_min(0)
        if not self.is_linear:
            q, k = (position.rotate(x, places.q_BT) for x in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, layer)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        q_BHTF, k_BHSF = self.features(q.to(dtype), is_query=True), self.features(k.to(dtype), is_query=False)
        is_seen_B1TS = _is_seen(places)[:, None]
        norms_BHT1 = (q_BHTF @ k_BHSF.transpose(2, 3) * is_seen_B1TS).sum(-1, keepdim=True)
        if self.is_linear:  # turned in the numerator alone (arXiv 2104.09864, equation 19)
            q_BHTF, k_BHSF = position.rotate(q_BHTF, places.q_BT), position.rotate(k_BHSF, known_BS)
        out_BHTE = (q_BHTF @ k_BHSF.transpose(2, 3) * is_seen_B1TS) @ v.to(dtype)
        is_sum_BHT1 = norms_BHT1 > torch.finfo(dtype).tiny ** 0.5  # padding sees nothing, and has a sum of 0
        out_BHTE = out_BHTE / torch.where(is_sum_BHT1, norms_BHT1, 1)
        return self.out(out_BHTE.transpose(1, 2).flatten(2).to(x_BTD.dtype))


ATTENTIONS = {
    "gqa": UlmAttention,
    "sliding": UlmAttention,
    "linear": UlmKernelAttention,
    "performer": UlmKernelAttention,
}


def _is_seen(places: Places, window_tokens: int | None = None, num_sink_tokens: int = 0) -> Tensor:
    """Whether each query may look at each key, as booleans BTS: at tokens, not later, near enough or a row's first."""
    q_BT1, k_B1S = places.q_BT[:, :, None], places.k_BS[:, None, :]
    is_seen_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
    if window_tokens is not None:
        is_seen_BTS = is_seen_BTS & ((q_BT1 - k_B1S < window_tokens) | (k_B1S < num_sink_tokens))
    return is_seen_BTS


# ---- feed-forward

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": silu,
    "geglu": gelu,
    "gelu": gelu,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}


class UlmFeedForward(nn.Module):
    """(act(x W_gate) * x W_up) W_out where it is gated (arXiv 2002.05202), else act(x W_up) W_out."""

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        width, self.kind = config.hidden_size, spec["kind"]
        self.is_gated = self.kind.endswith("glu")
        usual = -(-8 * width // (3 * 32)) * 32 if self.is_gated else 4 * width
        d_hidden, has_bias = spec["d_hidden"] or usual, spec.get("bias", False)
        if self.is_gated:
            self.gate = nn.Linear(width, d_hidden, bias=has_bias)
        self.up = nn.Linear(width, d_hidden, bias=has_bias)
        self.out = nn.Linear(d_hidden, width, bias=has_bias)
        self.by_tanh = spec.get("approximate", False)

    def act(self, x: Tensor) -> Tensor:
        """The activation of hidden units."""
        return gelu(x, approximate="tanh") if self.by_tanh else ACTIVATIONS[self.kind](x)

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        return self.out(self.act(self.gate(x)) * self.up(x) if self.is_gated else self.act(self.up(x)))


class UlmMixtureOfExperts(nn.Module):
    """sum_e softmax(top-k of x W_router)_e SwiGLU_e(x) (arXiv 2401.04088, section 2.1).

    A single expert is weighed by its probability among all (arXiv 2101.03961, equation 2).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        self.experts_per_token = spec["experts_per_token"]
        self.router = nn.Linear(config.hidden_size, spec["num_experts"], bias=False)
        expert = {"kind": "swiglu", "d_hidden": spec["d_hidden"]}
        self.experts = nn.ModuleList(UlmFeedForward(config, expert) for _ in range(spec["num_experts"]))

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        x_MD = x.flatten(0, -2)
        logits_MN = self.router(x_MD).float()
        best, chosen = logits_MN.topk(self.experts_per_token)
        weights = best.softmax(-1) if self.experts_per_token > 1 else logits_MN.softmax(-1).gather(1, chosen)
        weights_MN = torch.zeros_like(logits_MN).scatter(1, chosen, weights).to(x.dtype)
        out_MD = torch.zeros_like(x_MD)
        for number, expert in enumerate(self.experts):
            tokens = weights_MN[:, number].nonzero()[:, 0]
            out_MD = out_MD.index_add(0, tokens, expert(x_MD[tokens]) * weights_MN[tokens, number, None])
        return out_MD.view_as(x)


# ---- layers


class UlmBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention, then feed-forward, each added to x, with norms where the spec places them.

    before: x + f(norm(x)); after: norm(x + f(x)); around: x + norm(f(norm(x))); output: x + norm(f(x)).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        self.norm_placement = spec["norm_placement"]
        self.attention_norm = norm_of(spec["norm"], config)
        self.attention = ATTENTIONS[spec["attention"]["kind"]](config, spec["attention"], layer_idx)
        self.feedforward_norm = norm_of(spec["norm"], config)
        feedforward = UlmMixtureOfExperts if spec["feedforward"]["kind"] == "moe" else UlmFeedForward
        self.feedforward = feedforward(config, spec["feedforward"])
        if self.norm_placement == "around":
            self.attention_out_norm = norm_of(spec["norm"], config)
            self.feedforward_out_norm = norm_of(spec["norm"], config)

    def forward(self, x_BTD: Tensor, **attend: Any) -> Tensor:
        """One layer, as x_BTD."""
        match self.norm_placement:
            case "before":
                x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), **attend)
                return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))
            case "after":
                x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, **attend))
                return self.feedforward_norm(x_BTD + self.feedforward(x_BTD))
            case "output":
                x_BTD = x_BTD + self.attention_norm(self.attention(x_BTD, **attend))
                return x_BTD + self.feedforward_norm(self.feedforward(x_BTD))
            case _:
                x_BTD = x_BTD + self.attention_out_norm(self.attention(self.attention_norm(x_BTD), **attend))
                return x_BTD + self.feedforward_out_norm(self.feedforward(self.feedforward_norm(x_BTD)))


class UlmEmbedding(nn.Embedding):
    """x = weight[token]; for some layers scale * tables[i][token] too, which attention adds to its values.

    The first layers have a table each, and the last ones have the same in reverse (arXiv 2410.17897, section 3).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if spec["scaled"] else None
        num_tables, num_layers = spec.get("num_tables", 0), config.num_hidden_layers
        near = {layer: min(layer, num_layers - 1 - layer) for layer in range(num_layers)}
        self.table_of = {layer: table for layer, table in near.items() if table < num_tables}
        self.place_of = {layer: place for place, layer in enumerate(self.table_of)}
        if num_tables:
            width = config.num_key_value_heads * config.head_dim
            self.tables = nn.ParameterList([torch.empty(config.vocab_size, width) for _ in range(num_tables)])
            self.scales = nn.Parameter(torch.full((len(self.table_of),), 0.5))

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of tokens, as x_BTD."""
        x_BTD = super().forward(input)
        return x_BTD if self.scale is None else x_BTD * self.scale

    def values(self, tokens_BT: Tensor, layer: int) -> Tensor | None:
        """What is added to a layer's values, as x_BTJ; None for the layers between."""
        if layer not in self.table_of:
            return None
        return embedding(tokens_BT, self.tables[self.table_of[layer]]) * self.scales[self.place_of[layer]]


# ---- models


class UlmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both models are to transformers."""

    config_class = UlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UlmBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UlmBlock}  # noqa: RUF012
    _input_embed_layer = "embedding"

    @property
    def _supports_sdpa(self) -> bool:
        """PyTorch's kernel has no place for caps and sinks."""
        kinds = [block["attention"] for block in self.config.blocks]
        return not any(kind.get("soft_cap") or kind.get("sinks") for kind in kinds)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoPosition):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and not isinstance(module, nn.Linear | nn.Embedding):
                init.normal_(parameter, mean=0.0, std=0.02)


class UlmModel(UlmPreTrainedModel):
    """The decoder up to its last norm."""

    def __init__(self, config: UlmConfig) -> None:
        super().__init__(config)
        spec, blocks = config.spec, config.blocks
        if config._attn_implementation == "vllm" and (reasons := _no_backend(config)):
            problem = f"vLLM's transformers backend would compute something else: {', '.join(reasons)}"
            raise ValueError(f"{problem}; install ulm beside vLLM, whose plugin brings a model of its own")
        self.embedding = UlmEmbedding(config, spec["embedding"])
        self.embedding_norm = norm_of(spec["norm"], config) if spec["embedding_norm"] else nn.Identity()
        self.position = POSITIONS[spec["position"]["kind"]](spec["position"], config)
        # Positions that single layers have in place of the model's; none of them has weights.
        own = [block["position"] for block in blocks if block["position"] != spec["position"]]
        own = [position for number, position in enumerate(own) if position not in own[:number]]
        self.own_positions = nn.ModuleList(POSITIONS[position["kind"]](position, config) for position in own)
        self.position_of = [own.index(block["position"]) if block["position"] in own else None for block in blocks]
        self.blocks = nn.ModuleList(UlmBlock(config, block, number) for number, block in enumerate(blocks))
        self.norm = nn.Identity() if spec["norm_placement"] == "after" else norm_of(spec["norm"], config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last layer's normed state; `attention_mask` is 2D, of the known tokens too, padding on any side."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if input_ids is None and self.embedding.table_of:
            raise ValueError("this model adds embeddings of tokens to its values: it needs input_ids")
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_known = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = _placed(x_BTD, num_known, attention_mask, position_ids, self.config.max_position_embeddings)
        x_BTD = self.embedding_norm(self.position.embed(x_BTD, places.q_BT))
        masks: dict[Any, tuple[Places, Tensor | None]] = {}  # layers of one kind have the same
        for layer in range(self.config.num_hidden_layers):
            number = layer // self.config.layers_per_block
            block, of_block = self.blocks[number], self.position_of[number]
            position = self.position if of_block is None else self.own_positions[of_block]
            window = block.attention.spec.get("window_tokens"), block.attention.spec.get("num_sink_tokens", 0)
            if (window, position) not in masks:
                seen = _held(places, past_key_values, layer)
                masks[window, position] = seen, self._mask(x_BTD, seen, window, position)
            seen, mask = masks[window, position]
            x_BTD = block(
                x_BTD,
                layer=layer,
                position=position,
                places=seen,
                mask=mask,
                values_BTJ=None if input_ids is None else self.embedding.values(input_ids, layer),
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def _mask(
        self, x_BTD: Tensor, places: Places, window: tuple[int | None, int], position: NoPosition
    ) -> Tensor | None:
        """What is added to scores: the bias of distances, and the lowest number where a query must not look.

        None where plain causality is all and the kernel knows it: of new rows without padding.
        """
        implementation, num_tokens = self.config._attn_implementation, x_BTD.shape[1]
        if implementation == "vllm":  # it knows the rows of its tokens, which here stand in one
            return None
        is_plain = len(places.k_BS) == 1 and places.k_BS.shape[1] == num_tokens and not position.has_bias
        if is_plain and implementation == "sdpa" and (window[0] is None or num_tokens <= window[0]):
            return None
        is_seen_B1TS = _is_seen(places, *window)[:, None]
        bias = x_BTD.new_zeros(())
        if position.has_bias:
            bias = position.bias(places.q_BT[:, :, None] - places.k_BS[:, None, :]).to(x_BTD.dtype)
        # Not -inf: padding that may look nowhere would become NaN, and a share of 0 keeps no NaN out.
        return torch.where(is_seen_B1TS, bias, torch.finfo(x_BTD.dtype).min)


def _placed(
    x_BTD: Tensor, num_known: int, attention_mask: Tensor | None, position_ids: Tensor | None, context_tokens: int
) -> Places:
    """Where new and known tokens stand, by how many of their row come before them."""
    num_tokens, device = x_BTD.shape[1], x_BTD.device
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("attention_mask must be 2D, one number a token: the model makes the mask of pairs itself")
    if attention_mask is None or bool(attention_mask.all()):
        k_BS = torch.arange(num_known + num_tokens, device=device)[None]
    else:
        k_BS = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, -1).to(device)
    q_BT = k_BS[:, num_known : num_known + num_tokens].clamp_min(0) if position_ids is None else position_ids
    # More tokens than that may be right where some are padding, so only then are the positions looked at.
    if num_known + num_tokens > context_tokens and int(q_BT.max()) >= context_tokens:
        raise ValueError(f"the text is longer than the model's {context_tokens} tokens of context")
    return Places(q_BT, k_BS)


def _held(places: Places, past_key_values: Cache | None, layer: int) -> Places:
    """The same with the known tokens that a layer's cache holds: a sliding one drops the first, a static one has more.

    What is not there yet is padding.
    """
    if past_key_values is None:
        return places
    num_held, first = past_key_values.get_mask_sizes(places.q_BT.shape[1], layer)
    k_BS = places.k_BS[:, first : first + num_held]
    return Places(places.q_BT, nn.functional.pad(k_BS, (0, num_held - k_BS.shape[1]), value=-1))


def _no_backend(config: UlmConfig) -> list[str]:
    """What vLLM's transformers backend would leave out without a word, for it takes no mask and one form of layer."""
    blocks = config.blocks
    attentions = [block["attention"] for block in blocks]
    windows = [kind.get("window_tokens") for kind in attentions]
    told = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    found = {
        "a bias of scores": any(POSITIONS[block["position"]["kind"]].has_bias for block in blocks),
        "attention without scores": any(ATTENTIONS[kind["kind"]] is UlmKernelAttention for kind in attentions),
        "sinks": any(kind.get("sinks") for kind in attentions),
        "windows of several widths, of one token, or beside a text's first tokens": windows != told,
        "layers with different heads or caps": len({(k["num_kv_heads"], k.get("soft_cap")) for k in attentions}) > 1,
        "layers that share weights": config.layers_per_block > 1,
        "embeddings of values": config.spec["embedding"]["kind"] == "value",
        "scaled embeddings": config.spec["embedding"]["scaled"],
    }
    return [reason for reason, is_so in found.items() if is_so]


class UlmForCausalLM(UlmPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder and its scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: UlmConfig) -> None:
        super().__init__(config)
        self.model = UlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cap = config.spec["head"].get("cap")  # arXiv 2408.00118, section 2.3
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token at every position, or at the last `logits_to_keep`; a loss where labels are given."""
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BTV = self.lm_head(slice_logits_to_keep(found.last_hidden_state, logits_to_keep))
        if self.cap is not None:
            logits_BTV = self.cap * torch.tanh(logits_BTV / self.cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
