"""How documents become clusters: the part of a recipe that corpora and swarms share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ulm.recipes.base import Section


class Clustering(Section):
    """tf-idf, SVD, balanced assignment (c-BTM, arXiv 2303.14177, section 3)."""

    dimensions: int = Field(100, ge=2)
    max_features: int = Field(50_000, ge=10)
    iterations: int = Field(20, ge=1)
    # What the served router goes by. linear: a classifier of short passages; centroids: their distances alone (c-BTM)
    router: Literal["linear", "centroids"] = "linear"
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False)  # of the softmax over squared distances
    min_cluster_tokens: int = Field(0, ge=0)  # training tokens; a smaller cluster is merged into its nearest
    overlap: float = Field(0.0, ge=0, le=1)  # of the documents, those nearest to a border: in both clusters
    seed: int = 0


class CorpusClustering(Clustering):
    """A clustering that is made with the corpus."""

    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # auto: the best simplified silhouette
    max_clusters: int = Field(32, ge=2)  # of auto

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.clusters != "auto" and "max_clusters" in self.model_fields_set:
            raise ValueError("max_clusters bounds clusters: auto; with a number leave it out")
        return self
