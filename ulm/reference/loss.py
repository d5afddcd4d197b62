"""The training loss by the book."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def cross_entropy(
    logits_BTV: NDArray[Any], targets_BT: NDArray[Any], scored_BT: NDArray[np.bool_] | None = None
) -> float:
    """Mean of -log p(target) over the scored positions, in nats: log sum_v exp(z_v) - z_target.

    Shannon's cross entropy of the text under the model; its exponential is the perplexity.
    """
    if scored_BT is None:
        scored_BT = np.ones(targets_BT.shape, dtype=bool)
    nats = []
    for b, t in np.argwhere(scored_BT):
        z_V = logits_BTV[b, t].astype(np.float64)
        nats.append(z_V.max() + np.log(np.exp(z_V - z_V.max()).sum()) - z_V[targets_BT[b, t]])
    return float(np.mean(nats))
