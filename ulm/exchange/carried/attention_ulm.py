"""Attention of a ulm model: by scores, through the kernels of transformers, or by feature maps; and its norms.

Shape letters, as suffixes of tensor names: B batch, T new tokens, S known tokens, D model width, H heads, K key/value
heads, E head width, F pairs of dimensions or features, J K x E, M tokens of all rows, N experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, rms_norm
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ulm import UlmConfig
from .positions_ulm import NoPosition


@dataclass
class Places:
    """Where T new and S known tokens stand in their rows, B of them or one for all; -1 is padding among the known."""

    q_BT: Tensor
    k_BS: Tensor


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
        is_seen_B1TS = is_seen(places)[:, None]
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


def is_seen(places: Places, window_tokens: int | None = None, num_sink_tokens: int = 0) -> Tensor:
    """Whether each query may look at each key, as booleans BTS: at tokens, not later, near enough or a row's first."""
    q_BT1, k_B1S = places.q_BT[:, :, None], places.k_BS[:, None, :]
    is_seen_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
    if window_tokens is not None:
        is_seen_BTS = is_seen_BTS & ((q_BT1 - k_B1S < window_tokens) | (k_B1S < num_sink_tokens))
    return is_seen_BTS
