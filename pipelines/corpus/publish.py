"""The corpus folder: shards as tokens arrive, then documents.parquet, manifest, report, and its place in the root."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import ulm
from pipelines.corpus.documents import Judged
from pipelines.corpus.report import write_report
from pipelines.corpus.sources import Listing
from pipelines.corpus.tokens import SHARD_BYTES, ShardWriter
from ulm import artefacts
from ulm.corpus.manifest import DOCUMENT_COLUMNS, DOCUMENTS, SPLITS, Corpus, token_dtype
from ulm.errors import ArtefactError
from ulm.recipes.corpus import CorpusRecipe, Source
from ulm.tokenizers.tokenizer import Tokenizer


@contextmanager
def building(root: Path) -> Iterator[Path]:
    """A folder to build a corpus in, beside its later place and never listed; removed at the end."""
    corpora = root / "corpora"
    corpora.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build.", suffix=artefacts.PARTIAL, dir=corpora) as name:
        yield Path(name)


class CorpusWriter:
    """Takes documents in corpus order and makes the corpus of them."""

    def __init__(
        self, folder: Path, listing: Listing, judged: Judged, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.listing, self.judged, self.tokenizer = folder, listing, judged, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards = {split: ShardWriter(folder, split, shard_bytes) for split in SPLITS}
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("row", "id", "split", "first", "num_tokens", "num_bytes")
        }
        self._seen: Counter[str] = Counter()

    def add(self, row: int, identity: str, num_bytes: int, tokens: bytes) -> None:
        """The next document (or piece of one): the row it was read from, the digest of its text, its tokens."""
        split = int(self.judged.split[row])
        shard = self.shards[SPLITS[split]]
        self._seen[identity] += 1
        if self._seen[identity] > 1:  # the same text again, where duplicates are kept
            identity = f"{identity}-{self._seen[identity]}"
        first = shard.num_bytes // self.dtype.itemsize
        values = (row, identity, split, first, len(tokens) // self.dtype.itemsize, num_bytes)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        shard.write(tokens)

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._columns["row"])

    def publish(self, recipe: CorpusRecipe, root: Path, seconds: dict[str, float]) -> Corpus:
        """Write all that remains and move the folder to its place. An undamaged corpus of the same digest stays."""
        for shard in self.shards.values():
            shard.close()
        documents = self._documents(recipe)
        pq.write_table(documents, self.folder / DOCUMENTS, compression="zstd")
        self.tokenizer.write(self.folder)
        content = self._content(recipe, documents)
        digest = artefacts.digest_json(content)
        manifest = self._manifest(recipe, content, digest, documents, seconds)
        write_report(self.folder / "report.html", manifest)
        manifest["files"] = artefacts.digest_files(self.folder)
        place = root / "corpora" / digest
        _remove_damaged(place)
        if not place.is_dir():
            with artefacts.new_folder(place) as partial:
                for file in sorted(self.folder.iterdir()):
                    os.rename(file, partial / file.name)
                artefacts.write_json(partial / "manifest.json", manifest)
        artefacts.point(root / "corpora" / "names" / recipe.name, place)
        return Corpus.read(place, verify=False)

    def _documents(self, recipe: CorpusRecipe) -> pa.Table:
        columns, units = self._columns, self.listing.units
        rows = np.array(columns["row"], dtype=np.int64)
        unit = self.judged.rows["unit"].to_numpy()[rows]
        source = np.array([u.source for u in units], dtype=np.int32)[unit]
        names = self.listing.names
        labels = {
            "source": names,
            "domain": [s.domain or name for s, name in zip(recipe.sources, names, strict=True)],
            "licence": [s.licence for s in recipe.sources],
        }
        table = {
            "id": pa.array(columns["id"], pa.string()),
            **{key: pa.array(values, pa.string()).take(pa.array(source)) for key, values in labels.items()},
            "path": pa.array([u.path for u in units], pa.string()).take(pa.array(unit)),
            "offset": pa.array(self.judged.rows["offset"].to_numpy()[rows], pa.int64()),
            "split": pa.array(SPLITS, pa.string()).take(pa.array(columns["split"], pa.int8())),
            "first_token": pa.array(columns["first"], pa.int64()),
            "num_tokens": pa.array(columns["num_tokens"], pa.int64()),
            "num_source_tokens": pa.array(np.zeros(len(rows)), pa.int64()),
            "num_bytes": pa.array(columns["num_bytes"], pa.int64()),
        }
        return pa.table({name: table[name] for name in DOCUMENT_COLUMNS})

    def _content(self, recipe: CorpusRecipe, documents: pa.Table) -> dict[str, Any]:
        """What the digest covers: no path, time or number of workers, and no name that comes from a path."""
        units = self.judged.source_digests(self.listing.units, len(recipe.sources))
        order = documents.select(["id", "split", "num_tokens", "num_bytes"]).to_pydict()
        return {
            "sources": [
                {"content": artefacts.digest_json(digests), **_settings(source)}
                for source, digests in zip(recipe.sources, units, strict=True)
            ],
            "clean": recipe.clean.model_dump(),
            "split": recipe.split.model_dump(),
            "tokenizer": self.tokenizer.digest,
            "documents": artefacts.digest_json(order),
            "shards": self._digests(),
        }

    def _digests(self) -> dict[str, str]:
        return {name: digest for shard in self.shards.values() for name, digest in shard.digests.items()}

    def _manifest(
        self, recipe: CorpusRecipe, content: dict[str, Any], digest: str, documents: pa.Table, seconds: dict[str, float]
    ) -> dict[str, Any]:
        present = [split for split in SPLITS if self.shards[split].num_bytes or split in set(self._splits())]
        judged = self.judged
        bytes_of = {split: 0 for split in present}
        for split, size in zip(self._splits(), self._columns["num_bytes"], strict=True):
            bytes_of[split] += size
        origins = [s.path or s.dataset for s in recipe.sources]
        return {
            "format_version": artefacts.FORMAT_VERSION,
            "digest": digest,
            "name": recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": ulm.__version__,
            "workers": recipe.workers,
            "content": content,
            "sources": [
                {"name": name, "origin": origin, "domain": s.domain or name, "licence": s.licence, "weight": s.weight}
                for s, name, origin in zip(recipe.sources, self.listing.names, origins, strict=True)
            ],
            "documents": {
                "in": judged.num_in,
                "kept": self.num_documents,
                "dropped": dict(sorted(judged.dropped.items())),
            },
            "cut": {"documents": self._num_cut(), "pieces_added": self.num_documents - judged.num_kept},
            "stages": judged.stages,
            "dropped": judged.listed,
            "ignored": [
                {"source": self.listing.names[i.source], "path": i.path, "reason": i.reason}
                for i in self.listing.ignored[:1_000]
            ],
            "tokens": {split: self.shards[split].num_bytes // self.dtype.itemsize for split in present},
            "bytes": bytes_of,
            "domains": _by_domain(documents),
            "dtype": self.dtype.str,
            "shards": {split: list(self.shards[split].digests) for split in present},
            "tokenizer": {
                "digest": self.tokenizer.digest,
                "kind": self.tokenizer.kind,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        }

    def _splits(self) -> list[str]:
        return [SPLITS[split] for split in self._columns["split"]]

    def _num_cut(self) -> int:
        return sum(count > 1 for count in Counter(self._columns["row"]).values())


def _settings(source: Source) -> dict[str, Any]:
    """A source's own settings, its path aside."""
    return source.model_dump(exclude={"path", "dataset", "config"}, exclude_none=True)


def _by_domain(documents: pa.Table) -> list[dict[str, Any]]:
    sums = documents.group_by(["domain", "split"], use_threads=False).aggregate(
        [("id", "count"), ("num_tokens", "sum"), ("num_bytes", "sum")]
    )
    names = {"id_count": "documents", "num_tokens_sum": "tokens", "num_bytes_sum": "bytes"}
    return [{names.get(key, key): value for key, value in row.items()} for row in sums.to_pylist()]


def _remove_damaged(place: Path) -> None:
    """Take a corpus that does not verify out of its place, so that the same one can be built again."""
    if not place.is_dir():
        return
    try:
        Corpus.read(place)
    except ArtefactError:
        with tempfile.TemporaryDirectory(prefix="damaged.", suffix=artefacts.PARTIAL, dir=place.parent) as trash:
            os.rename(place, Path(trash) / place.name)
