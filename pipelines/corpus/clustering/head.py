"""The router's linear head: it learns from short passages which cluster their document is in.

Centroids of whole documents tell short texts apart badly: of 32 clusters' passages of 300 characters they found fewer
than a linear classifier of the same embeddings did (docs/experiments.md).

Shape letters: M passages, C clusters, D dimensions of the embedding.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ulm.swarm.router import Head

MAX_STEPS = 1_000  # of the optimizer; a hundred are usually enough
INVERSE_PENALTY = 10.0  # scikit-learn's C: unit vectors of many dimensions need weights larger than its usual 1 allows
NEVER = -30.0  # logit of a cluster that no document is in


def fit_head(h_MD: NDArray[np.float64], label_M: NDArray[Any], num_clusters: int) -> Head:
    """The multinomial logistic regression of labels on embeddings; a label that none has gets no weight to speak of."""
    found = np.unique(label_M)
    matrix_CD, bias_C = np.zeros((num_clusters, h_MD.shape[1])), np.full(num_clusters, NEVER)
    if len(found) == 1:
        bias_C[found] = 0.0
        return Head(matrix_CD, bias_C)
    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what it has found by then is good enough
        regression.fit(h_MD, label_M)
    if len(found) == 2:  # one row, for the second label against the first
        matrix_CD[found[1]], bias_C[found] = regression.coef_[0], [0.0, regression.intercept_[0]]
    else:
        matrix_CD[found], bias_C[found] = regression.coef_, regression.intercept_
    return Head(matrix_CD, bias_C)
