"""`ulm corpus build` on Ray Data: read, clean and tokenize on all workers, judge and write in one place.

Three streaming passes: sources to cleaned documents (kept in the object store, which spills to disk), a sample of
them to the tokenizer, all kept ones to tokens, which are written in corpus order as they arrive.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines.corpus.documents import LEAN, Judged, choose_sample, judge, read_documents
from pipelines.corpus.publish import CorpusWriter, building
from pipelines.corpus.sources import Listing, Unit, list_sources, share_out
from pipelines.corpus.tokens import (
    SHARD_BYTES,
    chosen_rows,
    find_tokenizer,
    make_tokenizer,
    stored_tokenizer,
    token_table,
    tokenize,
)
from ulm import runtime
from ulm.errors import ConfigError, CorpusError, UlmError
from ulm.recipes.base import Recipe, load
from ulm.recipes.corpus import CorpusRecipe, TokenizerRecipe, TokenizerSection
from ulm.tokenizers.tokenizer import Tokenizer

Progress = Callable[[str, int, int | None], None]  # stage, done, of how many
R = TypeVar("R", bound=Recipe)
log = logging.getLogger(__name__)


def build(
    recipe: CorpusRecipe,
    *,
    root: Path,
    near: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Build a corpus on the Ray cluster that this process has joined; returns the last line of `ulm corpus build`.

    Raises ConfigError for a source that does not exist, CorpusError if no document is left.
    """
    with quiet_data(), building(root) as folder:
        tokenizer = None
        if isinstance(recipe.tokenizer, str):
            tokenizer = find_tokenizer(recipe.tokenizer, root=root, near=near)  # before the work, not after it
        documents = Documents(recipe, root=root, near=near, progress=progress)
        tokenizer = tokenizer or documents.train_tokenizer()
        tokenizer.save(root)
        writer = CorpusWriter(folder, documents.listing, documents.judged, tokenizer, shard_bytes)
        documents.tokenize_into(writer, tokenizer)
        corpus = writer.publish(recipe, root, documents.seconds)
    log.info("corpus %s: %s", recipe.name, documents.seconds)
    manifest = corpus.manifest
    return {
        "corpus": str(corpus.folder),
        "digest": corpus.digest,
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
    }


