"""AdamW: adaptive steps with decoupled weight decay."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`lr` None means the model preset's."""

    lr: float | None = Field(None, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


@register("optimizer", Config)
class AdamW:
    """arXiv 1711.05101, algorithm 2, by torch's fused kernel. Matrices decay; norms and other vectors don't."""

    @staticmethod
    def build(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over a model's parameters; the schedule scales each group's `peak_lr`."""
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": lr},
            {"params": vectors, "weight_decay": 0.0, "peak_lr": lr},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
