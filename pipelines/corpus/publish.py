"""The corpus folder: shards, documents.parquet, manifest, report, and its place in the root."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import ulm
from pipelines.corpus.report.figures import write_report
from pipelines.corpus.tokens import ShardWriter
from ulm import artefacts
from ulm.corpus.manifest import DOCUMENT_COLUMNS, DOCUMENTS, SPLITS, Corpus, token_dtype
from ulm.corpus.rows import RowPlan
from ulm.errors import ArtefactError
from ulm.recipes.base import resolve_path
from ulm.recipes.corpus import Source

if TYPE_CHECKING:
    from pipelines.corpus.steps import Build

WRITE_TOKENS = 4_000_000  # of a part that are held at once
PLAN_CONTEXT_TOKENS = 256  # of the row plan whose padding a manifest states


def publish(build: Build, tokens: Sequence[Path], shard_bytes: int) -> Corpus:
    """Write the corpus of a build, and move it to its place. An undamaged corpus of the same digest stays."""
    corpora = build.root / "corpora"
    with tempfile.TemporaryDirectory(prefix="writing.", suffix=artefacts.PARTIAL, dir=corpora) as name:
        return _Publisher(build, Path(name), shard_bytes).publish(tokens)


class _Publisher:
    def __init__(self, build: Build, folder: Path, shard_bytes: int) -> None:
        assert build.tokenizer is not None
        self.build, self.folder, self.judged, self.tokenizer = build, folder, build.judged, build.tokenizer
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        base = build.base
        before: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        for split, names in (base.manifest["shards"] if base else {}).items():
            before[split] = {name: base.manifest["content"]["shards"][name] for name in names}  # type: ignore[union-attr]
        self.tokens_before = {split: base.num_tokens(split) if base else 0 for split in SPLITS}
        self.shards = {split: ShardWriter(folder, split, shard_bytes, before[split]) for split in SPLITS}

    def publish(self, tokens: Sequence[Path]) -> Corpus:
        with self.build.timed("write"):
            documents = self._write_shards(tokens)
            pq.write_table(documents, self.folder / DOCUMENTS, compression="zstd")
            self.tokenizer.write(self.folder)
        content = self._content(documents)
        digest = artefacts.digest_json(content)
        manifest = self._manifest(content, digest, documents)
        root, base = self.build.root, self.build.base
        for name in base.manifest["content"]["shards"] if base else ():
            _link(base.folder / name, self.folder / name)  # type: ignore[union-attr]
        known = self._digests()  # of shards, taken as they were written: they are not read again
        names = sorted(file.name for file in self.folder.iterdir())
        manifest["files"] = {name: known.get(name) or artefacts.digest_file(self.folder / name) for name in names}
        place = root / "corpora" / digest
        with artefacts.shared_lock(root):  # so that `ulm gc` never sees it without its name
            _remove_damaged(place)
            if not place.is_dir():
                with artefacts.new_folder(place) as partial:
                    for file in sorted(self.folder.iterdir()):
                        os.rename(file, partial / file.name)
                    manifest["padding"] = self._padding(partial, manifest)
                    write_report(partial, manifest)
                    artefacts.write_json(partial / "manifest.json", manifest)
            artefacts.point(root / "corpora" / "names" / self.build.recipe.name, place)
        return Corpus.read(place, verify=False)

    def _write_shards(self, parts: Sequence[Path]) -> pa.Table:
        """All tokens in corpus order, a split at a time of each part; the table of documents."""
        judged, before = self.judged, self.build._documents_before
        counts = [np.load(part / "counts.npy") for part in parts]
        refused = np.zeros(len(judged.alive), np.bool_)
        for number, found in enumerate(counts):
            alive = np.flatnonzero(judged.alive[before[number] : before[number + 1]]) + before[number]
            refused[alive[found[:, 0] < 0]] = True
        for number, part in enumerate(parts):
            chosen = judged.alive[before[number] : before[number + 1]]
            split = judged.split[before[number] : before[number + 1]][chosen]
            num_tokens = np.maximum(counts[number][:, 0], 0)
            ends = np.cumsum(num_tokens)
            with (part / "tokens.bin").open("rb") as file:
                for first, last in _runs(ends):
                    size = int(ends[last - 1] - (ends[first - 1] if first else 0))
                    tokens = np.fromfile(file, self.dtype, size)
                    of_token = np.repeat(split[first:last], num_tokens[first:last])
                    for value in np.unique(of_token).tolist():
                        self.shards[SPLITS[value]].write(tokens[of_token == value].tobytes())
        for shard in self.shards.values():
            shard.close()
        if refused.any():
            judged.drop_untokenized(refused)
        all_counts = np.concatenate(counts) if counts else np.zeros((0, 2), np.int64)
        return self._documents(all_counts[all_counts[:, 0] >= 0])

    def _documents(self, counts: NDArray[np.int64]) -> pa.Table:
        judged, units, sources = self.judged, self.build.listing.units, self.build.recipe.sources
        kept = np.flatnonzero(judged.alive)
        rows = judged.row_of[kept]
        unit = judged.rows["unit"].to_numpy()[rows]
        source = np.array([u.source for u in units], dtype=np.int32)[unit]
        split = judged.split[kept]
        first = np.zeros(len(kept), np.int64)
        for number, name in enumerate(SPLITS):
            mine = split == number
            first[mine] = self.tokens_before[name] + np.cumsum(counts[mine, 0]) - counts[mine, 0]
        names = self.build.listing.names
        labels = {
            "source": names,
            "domain": [s.domain or name for s, name in zip(sources, names, strict=True)],
            "licence": [s.licence for s in sources],
        }
        base = self.build.base
        earlier = set(base.documents["id"].to_pylist()) if base else set()
        table = {
            "id": pa.array(_distinct([judged.ids[d] for d in kept], earlier), pa.string()),
            **{key: pa.array(values, pa.string()).take(pa.array(source)) for key, values in labels.items()},
            "path": pa.array([u.path for u in units], pa.string()).take(pa.array(unit)),
            "offset": pa.array(judged.rows["offset"].to_numpy()[rows], pa.int64()),
            "split": pa.array(SPLITS, pa.string()).take(pa.array(split)),
            "first_token": pa.array(first),
            "num_tokens": pa.array(counts[:, 0]),
            "num_source_tokens": pa.array(counts[:, 1]),
            "num_bytes": pa.array(judged.num_bytes[kept]),
        }
        documents = pa.table({name: table[name] for name in DOCUMENT_COLUMNS})
        if base is None:
            return documents
        return pa.concat_tables([base.documents.cast(documents.schema), documents]).combine_chunks()

    def _content(self, documents: pa.Table) -> dict[str, Any]:
        """What the digest covers: no path, time or number of workers, and no name that comes from a path."""
        build, recipe = self.build, self.build.recipe
        order = documents.select(["id", "split", "num_tokens", "num_bytes"]).to_pydict()
        content: dict[str, Any] = {
            "sources": [
                {"content": artefacts.digest_json(digests), **_settings(source)}
                for source, digests in zip(recipe.sources, self.judged.source_digests(), strict=True)
            ],
            "clean": _clean(build),
            "split": build.split.model_dump(),
            "exclude": sorted({*recipe.exclude, *build.inherited_exclude()}),
            "tokenizer": self.tokenizer.digest,
            "documents": artefacts.digest_json(order),
            "shards": self._digests(),
        }
        if build.base is not None:
            content["base"] = build.base.digest
        as_read: dict[str, Any] = json.loads(
            json.dumps(content)
        )  # what the digest will be compared with: keys are text
        return as_read

    def _digests(self) -> dict[str, str]:
        return {name: digest for shard in self.shards.values() for name, digest in shard.digests.items()}

    def _manifest(self, content: dict[str, Any], digest: str, documents: pa.Table) -> dict[str, Any]:
        build, judged, recipe, base = self.build, self.judged, self.build.recipe, self.build.base
        present = [split for split in SPLITS if split in set(documents["split"].unique().to_pylist())]
        origins = [s.path or s.dataset for s in recipe.sources]
        sources = [
            {
                "name": name,
                "origin": origin,
                "domain": s.domain or name,
                "licence": s.licence,
                "weight": s.weight,
                "documents": documents_of,
            }
            for s, name, origin, documents_of in zip(
                recipe.sources, build.listing.names, origins, judged.by_source(), strict=True
            )
        ]
        num_base = base.documents.num_rows if base else 0
        by_domain = _by_domain(documents)
        return {
            "format_version": artefacts.FORMAT_VERSION,
            "digest": digest,
            "name": recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": ulm.__version__,
            "workers": recipe.workers,
            "base": {"digest": base.digest, "name": base.name, "documents": num_base} if base else None,
            "content": content,
            "clean": _clean_settings(build),
            "split": build.split.model_dump(),
            "sources": [*(base.manifest["sources"] if base else ()), *sources],
            "documents": {
                "in": num_base + judged.num_in,
                "kept": documents.num_rows,
                "dropped": judged.dropped(),
            },
            "cut": self._cut(),
            "stages": judged.stages(),
            "samples": judged.samples,
            "near_duplicates": judged.near,
            "dropped": judged.listed(),
            "ignored": [
                {"source": build.listing.names[i.source], "path": i.path, "reason": i.reason}
                for i in build.listing.ignored[:1_000]
            ],
            "ignored_by_reason": dict(
                sorted(Counter(re.split(":| as ", i.reason)[0] for i in build.listing.ignored).items())
            ),
            "tokens": {s: sum(d["tokens"] for d in by_domain if d["split"] == s) for s in present},
            "bytes": {s: sum(d["bytes"] for d in by_domain if d["split"] == s) for s in present},
            "domains": by_domain,
            "dtype": self.dtype.str,
            "shards": {split: list(self.shards[split].digests) for split in present},
            "tokenizer": {
                "digest": self.tokenizer.digest,
                "kind": self.tokenizer.kind,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "seconds": {stage: round(value, 3) for stage, value in build.seconds.items()},
            "cpu_seconds": {stage: round(value, 3) for stage, value in build.cpu_seconds.items()},
        }

    def _cut(self) -> dict[str, int]:
        """Documents that were cut, and how many documents there are more for it."""
        piece = self.judged.rows["piece"].to_numpy()[self.judged.row_of]
        return {"documents": int((piece == 1).sum()), "pieces_added": int((piece > 0).sum())}

    def _padding(self, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """The share of padding in the training rows of one stated context."""
        split = "train" if "train" in manifest["tokens"] else next(iter(manifest["tokens"]))
        plan = RowPlan.make(Corpus(folder, manifest), split, context_tokens=PLAN_CONTEXT_TOKENS)
        return {"context_tokens": PLAN_CONTEXT_TOKENS, "split": split, "share": round(plan.padding_share, 6)}


def _runs(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of documents, first and end, of about WRITE_TOKENS; `ends` counts tokens up to the end of each document."""
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + WRITE_TOKENS, side="right")))
        yield first, last
        first = last


