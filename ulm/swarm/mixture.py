"""Exact mixtures of experts in probability space: p = sum_j w_j p_j (c-BTM, arXiv 2303.14177, equation 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_logprobs(logprobs_NV: Tensor, weight_N: Tensor) -> Tensor:
    """The logprobs_V of sum_j w_j p_j; with leading dimensions (logprobs_BNV, weight_BN) one mixture for each.

    In the logprobs' dtype, float32 at least. An expert of weight 0 counts for exactly nothing, whatever it says, and
    weight 1 on one expert gives its logprobs bit for bit.
    """
    if logprobs_NV.dtype not in (torch.float32, torch.float64):
        logprobs_NV = logprobs_NV.float()
    weight_N1 = weight_N.to(logprobs_NV)[..., None]
    terms_NV = torch.where(weight_N1 > 0, weight_N1.log() + logprobs_NV, -torch.inf)
    return torch.logsumexp(terms_NV, dim=-2)
