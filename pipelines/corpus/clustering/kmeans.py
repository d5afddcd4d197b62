"""Balanced k-means over unit vectors of documents: the fit, the choice of a number, the merging of tiny clusters.

c-BTM (arXiv 2303.14177, section 3.1): while it is fitted every cluster takes about the same number of tokens;
afterwards a document belongs to its nearest centroid.

Shape letters: N documents, C clusters, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from pipelines.corpus.clustering.assign import nearest

BALANCE_SLACK = 0.1  # a cluster is full when it has this much more than its even share of tokens
RESTARTS = 4  # of k-means, the best kept: one start in several ends in a poor optimum
MIN_MEAN_DOCUMENTS = 10  # of a cluster: a number that leaves fewer is not tried


def balanced_kmeans(
    h_ND: NDArray[np.float64], tokens_N: NDArray[np.int64], num_clusters: int, iterations: int, seed: int
) -> NDArray[np.float64]:
    """Centroids_CD of clusters with about equal tokens; the same input and seed give the same clusters.

    k-means where a document weighs its tokens and the assignment is `assign_balanced`; clusters are numbered by the
    first document they hold.
    """
    best_cost, best_N = np.inf, np.zeros(len(h_ND), dtype=np.int64)
    for restart in range(RESTARTS):
        start = kmeans_plusplus(h_ND, num_clusters, sample_weight=tokens_N, random_state=seed + restart)
        centroids_CD = start[0].astype(np.float64)
        cluster_N = np.full(len(h_ND), -1)
        for _ in range(iterations):
            distance_NC = _squared_distances(h_ND, centroids_CD)
            previous_N, cluster_N = cluster_N, assign_balanced(distance_NC, tokens_N)
            if np.array_equal(previous_N, cluster_N):
                break
            centroids_CD = means(h_ND, tokens_N, cluster_N, centroids_CD)
        cost = float((tokens_N * _squared_distances(h_ND, centroids_CD)[np.arange(len(h_ND)), cluster_N]).sum())
        if cost < best_cost:
            best_cost, best_N, best_CD = cost, cluster_N, centroids_CD
    first_C = [int(np.argmax(best_N == c)) if (best_N == c).any() else len(best_N) for c in range(num_clusters)]
    return np.asarray(best_CD[np.argsort(first_C, kind="stable")])


def means(
    h_ND: NDArray[np.float64], tokens_N: NDArray[np.int64], cluster_N: NDArray[Any], previous_CD: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means of the clusters' documents, weighed by tokens; an empty cluster keeps its centroid."""
    weight_NC = (cluster_N[:, None] == np.arange(len(previous_CD))) * tokens_N[:, None].astype(np.float64)
    total_C1 = weight_NC.sum(axis=0)[:, None]
    return np.where(total_C1 > 0, (weight_NC.T @ h_ND) / np.maximum(total_C1, 1), previous_CD)


