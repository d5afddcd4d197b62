"""How the position of a token enters a ulm model, one class a kind.

Shape letters, as suffixes of tensor names: B batch, T new tokens, S known tokens, D model width, H heads, K key/value
heads, E head width, F pairs of dimensions or features, J K x E, M tokens of all rows, N experts, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .configuration_ulm import UlmConfig


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
