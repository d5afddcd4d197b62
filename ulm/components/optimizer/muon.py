"""Muon: matrices of the layers move by their orthogonalised momentum, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ulm.errors import ConfigError
from ulm.registry import KindConfig, register
from ulm.runtime import has_fast_bfloat16

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of Keller Jordan's note: steepest at zero, ends between 0.7 and 1.2
NORM_EPS = 1e-7  # a zero matrix stays zero
STACK_NUMBERS = 2**24  # numbers orthogonalised at once: bounds the copies that a step needs
TABLES = ("embedding", "position", "head")  # parts of a model whose matrices are look-ups or classify: not rotated


class Config(KindConfig):
    """`lr` None means the model preset's, which is AdamW's; `scale` match_rms_adamw is what makes it fit here."""

    lr: float | None = Field(None, gt=0)  # of the layers' matrices
    momentum: float = Field(0.95, ge=0, lt=1)
    num_iterations: int = Field(5, ge=1, le=20)
    # match_rms_adamw: 0.2 sqrt(larger side), so that an update is as large as AdamW's (arXiv 2502.16982, equation 4);
    # original: sqrt(rows / columns) where that is above 1, as in Keller Jordan's note. There lr is about 0.02.
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    weight_decay: float = Field(0.1, ge=0)  # of all matrices, also AdamW's
    adamw_lr: float | None = Field(None, gt=0)  # of embedding, head and vectors; None: lr
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.scale == "original" and (self.lr is None or self.adamw_lr is None):
            remedy = "lr, about 0.02, and adamw_lr: the preset's rate fits match_rms_adamw alone"
            raise ConfigError("optimizer.scale", "original without rates of its own", remedy)
        return self


@register("optimizer", Config)
class Muon(torch.optim.Optimizer):
    """https://kellerjordan.github.io/posts/muon/ with Nesterov momentum, and arXiv 1711.05101 for the rest.

    Parameters of embedding, position and head, and all that are not matrices, go by AdamW. State is kept in the
    dtype of the weights.
    """

    @staticmethod
    def build(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over a model's parameters; the schedule scales each group's `peak_lr`."""
        hidden: list[Tensor] = []
        tables: list[Tensor] = []
        vectors: list[Tensor] = []
        for name, parameter in model.named_parameters():
            is_table = name.partition(".")[0] in TABLES or parameter.dim() > 2
            (vectors if parameter.dim() < 2 else tables if is_table else hidden).append(parameter)
        muon = {
            "momentum": config.momentum,
            "num_iterations": config.num_iterations,
            "scale": config.scale,
            "weight_decay": config.weight_decay,
            "peak_lr": lr,
        }
        adam = {"betas": (config.beta1, config.beta2), "eps": config.eps, "peak_lr": config.adamw_lr or lr}
        adam["fused"] = True  # load_state_dict then leaves the count of steps in float32, beside its parameter
        groups: list[dict[str, Any]] = [
            {"params": hidden, **muon},
            {"params": tables, **adam, "weight_decay": config.weight_decay},
            {"params": vectors, **adam, "weight_decay": 0.0},
        ]
        return Muon([{**group, "lr": group["peak_lr"]} for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal_step if "momentum" in group else self._adamw_step)(group, parameters)
        return loss

    def _orthogonal_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        rate, decay = group["lr"], group["lr"] * group["weight_decay"]
        for stack in _stacks(parameters):
            directions = []
            for p in stack:
                assert p.grad is not None
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(momentum, group["momentum"])  # Nesterov: where the momentum goes next
                directions.append(direction.T if _is_tall(p) else direction)
            turned = orthogonalised(torch.stack(directions), group["num_iterations"])
            for p, direction in zip(stack, turned.unbind(), strict=True):
                p.mul_(1 - decay)
                p.add_(direction.T if _is_tall(p) else direction, alpha=-rate * _factor(group["scale"], *p.shape))

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(x_NRC: Tensor, num_iterations: int) -> Tensor:
    """N matrices of R rows and C >= R columns with their singular values brought near 1, by Newton and Schulz.

    Products are in bfloat16 where a GPU has it, which is exact enough, and in float32 on a CPU, most of which emulate
    bfloat16; float64 stays.
    """
    a, b, c = QUINTIC
    x_NRC = x_NRC.to(_product_dtype(x_NRC))
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp_min(NORM_EPS)
    for _ in range(num_iterations):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def _product_dtype(x_NRC: Tensor) -> torch.dtype:
    if x_NRC.is_cuda and x_NRC.dtype != torch.float64 and has_fast_bfloat16(x_NRC.device):
        return torch.bfloat16
    return torch.promote_types(x_NRC.dtype, torch.float32)


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices that are orthogonalised together: of one shape, on its side or not."""
    by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault((*sorted(p.shape), p.dtype, p.device), []).append(p)
    for same in by_shape.values():
        at_once = max(1, STACK_NUMBERS // same[0].numel())
        yield from (same[start : start + at_once] for start in range(0, len(same), at_once))


def _is_tall(p: Tensor) -> bool:
    return p.shape[0] > p.shape[1]


def _factor(scale: str, rows: int, columns: int) -> float:
    """What a rate is multiplied by for a matrix of this shape."""
    if scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
