"""The router: which experts a text calls for, from the clustering that split the training text.

w_j = softmax_j(-||h - c_j||^2 / T), h the text's embedding, c_j the centroids (c-BTM, arXiv 2303.14177, section 3.2).
A linear head that has learned from passages whose they are does better on short text: w = softmax(W h + b) (as in
DiPaCo, arXiv 2403.10616, section 2). Experts that came after it was fitted are weighed by their centroids.

Shape letters: N experts, V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ulm import artefacts
from ulm.errors import ArtefactError
from ulm.swarm.embed import Embedder

FILES = ("router.json", "router.safetensors")
FAR_CHARS = (50, 100, 200, 400, 800)  # lengths of text that `far` is calibrated at: a short text is farther from all


@dataclass(frozen=True)
class Head:
    """A linear classifier of embeddings into experts: the first ones of a router's, as many as it has rows."""

    matrix_ND: NDArray[np.float64]
    bias_N: NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What a router makes of a text."""

    weight_N: NDArray[np.float64]  # see Router.weights
    is_far: bool  # see Router.is_far


class Router:
    """Weights of N experts for a text. `ids` are the experts' member ids, in the order of the weights.

    `far` holds, for texts of each of FAR_CHARS, the squared distance to the nearest centroid beyond which one is like
    none of the training text, in the space before the SVD, so that words count which training never had; None: no text
    is far. `head` shares out what the centroids give to the experts that it knows: everything, if no expert was added.
    """

    def __init__(
        self,
        ids: Sequence[str],
        embedder: Embedder,
        centroids_ND: NDArray[np.float32],
        shares_N: NDArray[np.float64],
        temperature: float,
        digest: str = "",
        *,
        far: Sequence[float] | None = None,
        head: Head | None = None,
    ) -> None:
        self.ids, self.embedder, self.temperature = tuple(ids), embedder, temperature
        self.far, self.head = None if far is None else tuple(far), head
        self.centroids_ND = np.asarray(centroids_ND, dtype=np.float64)
        self.shares_N = np.asarray(shares_N, dtype=np.float64)
        self.digest = digest  # over the stored files; "" for a router that was not loaded

    def weights(self, text: str) -> NDArray[np.float64]:
        """Weights w_N that sum to 1; the clusters' shares of the training text where `text` has no known word."""
        return self._weights(self.embedder.project(text))

    def read(self, text: str) -> Reading:
        """Its weights and whether it is far; finding a text's words takes longest, and is done once for both."""
        p_D = self.embedder.project(text)
        return Reading(self._weights(p_D), self._is_far(text, p_D))

    def _weights(self, p_D: NDArray[np.float64] | None) -> NDArray[np.float64]:
        length = 0.0 if p_D is None else float(np.linalg.norm(p_D))
        if p_D is None or not length:
            return self.shares_N.copy()
        h_D = p_D / length
        weight_N = _softmax(-np.square(h_D - self.centroids_ND).sum(axis=1) / self.temperature)
        if self.head is not None:
            known = len(self.head.bias_N)
            weight_N[:known] = weight_N[:known].sum() * _softmax(self.head.matrix_ND @ h_D + self.head.bias_N)
            weight_N /= weight_N.sum()
        return weight_N

    def is_far(self, text: str) -> bool:
        """Whether the text is unlike all training text: far from every centroid, or of words that it never had.

        A text without words is not far: nothing is known of it, and the clusters' shares count.
        """
        return self._is_far(text, self.embedder.project(text))

    def _is_far(self, text: str, p_D: NDArray[np.float64] | None) -> bool:
        if self.far is None or p_D is None:
            return False
        if len(text) < FAR_CHARS[0]:  # too little to tell by distance
            return not p_D.any()
        limit = np.interp(np.log(len(text)), np.log(FAR_CHARS), self.far)
        return bool(nearest_squared(p_D[None], self.centroids_ND)[0] > limit)

    def write(self, folder: Path) -> None:
        """The files of FILES, into a folder that an artefact is being made in."""
        vocabulary = sorted(self.embedder.vocabulary, key=self.embedder.vocabulary.__getitem__)
        fields = {
            "format_version": artefacts.FORMAT_VERSION,
            "ids": self.ids,
            "temperature": self.temperature,
            "far": self.far,
            "sublinear": self.embedder.sublinear,
            "shares": self.shares_N.tolist(),
            "vocabulary": vocabulary,
            "idf": self.embedder.idf_V.tolist(),
        }
        (folder / FILES[0]).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        arrays: dict[str, NDArray[Any]] = {"components": self.embedder.components_VD}
        arrays["centroids"] = self.centroids_ND.astype(np.float32)
        if self.head is not None:
            arrays |= {"head.matrix": self.head.matrix_ND, "head.bias": self.head.bias_N}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / FILES[1])

    @classmethod
    def load(cls, folder: Path) -> Router:
        """The router of a clustering, every byte checked against its manifest; ArtefactError where one differs."""
        files = artefacts.read_manifest(folder, "clustering").get("files", {})
        stored = {name: files.get(name, "") for name in FILES}
        artefacts.verify_files(folder, stored)
        try:
            fields = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
            arrays = load_file(folder / FILES[1])
            if fields["format_version"] != artefacts.FORMAT_VERSION:
                raise ArtefactError(f"{folder / FILES[0]}: format_version is {fields['format_version']}")
            embedder = Embedder(
                {word: row for row, word in enumerate(fields["vocabulary"])},
                np.array(fields["idf"], dtype=np.float64),
                arrays["components"],
                sublinear=bool(fields.get("sublinear", False)),
            )
            shares_N = np.array(fields["shares"], dtype=np.float64)
            _check(fields, arrays, shares_N)
            head = Head(arrays["head.matrix"], arrays["head.bias"]) if "head.matrix" in arrays else None
            far = None if fields.get("far") is None else [float(limit) for limit in fields["far"]]  # of before: none
            digest = artefacts.digest_json(stored)
            parts = (fields["ids"], embedder, arrays["centroids"], shares_N, float(fields["temperature"]), digest)
            return cls(*parts, far=far, head=head)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtefactError(f"{folder}: not a readable router: {error!r}") from None


