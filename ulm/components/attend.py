"""The one place where attention reaches its kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ulm.components.contracts import Mask


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, bias_BHTS: Tensor | None = None) -> Tensor:
    """Attention of T new tokens over S known ones, as out_BTHE in q's dtype.

    H must be a multiple of K: heads h*H/K … share key/value head h. Without `allowed_BTS` the mask is causal and
    T equals S. softmax(q k^T / sqrt(E)) v: arXiv 1706.03762, equation 1; shared heads: arXiv 2305.13245.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    allowed_BTS = mask.allowed_BTS
    if allowed_BTS is None and bias_BHTS is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if allowed_BTS is None:  # the kernel takes a bias or is_causal, not both
        size = q.shape[-2]
        allowed_BTS = torch.ones(1, size, size, dtype=torch.bool, device=q.device).tril()
    allowed = allowed_BTS[:, None]
    if bias_BHTS is not None:
        allowed = bias_BHTS.masked_fill(~allowed, float("-inf"))
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True).transpose(1, 2)
