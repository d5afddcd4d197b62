"""How positions enter embeddings, queries and keys, or scores, by the book."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _unchanged(x: Array, positions_BT: Array) -> Array:
    return x


def _no_bias(positions_BT: Array, positions_BS: Array) -> Array:
    return np.zeros((1, 1, 1, 1))


@dataclass(frozen=True)
class Position:
    """What positions do to token embeddings (x_BTD), to queries and keys (x_BTHE), and to scores (bias_BHTS)."""

    embed: Callable[[Array, Array], Array] = _unchanged
    rotate: Callable[[Array, Array], Array] = _unchanged
    bias: Callable[[Array, Array], Array] = _no_bias


def _turning(angle: Callable[[int, int], float], num_pairs: int, length: float = 1.0) -> Position:
    """Pair i as a complex number, times length exp(j angle(m, i)) at position m: arXiv 2104.09864, equations 12 and 15.

    Pair i is (x_i, x_(i+R/2)) of the first R dimensions, as Llama stores it; the paper pairs neighbours. A permutation
    of them is the difference.
    """

    def rotate(x_BTHE: Array, positions_BT: Array) -> Array:
        width = 2 * num_pairs
        pairs = x_BTHE[..., :num_pairs] + 1j * x_BTHE[..., num_pairs:width]
        angles = [[[angle(int(m), i) for i in range(num_pairs)] for m in row] for row in positions_BT]
        turned = pairs * length * np.exp(1j * np.array(angles))[:, :, None]
        return np.concatenate([turned.real, turned.imag, x_BTHE[..., width:]], axis=-1)

    return Position(rotate=rotate)


def _width(spec: Mapping[str, Any]) -> int:
    of_head = spec["attention"]["head_dim"] or spec["d_model"] // spec["attention"]["num_heads"]
    return int(spec["position"]["rotary_dim"] or of_head)


def rope(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """Angle m theta^(-2i/E): arXiv 2104.09864, equation 15; scaled as arXiv 2309.00071 has it, s the factor.

    linear: m / s. ntk: theta s^(E / (E - 2)), section 3.1. yarn: sections 3.2 and 3.3, a mean of both ends by the turns
    r = L / wavelength, and queries and keys times 0.1 ln s + 1.
    """
    config, width = spec["position"], _width(spec)
    theta, scaling = config["theta"], config["scaling"]
    kind, s = (scaling["kind"], scaling["factor"]) if scaling else ("", 1.0)
    if kind == "ntk":
        theta = theta * s ** (width / (width - 2))
    length = 1.0
    if kind == "yarn":
        length = scaling["attention_factor"] or 0.1 * np.log(s) + 1

    def angle(m: int, i: int) -> float:
        frequency = theta ** (-2 * i / width)
        if kind == "linear":
            return float(m / s * frequency)
        if kind == "yarn":
            wavelength = 2 * np.pi / frequency
            turns = scaling["original_context_tokens"] / wavelength
            low, high = scaling["slow_turns"], scaling["fast_turns"]
            gamma = 0.0 if turns < low else 1.0 if turns > high else (turns - low) / (high - low)
            frequency = (1 - gamma) * frequency / s + gamma * frequency
        return float(m * frequency)

    return _turning(angle, width // 2, length)


def longrope(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """Angle m theta^(-2i/E) / lambda_i, without lambda for the first positions: arXiv 2402.13753, equation 2.

    Long factors where the context is longer than the original; queries and keys times
    sqrt(1 + ln(context / original) / ln(original)): arXiv 2404.14219.
    """
    config, width = spec["position"], _width(spec)
    original = config["original_context_tokens"] or spec["context_tokens"]
    is_long = spec["context_tokens"] > original
    factors = config["long_factors" if is_long else "short_factors"] or [1.0] * (width // 2)
    length = config["attention_factor"]
    if length is None:
        length = np.sqrt(1 + np.log(spec["context_tokens"] / original) / np.log(original)) if is_long else 1.0

    def angle(m: int, i: int) -> float:
        slowed = 1.0 if m < config["keep_first_tokens"] else factors[i]
        return float(m * config["theta"] ** (-2 * i / width) / slowed)

    return _turning(angle, width // 2, length)


def learned(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """The vector of position m added to a token's: the sum of arXiv 1706.03762, section 3.5, with a table.

    Padding, one past the last position, takes the last vector.
    """

    def embed(x_BTD: Array, positions_BT: Array) -> Array:
        table = weights["weight"]
        rows = [[table[min(m, len(table) - 1)] for m in row] for row in positions_BT]
        return x_BTD + np.array(rows)

    return Position(embed=embed)


def none(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """Nothing: arXiv 2305.19466."""
    return Position()


def sinusoidal(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """PE(m, 2i) = sin(m / theta^(2i/D)), PE(m, 2i+1) = cos of the same: arXiv 1706.03762, section 3.5."""
    theta, width = spec["position"]["theta"], spec["d_model"]

    def vector(m: int) -> list[float]:
        waves = [m / theta ** (2 * (d // 2) / width) for d in range(width)]
        return [np.cos(wave) if d % 2 else np.sin(wave) for d, wave in enumerate(waves)]

    def embed(x_BTD: Array, positions_BT: Array) -> Array:
        return x_BTD + np.array([[vector(m) for m in row] for row in positions_BT.tolist()])

    return Position(embed=embed)


def alibi(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """-m_h |i - j| added to the score: arXiv 2108.12409, section 3.

    Slopes for 2^k heads: a geometric series that begins with and is multiplied by 2^(-8 / 2^k); for other numbers the
    series of 2^k < n, then the odd members of the series of 2^(k+1).
    """
    num_heads = spec["attention"]["num_heads"]

    def series(n: int) -> list[float]:
        return [(2 ** (-8 / n)) ** (i + 1) for i in range(n)]

    power = 1
    while 2 * power <= num_heads:
        power *= 2
    slopes = (series(power) + series(2 * power)[0::2])[:num_heads]

    def bias(positions_BT: Array, positions_BS: Array) -> Array:
        out = np.zeros((len(positions_BT), num_heads, positions_BT.shape[1], positions_BS.shape[1]))
        for b, h, t, s in np.ndindex(out.shape):
            out[b, h, t, s] = -slopes[h] * abs(int(positions_BT[b, t]) - int(positions_BS[b, s]))
        return out

    return Position(bias=bias)


def t5(weights: Mapping[str, Array], spec: Mapping[str, Any]) -> Position:
    """A learned scalar for each head and bucket of distances, added to the score: arXiv 1910.10683, section 2.1.

    Half of the buckets are of one distance; the others grow logarithmically to max_distance, beyond which there is one.
    Of two directions each has half of the buckets, first those looking back.
    """
    config, table = spec["position"], weights["weight"]
    each_way = config["num_buckets"] // (2 if config["bidirectional"] else 1)
    single = each_way // 2
    # Where each of the logarithmic buckets begins: a geometric series from `single` to max_distance.
    growth = config["max_distance"] / single
    begins = [single * growth ** (n / (each_way - single)) for n in range(each_way - single)]

    def bucket(distance: int) -> int:
        return distance if distance < single else single - 1 + sum(distance >= begin - 1e-9 for begin in begins)

    def bias(positions_BT: Array, positions_BS: Array) -> Array:
        out = np.zeros((len(positions_BT), table.shape[1], positions_BT.shape[1], positions_BS.shape[1]))
        for b, t, s in np.ndindex(len(out), *out.shape[2:]):
            back = int(positions_BT[b, t]) - int(positions_BS[b, s])
            if config["bidirectional"]:
                out[b, :, t, s] = table[bucket(abs(back)) + (each_way if back < 0 else 0)]
            else:
                out[b, :, t, s] = table[bucket(max(back, 0))]
        return out

    return Position(bias=bias)
