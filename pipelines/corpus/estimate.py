"""What a build will take, from a sample of its sources. Nothing is kept, Ray is not started."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.corpus.over import one_by_one
from pipelines.corpus.part import clean_part, read_texts
from pipelines.corpus.reading.unit import Unit
from pipelines.corpus.steps import Build
from pipelines.corpus.tokens import make_tokenizer, tokenize_part
from ulm import runtime
from ulm.corpus.manifest import token_dtype
from ulm.recipes.corpus import CorpusRecipe

SAMPLE_BYTES = 8_000_000  # of the sources, in units spread evenly over them
TOKENIZER_BYTES = 2_000_000  # of the sample's text that a trial tokenizer is trained on
RAY_BYTES = 700_000_000  # resident memory of Ray's own processes on a node, seen with Ray 2.60
START_S = 10.0  # that Ray and its workers take to start on a small machine
WRITE_BYTES_PER_S = 200_000_000  # copying, hashing and syncing tokens, a cautious figure for one disk


def plan(recipe: CorpusRecipe, *, root: Path, near: Path | None = None) -> dict[str, Any]:
    """Figures of a build that are known beforehand, and estimates of its time, memory and disk.

    seconds, memory_bytes (of all processes on one machine), disk_bytes (at its peak, the unfinished build included),
    documents and tokens are extrapolated by bytes from `sample_bytes` of the sources.
    """
    build = Build(recipe, root=root, near=near, over=one_by_one, progress=None)
    units = build.listing.units
    workers = recipe.workers or runtime.num_cpus()
    source_bytes = sum(unit.size for unit in units)
    chosen = _spread(units)
    sample_bytes = sum(units[n].size for n in chosen)
    scale = source_bytes / max(1, sample_bytes)
    with tempfile.TemporaryDirectory() as name:
        part, tokens = Path(name) / "part", Path(name) / "tokens"
        index = None
        if build.ngrams is not None:
            index = Path(name) / "evaluation_ngrams"
            build.ngrams.save(index)
        start = time.process_time()
        account = clean_part(
            part,
            [(n, units[n]) for n in chosen],
            recipe.sources,
            build.clean,
            chat_template=build.chat_template,
            index=index,
        )
        clean_s = time.process_time() - start
        texts = list(read_texts(part))
        text_bytes = sum(len(found.text.encode()) for found in texts)
        tokenizer, train_s = build.tokenizer, 0.0
        if tokenizer is None:
            assert not isinstance(recipe.tokenizer, str)
            few = [found.text for found in texts[: max(1, len(texts) * TOKENIZER_BYTES // max(1, text_bytes))]]
            few_bytes = sum(map(len, few))
            start = time.monotonic()
            alphabet = {character for found in texts for character in found.text}
            tokenizer = make_tokenizer(recipe.tokenizer, int(text_bytes * scale), few, alphabet)
            full = min(recipe.tokenizer.sample_bytes, text_bytes * scale)
            train_s = (time.monotonic() - start) * max(1.0, full / max(1, few_bytes))
        start = time.process_time()
        tokenize_part(tokens, texts, tokenizer)
        tokenize_s = time.process_time() - start
        part_bytes, token_bytes = _size(part), (tokens / "tokens.bin").stat().st_size
    num_tokens = int(token_bytes * scale) // token_dtype(tokenizer.vocab_size).itemsize
    return {
        "files": len({(unit.source, unit.path) for unit in units}),
        "ignored": len(build.listing.ignored),
        "source_bytes": source_bytes,
        "sample_bytes": sample_bytes,
        "workers": workers,
        "documents": int(account["documents"] * scale),
        "tokens": num_tokens,
        "seconds": round(
            START_S + (clean_s + tokenize_s) * scale / workers + train_s + token_bytes * scale / WRITE_BYTES_PER_S, 1
        ),
        "memory_bytes": RAY_BYTES + (workers + 1) * runtime.rss_bytes(),
        "disk_bytes": int((part_bytes + 2 * token_bytes) * scale),
    }


def _spread(units: list[Unit]) -> list[int]:
    """Numbers of units that lie evenly over all and come to about SAMPLE_BYTES."""
    total = sum(unit.size for unit in units)
    if total <= SAMPLE_BYTES:
        return list(range(len(units)))
    every = total / (SAMPLE_BYTES / (total / len(units)))  # bytes between two that are taken
    chosen, before, due = [], 0, 0.0
    for number, unit in enumerate(units):
        if before + unit.size > due:
            chosen.append(number)
            due += every
        before += unit.size
    return chosen


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
