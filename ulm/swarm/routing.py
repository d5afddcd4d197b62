"""Who answers a text: weights of experts from the router, from what they made of the text so far, or from both.

The same functions weigh experts at the endpoint and in the tables of `ulm swarm train`.
Shape letters: N experts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ulm.swarm.router import Router, top_k

By = Literal["clusterer", "likelihood", "product"]


def weigh(
    router: Router, clusterer_N: NDArray[np.float64], by: By = "clusterer", nats_N: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Weights w_N of sum 1 for the text so far, of which `clusterer_N` are the router's.

    `clusterer`: these, its posterior (c-BTM, arXiv 2303.14177, section 3.2). `likelihood`: p(j | text), proportional
    to prior_j p_j(text), the prior being the clusters' shares (Branch-Train-Merge, arXiv 2208.03306, section 2.2).
    `product`: the same with the router's posterior as the prior. `nats_N` holds log p_j(text), -inf for an expert that
    has no say; it is needed by the last two.
    """
    prior_N = router.shares_N / router.shares_N.sum() if by == "likelihood" else clusterer_N
    if by == "clusterer":
        return prior_N
    assert nats_N is not None, "a likelihood needs what the experts made of the text"
    with np.errstate(divide="ignore"):
        score_N = np.log(prior_N) + nats_N
    if not np.isfinite(score_N.max()):  # nobody has a say that the prior lets stand
        score_N = nats_N
    weight_N = np.exp(score_N - score_N.max())
    return np.asarray(weight_N / weight_N.sum())


def chosen(weight_N: NDArray[np.float64], most: int, margin: float = 0.0) -> NDArray[np.float64]:
    """The weights of those that answer, of sum 1: the best alone where it leads by `margin` or more, else `most`."""
    if most > 1 and margin > 0:
        first, second = np.sort(weight_N)[::-1][:2] if len(weight_N) > 1 else (1.0, 0.0)
        most = 1 if first - second >= margin else most
    return top_k(weight_N, most)
