"""`corpus build` without Ray: the same steps in one process, one part after another, that the job is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.corpus import assemble
from pipelines.corpus.tokens import SHARD_BYTES
from ulm.corpus.manifest import Corpus
from ulm.recipes.base import validate
from ulm.recipes.corpus import CorpusRecipe


def corpus_recipe(*sources: dict[str, Any], **fields: Any) -> CorpusRecipe:
    """A recipe with bytes for tokens, unless it says otherwise."""
    return validate(CorpusRecipe, {"name": "c", "tokenizer": {"kind": "byte"}, "sources": list(sources), **fields})


def plain_build(
    root: Path, *sources: dict[str, Any], near: Path | None = None, shard_bytes: int = SHARD_BYTES, **fields: Any
) -> Corpus:
    """The corpus of a recipe."""
    return assemble.build(corpus_recipe(*sources, **fields), root=root, near=near, shard_bytes=shard_bytes)


def texts_of(corpus: Corpus) -> list[str]:
    """The documents' texts, decoded from their tokens, in corpus order."""
    return [corpus.document_text(row) for row in range(corpus.documents.num_rows)]
