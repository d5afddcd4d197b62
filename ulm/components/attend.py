"""The one place where attention reaches its kernel, and the naive form that all kernels are held to."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ulm.components.contracts import Mask


def attend(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    mask: Mask,
    bias_BHTS: Tensor | None = None,
    *,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens over S known ones, as out_BTHE in q's dtype.

    H must be a multiple of K: heads h*H/K … share key/value head h. A mask without places is causal and T equals S.
    softmax(q k^T / sqrt(E)) v: arXiv 1706.03762, equation 1; shared heads: arXiv 2305.13245. `soft_cap` c makes scores
    c tanh(score / c), before bias and mask (arXiv 2408.00118, section 2.3). `sinks_H` is a learned score in each head's
    softmax that belongs to no value (arXiv 2508.10925, section 2.1.2).

    Plain causality goes to PyTorch's SDPA, which takes FlashAttention on CUDA; other masks on CUDA to FlexAttention;
    on a CPU to SDPA with a dense mask, because FlexAttention has no backward there and without compiling is slower.
    """
    if soft_cap is None and mask.places is None and bias_BHTS is None and sinks_H is None:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if mask.places is not None and bias_BHTS is None and sinks_H is None and q_BTHE.is_cuda and q_BTHE.shape[1] > 1:
        return _flex(q_BTHE, k_BSKE, v_BSKE, mask, soft_cap)
    if soft_cap is not None:  # SDPA has no place for it
        return naive(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS, soft_cap=soft_cap, sinks_H=sinks_H)
    return _dense(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS, sinks_H)


def naive(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    mask: Mask,
    bias_BHTS: Tensor | None = None,
    *,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The same by its equation, with the scores of all pairs: the oracle of the kernels, and what has no kernel.

    The softmax is in float32 at least.
    """
    groups = q_BTHE.shape[2] // k_BSKE.shape[2]
    k_BSHE, v_BSHE = (x.repeat_interleave(groups, dim=2) for x in (k_BSKE, v_BSKE))
    scores_BHTS = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BSHE) / math.sqrt(q_BTHE.shape[-1])
    scores_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
    if soft_cap is not None:
        scores_BHTS = soft_cap * torch.tanh(scores_BHTS / soft_cap)
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    # Not -inf: padding that may look nowhere would become NaN, and in the next layer no share of 0 keeps NaN out.
    lowest = torch.finfo(scores_BHTS.dtype).min
    scores_BHTS = scores_BHTS.masked_fill(~_allowed_BTS(mask, q_BTHE)[:, None], lowest)
    if sinks_H is not None:
        sinks = sinks_H.to(scores_BHTS.dtype)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        shares_BHTS = torch.cat([scores_BHTS, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        shares_BHTS = scores_BHTS.softmax(-1)
    return torch.einsum("bhts,bshe->bthe", shares_BHTS.to(v_BSHE.dtype), v_BSHE)


def _allowed_BTS(mask: Mask, q_BTHE: Tensor) -> Tensor:
    allowed_BTS = mask.allowed_BTS()
    if allowed_BTS is None:
        size = q_BTHE.shape[1]
        allowed_BTS = torch.ones(1, size, size, dtype=torch.bool, device=q_BTHE.device).tril()
    return allowed_BTS


def _dense(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, bias_BHTS: Tensor | None, sinks_H: Tensor | None
) -> Tensor:
    """SDPA with the mask, bias and sinks of all pairs; a sink is one more key with nothing to say."""
    allowed: Tensor = _allowed_BTS(mask, q_BTHE)[:, None]
    if bias_BHTS is not None:
        allowed = bias_BHTS.to(q_BTHE.dtype).masked_fill(~allowed, float("-inf"))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    if sinks_H is not None:
        if allowed.dtype == torch.bool:
            allowed = q.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        sinks = sinks_H.to(q.dtype)[None, :, None, None].expand(len(allowed), -1, allowed.shape[2], 1)
        allowed = torch.cat([allowed.expand(-1, len(sinks_H), -1, -1), sinks], dim=-1)
        k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))  # a key of zeros: its score is the sink alone
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True).transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, soft_cap: float | None) -> Tensor:
    """Scores of the blocks that the mask leaves, and no others: arXiv 2412.05496."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        found = mask.at(b, t, s)
        assert found is not None
        return found

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    # FlexAttention takes one dtype and knows nothing of autocast, which leaves normed queries and keys in float32.
    dtype = torch.get_autocast_dtype("cuda") if q_BTHE.is_cuda and torch.is_autocast_enabled("cuda") else q_BTHE.dtype
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q_BTHE, k_BSKE, v_BSKE))
    blocks = create_block_mask(allowed, len(q), None, q.shape[2], k.shape[2], device=str(q.device))
    flex = _compiled_flex() if q.is_cuda else flex_attention
    out: Tensor = flex(q, k, v, score_mod=None if soft_cap is None else capped, block_mask=blocks, enable_gqa=True)
    return out.transpose(1, 2)
