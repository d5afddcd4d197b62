"""datatrove over a folder of .jsonl shards, as one JSON line: its seconds, and the documents and tokens it kept.

`.venv-peers/bin/python _datatrove_peer.py SHARDS WORK TOKENIZER_JSON WORKERS`; corpus.py says what it is compared with.

Its fastest settings: one shard per worker, processes forked with spaCy loaded, intermediate files not compressed,
signatures of exact duplicates taken while the filtered text is written, no shuffling at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import load_word_tokenizer


def content(document) -> str:
    """What exact duplicates share: the text, blind to case and space."""
    return " ".join(document.text.casefold().split())


def main() -> None:
    """Run all stages; the time does not hold imports, ours does not hold the start of Ray."""
    shards, work, tokenizer, workers = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    load_word_tokenizer("eng").word_tokenize("Loads spaCy.")
    tasks = len(list(shards.glob("*.jsonl")))
    exact = ExactDedupConfig(content_getter=content)
    near = MinhashConfig(n_grams=5, num_buckets=18, hashes_per_bucket=7)  # as pipelines/corpus/near.py has them

    def place(name: str) -> str:
        return str(work / name)

    def run(name: str, pipeline: list, tasks: int) -> None:
        LocalPipelineExecutor(
            pipeline, tasks, min(tasks, workers), logging_dir=place(f"logs/{name}"), start_method="fork"
        ).run()

    started_s = time.monotonic()
    filtered = [
        JsonlReader(str(shards)),
        GopherQualityFilter(),
        GopherRepetitionFilter(),
        C4QualityFilter(),
        JsonlWriter(place("filtered"), compression=None),
        ExactDedupSignature(place("exact"), exact),
    ]
    run("filter", filtered, tasks)
    run("exact", [ExactFindDedups(place("exact"), place("exact_found"), exact)], 1)
    left = [JsonlReader(place("filtered")), ExactDedupFilter(place("exact_found"), exact)]
    run("signatures", [*left, MinhashDedupSignature(place("near"), near)], tasks)
    run("buckets", [MinhashDedupBuckets(place("near"), place("pairs"), config=near)], near.num_buckets)
    run("cluster", [MinhashDedupCluster(place("pairs"), place("removed"), near)], 1)
    tokens = DocumentTokenizer(place("tokens"), tokenizer, shuffle_documents=False)
    run("tokenize", [*left, MinhashDedupFilter(place("removed")), tokens], tasks)
    seconds = time.monotonic() - started_s

    kept = sum(path.stat().st_size // 8 for path in (work / "tokens").glob("*.index"))
    num_tokens = sum(path.stat().st_size // 2 for path in (work / "tokens").glob("*.ds"))
    sys.stdout.write(json.dumps({"seconds": seconds, "documents": kept, "tokens": num_tokens}) + "\n")


if __name__ == "__main__":
    main()
