"""Documents to unit vectors: tf-idf and SVD fitted on a sample of the training split (c-BTM, arXiv 2303.14177, 3.1).

Shape letters: N documents, L lengths, M snippets or passages, V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from pipelines.corpus.clustering.assign import embed_texts, first_texts, located, project_texts, unit
from pipelines.corpus.clustering.passages import Passages
from pipelines.corpus.over import Progress
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.recipes.clustering import Clustering
from ulm.swarm.embed import Embedder, words

MAX_FIT_DOCUMENTS = 20_000  # of the training split, chosen by seed


@dataclass(frozen=True)
class Sample:
    """Training documents that have a known word, and passages of them, embedded: what clusters are fitted on."""

    rows: NDArray[np.int64]  # of documents.parquet
    h_ND: NDArray[np.float64]  # unit vectors
    tokens_N: NDArray[np.int64]
    share: float  # of the training tokens that were looked at, those of documents without a known word included
    snippet_p_LMD: NDArray[np.float64]  # what the SVD sees of snippets of each length, which say what is far
    passage_h_MD: NDArray[np.float64]  # of those that a head learns from
    document_M: NDArray[np.int64]  # which of the documents each of these is from

    @classmethod
    def of(
        cls,
        embedder: Embedder,
        rows: NDArray[np.int64],
        h_ND: NDArray[np.float64],
        tokens_N: NDArray[np.int64],
        passages: Passages,
        share: float = 1.0,
    ) -> Sample:
        """Those of these documents that have a known word, with the passages cut from them that have one."""
        known_N: NDArray[np.bool_] = np.asarray(h_ND.any(axis=1))
        place_N = np.cumsum(known_N) - 1
        passage_h_MD, document_M = embed_texts(embedder, passages.texts), np.array(passages.document, dtype=np.int64)
        usable_M: NDArray[np.bool_] = np.asarray(passage_h_MD.any(axis=1)) & known_N[document_M]
        return cls(
            rows[known_N],
            h_ND[known_N],
            tokens_N[known_N],
            share,
            np.stack([project_texts(embedder, snippets) for snippets in passages.snippets]),
            passage_h_MD[usable_M],
            place_N[document_M[usable_M]],
        )


def fit_embedder(corpus: Corpus, config: Clustering, progress: Progress) -> tuple[Embedder, Sample]:
    """The transform fitted on a sample of the training documents, and those documents embedded by it."""
    train = np.flatnonzero(in_training(corpus))
    chosen = train
    if len(train) > MAX_FIT_DOCUMENTS:
        chosen = np.sort(np.random.default_rng(config.seed).choice(train, MAX_FIT_DOCUMENTS, replace=False))
    vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True, max_features=config.max_features)
    tokens_N = corpus.documents["num_tokens"].to_numpy()
    passages = Passages(tokens_N[chosen], config.seed)
    texts = _counted(first_texts(corpus, located(corpus, chosen)), len(chosen), progress)
    try:
        tf_idf_NV = vectorizer.fit_transform(passages.of(texts))
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise ConfigError("corpus", f"no words to cluster by: {error}", "clusters need text with words") from None
    num_documents, num_words = tf_idf_NV.shape
    dimensions = max(1, min(config.dimensions, num_words - 1, num_documents - 1))
    svd = TruncatedSVD(dimensions, random_state=config.seed).fit(tf_idf_NV)
    components_VD = np.ascontiguousarray(svd.components_.T, dtype=np.float32)
    vocabulary = {word: int(row) for word, row in vectorizer.vocabulary_.items()}
    embedder = Embedder(vocabulary, np.asarray(vectorizer.idf_, dtype=np.float64), components_VD)
    h_ND = unit(tf_idf_NV @ components_VD)
    share = float(tokens_N[chosen].sum() / tokens_N[train].sum())
    return embedder, Sample.of(embedder, chosen, h_ND, tokens_N[chosen], passages, share)


def _counted(texts: Iterator[str], total: int, progress: Progress) -> Iterator[str]:
    for done, text in enumerate(texts):
        if done % 1_000 == 0:
            progress("embed a sample", done, total, "")
        yield text
    progress("embed a sample", total, total, "")


def in_training(corpus: Corpus) -> NDArray[np.bool_]:
    """Which documents belong to the training split."""
    mask: NDArray[np.bool_] = pc.equal(corpus.documents["split"], "train").to_numpy()
    return mask