class Documents:
    """The cleaned documents of a recipe in the object store, and what becomes of each."""

    def __init__(
        self,
        recipe: CorpusRecipe | TokenizerRecipe,
        *,
        root: Path,
        near: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.recipe = recipe
        self.progress = progress or (lambda stage, done, total: None)
        self.workers = recipe.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.seconds: dict[str, float] = {}
        with self._timed("list"):
            self.listing: Listing = list_sources(recipe.sources, near=near, root=root)
        with self._timed("read and clean"):
            self._table = self._read()
        with self._timed("judge"):
            lean = self._table.select_columns(LEAN).iter_batches(batch_size=None, batch_format="pyarrow")
            rows = pa.concat_tables(list(lean))
            self.judged: Judged = judge(rows, self.listing.units, self.listing.names, recipe.clean, recipe.split)
        if not self.judged.num_kept:
            raise CorpusError(nothing_left(self.listing, self.judged))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        self.progress(stage, 0, None)
        yield
        self.seconds[stage] = time.monotonic() - start
        self.progress(stage, 1, 1)

    def _read(self) -> ray.data.Dataset:
        groups = share_out(self.listing.units, self.workers)
        self._num_tasks = min(self.workers, len(groups))  # Ray Data warns of more workers than blocks
        log.info("reading %d units in %d groups", len(self.listing.units), len(groups))
        clean = self.recipe.clean

        def read(batch: pa.Table) -> Iterator[pa.Table]:
            for group in batch["group"].to_pylist():
                yield from read_documents([(number, Unit(**unit)) for number, unit in json.loads(group)], clean)

        items = [{"group": json.dumps(group)} for group in groups]
        return self._map(ray.data.from_items(items, override_num_blocks=len(items)), read).materialize()

    def _map(self, data: ray.data.Dataset, function: Callable[[pa.Table], Any]) -> ray.data.Dataset:
        return data.map_batches(
            function,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.TaskPoolStrategy(size=self._num_tasks),
        )

    def train_tokenizer(self) -> Tokenizer:
        """The tokenizer that the recipe describes, from a sample of the train split."""
        section = self.recipe.tokenizer
        assert isinstance(section, TokenizerSection)
        with self._timed("tokenizer"):
            chosen = choose_sample(self.judged, section.sample_bytes)
            text_bytes = int(self.judged.num_bytes[self.judged.split == 0].sum())
            return make_tokenizer(section, text_bytes, (text for _, text in self._texts(chosen)))

    def _texts(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[tuple[int, str]]:
        """Row number and text of the chosen rows, in corpus order."""
        marks = ray.put((chosen, self.judged.first_row))

        def select(batch: pa.Table) -> pa.Table:
            return chosen_rows(batch, *ray.get(marks))

        for batch in self._map(self._table, select).iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from zip(batch["row"].to_pylist(), batch["text"].to_pylist(), strict=True)

    def tokenize_into(self, writer: CorpusWriter, tokenizer: Tokenizer) -> None:
        """All kept documents as tokens, handed to the writer in corpus order."""
        marks = ray.put((self.judged.split >= 0, self.judged.first_row))
        stored = ray.put((tokenizer.inner.to_str(), tokenizer.kind, tokenizer.chat_template))
        max_bytes = self.recipe.clean.max_document_bytes

        def encode(batch: pa.Table) -> Iterator[pa.Table]:
            kept = chosen_rows(batch, *ray.get(marks))
            texts = zip(kept["row"].to_pylist(), (text.as_py() for text in kept["text"]), strict=True)
            for encoded in tokenize(texts, stored_tokenizer(*ray.get(stored)), max_bytes):
                yield token_table(encoded)
            yield token_table([])

        total = self.judged.num_kept
        with self._timed("tokenize and write"):
            for batch in self._map(self._table, encode).iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in zip(
                    *(batch[name].to_pylist() for name in ("row", "id", "num_bytes", "tokens")), strict=True
                ):
                    writer.add(*row)
                self.progress("tokenize and write", writer.num_documents, total)


def nothing_left(listing: Listing, judged: Judged) -> str:
    """Why no document is left: each reason with its count, and the first few by name."""
    reasons = [f"{reason} {count}" for reason, count in sorted(judged.dropped.items())]
    if listing.ignored:
        reasons.append(f"not read {len(listing.ignored)}")
    examples = [f"{row['path']} ({row['reason']})" for row in judged.listed[:3]]
    examples += [f"{file.path} ({file.reason})" for file in listing.ignored[: 3 - len(examples)]]
    return "no document is left of the sources: " + ", ".join([*reasons, *examples] or ["they hold no files"])


@contextmanager
def quiet_data() -> Iterator[None]:
    """Ray Data in corpus order, without bars and notes of its own; its settings come back afterwards."""
    context = ray.data.DataContext.get_current()
    noisy = logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.execution_options.preserve_order, noisy.level
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order, level = before
        noisy.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """`python -m pipelines.corpus.job RECIPE [--set a.b=c]`: the exit code; as a Ray job it joins the job's cluster."""
    return run("corpus build", CorpusRecipe, build, argv)


def run(verb: str, kind: type[R], job: Callable[..., dict[str, Any]], argv: list[str] | None) -> int:
    """Load the recipe that the arguments name, run the job on Ray, write its JSON line; the exit code."""
    parser = argparse.ArgumentParser(description=f"ulm {verb}, as a Ray job")
    parser.add_argument("recipe", type=Path, help="a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        recipe = load(kind, options.recipe, options.set)
        ray.init(ignore_reinit_error=True)
        result = job(recipe, root=runtime.root(), near=options.recipe.absolute().parent)
    except UlmError as error:
        sys.stderr.write(f"ulm {verb}: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
