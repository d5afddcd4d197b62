"""Hugging Face datasets as sources: a hub id, or a local folder that `datasets` loads like one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.corpus.reading.places import first_line
from pipelines.corpus.reading.streams import UnusableError
from pipelines.corpus.reading.tables import VALUE_ERRORS, Row, columns_of
from pipelines.corpus.reading.unit import Unit
from pipelines.corpus.split import named_split
from ulm.corpus.manifest import SPLITS
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import resolve_path
from ulm.recipes.corpus import Source

# The parts that a dataset is read in. They are in the corpus digest: a change makes new digests.
PART_ROWS = 10_000
SHARD_BYTES = 4 << 20  # what a streamed shard counts as, whose size is not known before it is read
BATCH_ROWS = 100


def list_dataset(number: int, source: Source, place: str, *, near: Path | None, root: Path) -> list[Unit]:
    """Units of a dataset, in the order train, val, test, others. Raises ConfigError where it cannot be loaded.

    The dataset's own splits are kept; but one that has `train` alone, as any heap of files has by default, is split
    by hash unless the recipe names that split.
    """
    assert source.dataset is not None
    for name in ("format", "encoding", "columns"):
        if getattr(source, name) is not None:
            raise ConfigError(f"{place}.{name}", "belongs to a path, a dataset knows its own", "leave it out")
    if source.document == "file":
        raise ConfigError(f"{place}.document", "'file' does not fit a dataset", "record, line or paragraph")
    local = resolve_path(source.dataset, near=near, root=root, place=f"{place}.dataset")
    name = str(local.resolve()) if local.exists() else source.dataset
    try:
        loaded = _load(name, source.config, source.split, source.streaming)
    except UnusableError as fault:
        remedy = (
            "a folder of jsonl, parquet, csv or text files; check config and split"
            if local.exists()
            else "a hub id needs the network; offline, a folder of jsonl, parquet, csv or text files does"
        )
        raise ConfigError(f"{place}.dataset", str(fault), remedy) from None
    splits = loaded if source.split is None else {source.split: loaded}
    alone = source.split is None and len(splits) == 1
    units: list[Unit] = []
    for split in sorted(splits, key=lambda split: (_rank(split), split)):
        _check_columns(splits[split], source, place)
        own = None if alone else named_split(split.split("[")[0])
        whole = Unit(number, split, name, "dataset", split=own, dataset_split=split)
        units += _shards(whole, splits[split], source) if source.streaming else _row_parts(whole, splits[split], source)
    return units


def dataset_rows(unit: Unit, source: Source) -> Iterator[Row]:
    """(row number, 0, row) of a unit. Raises UnusableError."""
    assert unit.dataset_split is not None and unit.end is not None
    columns = columns_of(source)
    with _faults("unreadable: "):
        rows = _loaded(unit.file, source.config, unit.dataset_split, source.streaming, unit.version)
        if not source.streaming:
            rows = rows.select_columns(columns)
            for start in range(unit.start, unit.end, BATCH_ROWS):
                batch = rows[start : min(start + BATCH_ROWS, unit.end)]
                for number, values in enumerate(zip(*(batch[column] for column in columns), strict=True), start):
                    yield number, 0, dict(zip(columns, values, strict=True))
            return
        rows = rows.take(source.max_rows) if source.max_rows else rows.shard(unit.end, unit.start)
        for number, row in enumerate(rows):
            yield number, 0, {column: row[column] for column in columns if column in row}


def _row_parts(whole: Unit, rows: Any, source: Source) -> list[Unit]:
    num_rows = min(len(rows), source.max_rows or len(rows))
    row_bytes = rows.data.nbytes // max(len(rows), 1)
    version = rows._fingerprint  # changes with the data; there is no public name for it
    parts = []
    for start in range(0, num_rows, PART_ROWS):
        end = min(start + PART_ROWS, num_rows)
        parts.append(replace(whole, start=start, end=end, row=start, size=(end - start) * row_bytes, version=version))
    return parts


def _shards(whole: Unit, rows: Any, source: Source) -> list[Unit]:
    """A unit per shard; the first so many rows are the first shards' and come in one unit."""
    num = 1 if source.max_rows else rows.num_shards
    paths = [whole.path] if num == 1 else [f"{whole.path}-{shard:05d}-of-{num:05d}" for shard in range(num)]
    return [replace(whole, path=path, start=n, end=num, size=SHARD_BYTES) for n, path in enumerate(paths)]


def _check_columns(rows: Any, source: Source, place: str) -> None:
    known = rows.column_names or list(next(iter(rows), {}))  # some streams only say so by their first row
    fields = ("source", "target") if source.is_pair else ("messages" if source.messages else "text",)
    for field, column in zip(fields, columns_of(source), strict=True):
        if column not in known:
            problem = f"{source.dataset} has no column {column!r}"
            raise ConfigError(f"{place}.{field}", problem, did_you_mean(column, known))


def _rank(split: str) -> int:
    own = named_split(split)
    return len(SPLITS) if own is None else SPLITS.index(own)


def _load(name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    with _faults(f"cannot load {name!r}: "):
        folder = Path(name)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # by save_to_disk
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.Dataset):
                saved = datasets.DatasetDict({str(saved.split or "train"): saved})
            if split is not None and split not in saved:
                raise ValueError(f"no split {split!r} ({did_you_mean(split, saved)})")
            if streaming:
                saved = datasets.IterableDatasetDict({key: rows.to_iterable_dataset() for key, rows in saved.items()})
            return saved if split is None else saved[split]
        return datasets.load_dataset(name, config, split=split, streaming=streaming)


@lru_cache(maxsize=8)
def _loaded(name: str, config: str | None, split: str, streaming: bool, version: str | None) -> Any:
    """A split that this process has loaded before; `version` is there so that another one is loaded anew."""
    return _load(name, config, split, streaming)


@contextmanager
def _faults(before: str) -> Iterator[None]:
    """Raises what `datasets` and its hub say as UnusableError."""
    import datasets
    import pyarrow as pa

    ours = (datasets.exceptions.DatasetsError, datasets.builder.DatasetGenerationError)
    try:
        yield
    except (*VALUE_ERRORS, *ours, pa.ArrowException, OSError, ImportError) as error:
        raise UnusableError(f"{before}{first_line(error)}") from None