def _distinct(ids: list[str], earlier: set[str]) -> list[str]:
    """The ids, numbered where the same text stands more than once because duplicates are kept."""
    if len(set(ids)) == len(ids) and not earlier.intersection(ids):
        return ids
    seen = Counter(earlier)
    found = []
    for identity in ids:
        name = identity
        while name in seen:
            seen[identity] += 1
            name = f"{identity}-{seen[identity]}"
        seen[name] += 1
        found.append(name)
    return found


def _settings(source: Source) -> dict[str, Any]:
    """A source's own settings, its path aside."""
    return source.model_dump(exclude={"path", "dataset", "config"}, exclude_none=True)


def _clean(build: Build) -> dict[str, Any]:
    """The settings of cleaning; of evaluation sets their content instead of their paths."""
    settings = build.clean.model_dump()
    if build.ngrams is not None:
        settings["decontamination"] = {**settings["decontamination"], "ngrams": build.ngrams.digest}
        del settings["decontamination"]["sets"]
    return settings


def _clean_settings(build: Build) -> dict[str, Any]:
    """The settings of cleaning as another recipe can take them over: with whole paths."""
    settings = build.clean.model_dump(mode="json")
    for number, evaluation in enumerate((settings["decontamination"] or {}).get("sets", ())):
        place = f"clean.decontamination.sets.{number}.path"
        path = resolve_path(evaluation["path"], near=build.near, root=build.root, place=place)
        evaluation["path"] = str(path.absolute())
    return settings


def _by_domain(documents: pa.Table) -> list[dict[str, Any]]:
    sums = documents.group_by(["domain", "split"], use_threads=False).aggregate(
        [("id", "count"), ("num_tokens", "sum"), ("num_bytes", "sum")]
    )
    names = {"id_count": "documents", "num_tokens_sum": "tokens", "num_bytes_sum": "bytes"}
    return [{names.get(key, key): value for key, value in row.items()} for row in sums.to_pylist()]


def _link(source: Path, place: Path) -> None:
    """The same file a second time: a link where the disk can, else a copy."""
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        with source.open("rb") as content, place.open("xb") as copy:  # never over a file that is there
            shutil.copyfileobj(content, copy)


def _remove_damaged(place: Path) -> None:
    """Take a corpus that does not verify out of its place, so that the same one can be built again."""
    if not place.is_dir():
        return
    try:
        Corpus.read(place)
    except ArtefactError:
        with tempfile.TemporaryDirectory(prefix="damaged.", suffix=artefacts.PARTIAL, dir=place.parent) as trash:
            os.rename(place, Path(trash) / place.name)
