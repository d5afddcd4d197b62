"""A mixture of experts: each token goes through a few of many feed-forward layers, chosen by a router."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import one_hot

from ulm.components.contracts import ModelDims
from ulm.components.feedforward.swiglu import Config as ExpertConfig
from ulm.components.feedforward.swiglu import SwiGLU
from ulm.errors import ConfigError
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`d_hidden` is of each expert; None means 8/3 d_model, rounded up to a multiple of 32."""

    num_experts: int = Field(8, ge=1, le=1024)
    experts_per_token: int = Field(2, ge=1)
    d_hidden: int | None = Field(None, ge=1, le=2**20)
    balance: float = Field(0.01, ge=0)  # weight of the loss that keeps experts equally busy (arXiv 2101.03961)

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.experts_per_token > self.num_experts:
            problem = f"{self.experts_per_token}, and there are {self.num_experts} experts"
            raise ConfigError("feedforward.experts_per_token", problem, "at most num_experts")
        return self


@register("feedforward", Config)
class MixtureOfExperts(nn.Module):
    """sum_e softmax(top-k of x W_router)_e SwiGLU_e(x): arXiv 2401.04088, section 2.1.

    A single expert is weighed by its probability among all, or the router would learn nothing of what it does
    (arXiv 2101.03961, equation 2).

    Dropless: every token gets its k experts, however many others want the same, so what a token gets does not depend on
    the batch. `auxiliary_losses` has what calls with a gradient add to the training loss, per token: balance * N *
    sum_e f_e P_e, f the share of choices that fell on an expert and P the router's mean probability (arXiv 2101.03961,
    equations 4 to 6).
    """

    rearranges_tokens = True  # its parts see some tokens only, in an order of their own

    def __init__(self, config: Config, dims: ModelDims, layer: int) -> None:
        super().__init__()
        self.experts_per_token, self.balance = config.experts_per_token, config.balance
        self.router = nn.Linear(dims.d_model, config.num_experts, bias=False)
        expert = ExpertConfig(kind="swiglu", d_hidden=config.d_hidden)
        self.experts = nn.ModuleList(SwiGLU(expert, dims, layer) for _ in range(config.num_experts))
        self.auxiliary_losses: list[Tensor] = []

    @property
    def num_idle_parameters(self) -> int:
        """Numbers in the matrices of experts that a token is not sent to."""
        of_expert = sum(p.numel() for p in self.experts[0].parameters())
        return (len(self.experts) - self.experts_per_token) * of_expert

    @torch.compiler.disable  # how many tokens an expert gets is known at run time only
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, as out_BTD."""
        x_MD = x_BTD.flatten(0, 1)
        # In float32 at least: a softmax of bfloat16 logits would be too coarse to rank experts.
        logits_MN = self.router(x_MD).to(torch.promote_types(x_MD.dtype, torch.float32))
        best_MJ, chosen_MJ = logits_MN.topk(self.experts_per_token)
        is_single = self.experts_per_token == 1
        weights_MJ = logits_MN.softmax(-1).gather(1, chosen_MJ) if is_single else best_MJ.softmax(-1)
        weights_MJ = weights_MJ.to(x_BTD.dtype)
        if self.balance and torch.is_grad_enabled():
            self.auxiliary_losses.append(self._unbalance(logits_MN, chosen_MJ))
        order = chosen_MJ.flatten().argsort(stable=True)
        tokens = order // self.experts_per_token
        parts = x_MD[tokens].split(self._counts(chosen_MJ))
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out = out * weights_MJ.flatten()[order, None]
        # Every token has its k results at places known beforehand, so they are summed in one order, on any device.
        return out[order.argsort()].unflatten(0, (-1, self.experts_per_token)).sum(1).view_as(x_BTD)

    def _counts(self, chosen_MJ: Tensor) -> list[int]:
        """How often each expert was chosen; on a tensor without data, which is for counting memory, all equally."""
        num, choices = len(self.experts), chosen_MJ.numel()
        if isinstance(chosen_MJ, FakeTensor):
            return [choices // num + (expert < choices % num) for expert in range(num)]
        counts: list[int] = torch.bincount(chosen_MJ.flatten(), minlength=num).tolist()
        return counts

    def _unbalance(self, logits_MN: Tensor, chosen_MJ: Tensor) -> Tensor:
        num = len(self.experts)
        f_N = one_hot(chosen_MJ, num).sum(1).to(logits_MN.dtype).mean(0) / self.experts_per_token
        return self.balance * num * (f_N * logits_MN.softmax(-1).mean(0)).sum()