def nearest_squared(p_MD: NDArray[np.float64], centroids_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared distance of each text's unit tf-idf vector to the nearest centroid made a unit vector.

    p_MD is what the SVD sees of the texts. As the components are orthonormal, |x - c|^2 = 2 - 2 p c.
    """
    length_N1 = np.linalg.norm(centroids_ND, axis=1, keepdims=True)
    unit_ND = np.divide(centroids_ND, length_N1, out=np.zeros_like(centroids_ND), where=length_N1 > 0)
    return np.asarray(2 - 2 * (p_MD @ unit_ND.T).max(axis=1))


def _softmax(score_N: NDArray[np.float64]) -> NDArray[np.float64]:
    weight_N = np.exp(score_N - score_N.max())
    return np.asarray(weight_N / weight_N.sum())


def _check(fields: dict[str, Any], arrays: dict[str, NDArray[Any]], shares_N: NDArray[np.float64]) -> None:
    """ValueError where the parts of a router do not fit each other or would give weights that are no numbers."""
    num_experts, num_words = len(fields["ids"]), len(fields["vocabulary"])
    centroids_ND, components_VD = arrays["centroids"], arrays["components"]
    if not (num_experts == len(shares_N) == len(centroids_ND) and centroids_ND.ndim == components_VD.ndim == 2):
        raise ValueError("ids, shares and centroids differ in number")
    if not num_words == len(fields["idf"]) == len(components_VD) or centroids_ND.shape[1] != components_VD.shape[1]:
        raise ValueError("vocabulary, idf, components and centroids differ in size")
    temperature = float(fields["temperature"])
    if not (np.isfinite(temperature) and temperature > 0 and np.isfinite(shares_N).all() and shares_N.sum() > 0):
        raise ValueError("temperature and shares must be finite, and above zero")
    if (far := fields.get("far")) is not None:
        if len(far) != len(FAR_CHARS) or not all(0 <= float(limit) < np.inf for limit in far):
            raise ValueError(f"far must be {len(FAR_CHARS)} finite squared distances")
    if not all(np.isfinite(array).all() for array in (centroids_ND, components_VD, np.array(fields["idf"]))):
        raise ValueError("idf, components and centroids must be finite")
    _check_head(arrays, centroids_ND)


def _check_head(arrays: dict[str, NDArray[Any]], centroids_ND: NDArray[Any]) -> None:
    """ValueError where a head is there in part, or does not fit the centroids."""
    matrix_ND, bias_N = (arrays.get(name) for name in ("head.matrix", "head.bias"))
    if matrix_ND is None and bias_N is None:
        return
    if matrix_ND is None or bias_N is None:
        raise ValueError("head.matrix and head.bias go together")
    num_known = len(bias_N) if bias_N.ndim == 1 else 0
    if not 0 < num_known <= len(centroids_ND) or matrix_ND.shape != (num_known, centroids_ND.shape[1]):
        raise ValueError("head and centroids differ in size")
    if not (np.isfinite(matrix_ND).all() and np.isfinite(bias_N).all()):
        raise ValueError("the head must be finite")


def top_k(weight_N: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """The k largest weights made to sum to 1, all others exactly 0; of equal ones the first is kept.

    With leading dimensions (weight_TN) each row for itself.
    """
    kept = np.argsort(-weight_N, axis=-1, kind="stable")[..., :k]
    largest = np.take_along_axis(weight_N, kept, axis=-1)
    result_N = np.zeros_like(weight_N)
    np.put_along_axis(result_N, kept, largest / largest.sum(axis=-1, keepdims=True), axis=-1)
    return result_N
