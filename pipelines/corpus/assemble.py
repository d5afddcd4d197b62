"""A corpus from its sources, step by step (steps.py).

What is done per part goes through `over`: here one after another, on a cluster side by side (job.py); the corpus is
the same.

    list → read and clean → judge (exact duplicates, near duplicates, splits) → tokenizer → tokenize → write
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.corpus import work
from pipelines.corpus.domains import cluster_after_build
from pipelines.corpus.over import Over, Progress, one_by_one
from pipelines.corpus.publish import publish
from pipelines.corpus.report.figures import write_report
from pipelines.corpus.steps import Build, fault
from pipelines.corpus.tokens import SHARD_BYTES
from ulm.corpus.manifest import Corpus
from ulm.errors import CorpusError
from ulm.recipes.corpus import CorpusRecipe, ExtendRecipe, TokenizerRecipe
from ulm.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def build(
    recipe: CorpusRecipe | ExtendRecipe,
    *,
    root: Path,
    near: Path | None = None,
    over: Over = one_by_one,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Corpus:
    """The corpus of a recipe, built now, or gone on with where an earlier try was ended.

    Raises ConfigError for a source that does not exist, CorpusError if no document is left, or naming what failed.
    """
    made = Build(recipe, root=root, near=near, over=over, progress=progress)
    with _faults_named(root), work.unfinished(root, recipe.name, made.identity()) as folder:
        made.read_and_clean(folder)
        made.judge()
        tokens = made.tokenize(made.find_tokenizer())
        corpus = publish(made, tokens, shard_bytes)
        if recipe.clustering is not None:
            cluster_after_build(corpus, recipe.clustering, over=over, progress=progress)
            write_report(corpus.folder, corpus.manifest)
        work.finished(folder)
    log.info("corpus %s: %s", recipe.name, made.seconds)
    return corpus


def train_tokenizer(
    recipe: TokenizerRecipe,
    *,
    root: Path,
    near: Path | None = None,
    over: Over = one_by_one,
    progress: Progress | None = None,
) -> Tokenizer:
    """The tokenizer that `build` would make of the same sources."""
    made = Build(recipe, root=root, near=near, over=over, progress=progress)
    with _faults_named(root), work.unfinished(root, recipe.name, made.identity()) as folder:
        made.read_and_clean(folder)
        made.judge()
        tokenizer = made.find_tokenizer()
        work.finished(folder)
    return tokenizer


@contextmanager
def _faults_named(root: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written to as an error that names it."""
    try:
        yield
    except OSError as error:
        raise CorpusError(fault(error, root)) from error