def assign_balanced(distance_NC: NDArray[np.float64], tokens_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """A cluster for each document, near it, no cluster above its even share of tokens + slack + one document.

    Greedy by regret: each document asks for the nearest cluster that is still open; a cluster takes those who would
    lose most by going elsewhere, until it is full, and closes; the others ask again. At most C rounds, all vectorised.
    """
    num_documents, num_clusters = distance_NC.shape
    tokens_N = np.maximum(tokens_N, 1)  # so that a full cluster holds something
    capacity = tokens_N.sum() / num_clusters * (1 + BALANCE_SLACK)
    load_C = np.zeros(num_clusters)
    cluster_N = np.full(num_documents, -1, dtype=np.int64)
    cost_NC = distance_NC.copy()  # inf once a cluster is full
    while (left := np.flatnonzero(cluster_N < 0)).size:
        choice = cost_NC[left].argmin(axis=1)
        two_N2 = _two_smallest(cost_NC[left])
        order = np.argsort(two_N2[:, 0] - two_N2[:, -1], kind="stable")  # by regret
        for cluster in np.unique(choice):
            asking = order[choice[order] == cluster]
            before = load_C[cluster] + np.cumsum(tokens_N[left[asking]]) - tokens_N[left[asking]]
            taken = asking[before < capacity]
            cluster_N[left[taken]] = cluster
            load_C[cluster] += tokens_N[left[taken]].sum()
            if load_C[cluster] >= capacity:
                cost_NC[:, cluster] = np.inf
    return cluster_N


def candidates(max_clusters: int) -> list[int]:
    """Numbers of clusters to try, about sqrt(2) apart: 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    found = (factor << power for power in range(max_clusters.bit_length()) for factor in (2, 3))
    return sorted(number for number in found if number <= max_clusters)


def try_numbers(
    h_ND: NDArray[np.float64], tokens_N: NDArray[np.int64], numbers: Sequence[int], iterations: int, seed: int
) -> dict[int, float]:
    """The simplified silhouette of a clustering into each number; none where that would leave tiny clusters."""
    return {
        number: simplified_silhouette(h_ND, tokens_N, balanced_kmeans(h_ND, tokens_N, number, iterations, seed))
        for number in numbers
        if number * MIN_MEAN_DOCUMENTS <= len(h_ND)
    }


def simplified_silhouette(
    h_ND: NDArray[np.float64], tokens_N: NDArray[np.int64], centroids_CD: NDArray[np.float64]
) -> float:
    """The mean over tokens of 1 - a / b: a a document's distance to the nearest centroid, b to the second nearest.

    Rousseeuw's silhouette (1987) with distances to centroids in place of mean distances to documents (Hruschka, de
    Castro, Campello, 2004), so it costs N * C instead of N * N. A document alone in its cluster counts 0, as in
    Rousseeuw, and so does a single cluster. Weighed by tokens because the fit balances those.
    """
    distance_NC = np.sqrt(_squared_distances(h_ND, centroids_CD).clip(0))
    two_N2 = _two_smallest(distance_NC)
    a_N, b_N = two_N2[:, 0], two_N2[:, -1]
    cluster_N = distance_NC.argmin(axis=1)
    alone_N = np.bincount(cluster_N, minlength=len(centroids_CD))[cluster_N] == 1
    counts_N = ~alone_N & (b_N > 0)
    silhouette_N = np.where(counts_N, 1 - a_N / np.where(counts_N, b_N, 1), 0)
    return float(np.average(silhouette_N, weights=np.maximum(tokens_N, 1)))


def merge_tiny(
    h_ND: NDArray[np.float64], tokens_N: NDArray[Any], centroids_CD: NDArray[np.float64], min_tokens: int
) -> NDArray[np.float64]:
    """Centroids_CD, fewer where needed, whose nearest documents have `min_tokens` each, or one that has all."""
    while True:
        tokens_C = np.bincount(nearest(h_ND, centroids_CD), weights=tokens_N, minlength=len(centroids_CD))
        if len(centroids_CD) == 1 or tokens_C.min() >= min_tokens:
            return centroids_CD
        centroids_CD = merge_smallest(centroids_CD, tokens_C)


def merge_smallest(centroids_CD: NDArray[np.float64], tokens_C: NDArray[Any]) -> NDArray[np.float64]:
    """One centroid fewer: the smallest cluster merged into the one nearest to it, at their mean weighed by tokens."""
    small = int(tokens_C.argmin())
    kept_CD = np.delete(centroids_CD, small, axis=0)
    into = int(nearest(centroids_CD[small : small + 1], kept_CD)[0])
    weights = np.maximum([tokens_C[small], np.delete(tokens_C, small)[into]], 1)  # two empty ones meet half-way
    kept_CD[into] = np.average([centroids_CD[small], kept_CD[into]], axis=0, weights=weights)
    return kept_CD


def _squared_distances(h_ND: NDArray[np.float64], centroids_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    """||h - c||^2 as distance_NC by one matrix product, times as fast as `nearest`; rounding can make it < 0."""
    squares_N1 = np.square(h_ND).sum(axis=1, keepdims=True)
    return np.asarray(squares_N1 - 2 * (h_ND @ centroids_CD.T) + np.square(centroids_CD).sum(axis=1))


def _two_smallest(x_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest and the second smallest of each row, in this order; of a single column that column."""
    return np.partition(x_NC, 1, axis=1)[:, :2] if x_NC.shape[1] > 1 else x_NC
