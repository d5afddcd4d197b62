"""Lion: every weight moves by the rate, in the direction of a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`lr` None means a tenth of the model preset's, which is AdamW's: signs are larger than AdamW's updates."""

    lr: float | None = Field(None, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)  # of the direction
    beta2: float = Field(0.99, ge=0, lt=1)  # of the momentum
    weight_decay: float = Field(1.0, ge=0)  # ten times AdamW's, for the rate is a tenth


@register("optimizer", Config)
class Lion(torch.optim.Optimizer):
    """w - lr (sign(beta1 m + (1 - beta1) g) + decay w): arXiv 2302.06675, algorithm 2. Matrices alone decay."""

    lr_share = 0.1  # of the preset's rate, where the recipe gives none: section 5 of the paper, 3 to 10 times smaller

    @staticmethod
    def build(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over a model's parameters; the schedule scales each group's `peak_lr`."""
        betas = {"beta1": config.beta1, "beta2": config.beta2, "peak_lr": lr, "lr": lr}
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay, **betas},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, **betas},
        ]
        return Lion([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [p.grad for p in parameters if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in parameters]
            directions = torch._foreach_lerp(momenta, gradients, 1 - group["beta1"])
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - group["beta2"])
        return loss
