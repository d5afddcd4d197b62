"""`corpus build` without Ray: the same stages in one process, the slow way that the job is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus.documents import LEAN, choose_sample, judge, read_documents
from pipelines.corpus.publish import CorpusWriter, building
from pipelines.corpus.sources import list_sources
from pipelines.corpus.tokens import SHARD_BYTES, find_tokenizer, make_tokenizer, tokenize
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
    recipe = corpus_recipe(*sources, **fields)
    listing = list_sources(recipe.sources, near=near, root=root)
    table = pa.concat_tables(read_documents(list(enumerate(listing.units)), recipe.clean))
    judged = judge(table.select(LEAN), listing.units, listing.names, recipe.clean, recipe.split)
    texts = table["text"].to_pylist()
    if isinstance(recipe.tokenizer, str):
        tokenizer = find_tokenizer(recipe.tokenizer, root=root, near=near)
    else:
        sample = np.flatnonzero(choose_sample(judged, recipe.tokenizer.sample_bytes))
        text_bytes = int(judged.num_bytes[judged.split == 0].sum())
        tokenizer = make_tokenizer(recipe.tokenizer, text_bytes, (texts[row] for row in sample))
    with building(root) as folder:
        writer = CorpusWriter(folder, listing, judged, tokenizer, shard_bytes)
        kept = ((row, texts[row]) for row in np.flatnonzero(judged.split >= 0).tolist())
        for batch in tokenize(kept, tokenizer, recipe.clean.max_document_bytes):
            for row in batch:
                writer.add(*row)
        return writer.publish(recipe, root, {})


def texts_of(corpus: Corpus) -> list[str]:
    """The documents' texts, decoded from their tokens, in corpus order."""
    return [corpus.document_text(row) for row in range(corpus.documents.num_rows)]
