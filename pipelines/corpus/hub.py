"""Hugging Face datasets as sources: a hub id, or a local folder that `datasets` loads like one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.corpus.sources import CHUNK_ROWS, Unit
from pipelines.corpus.split import named_split
from ulm.corpus.manifest import SPLITS
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import resolve_path
from ulm.recipes.corpus import Source


def list_dataset(number: int, source: Source, place: str, *, near: Path | None, root: Path) -> list[Unit]:
    """Units of a dataset, in the order train, val, test, others. Raises ConfigError where it cannot be loaded.

    The dataset's own splits are kept; but one that has `train` alone, as any heap of files has by default, is split
    by hash unless the recipe names that split.
    """
    assert source.dataset is not None
    if source.format is not None:
        raise ConfigError(f"{place}.format", "belongs to a path, a dataset knows its own", "leave it out")
    if source.document == "file":
        raise ConfigError(f"{place}.document", "'file' does not fit a dataset", "record, line or paragraph")
    local = resolve_path(source.dataset, near=near, root=root)
    name = str(local.resolve()) if local.exists() else source.dataset
    loaded = _load(name, source.config, source.split, place)
    splits = loaded if source.split is None else {source.split: loaded}
    alone = source.split is None and len(splits) == 1
    units = []
    for split in sorted(splits, key=lambda s: (_rank(s), s)):
        rows = splits[split]
        if source.text not in rows.column_names:
            remedy = did_you_mean(source.text, rows.column_names)
            raise ConfigError(f"{place}.text", f"{source.dataset} has no column {source.text!r}", remedy)
        own = None if alone else named_split(split.split("[")[0])
        row_bytes = rows.data.nbytes // max(len(rows), 1)
        for start in range(0, len(rows), CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, len(rows))
            units.append(
                Unit(
                    number,
                    split,
                    name,
                    "dataset",
                    source.document or "record",
                    source.text,
                    own,
                    start,
                    end,
                    start,
                    (end - start) * row_bytes,
                    source.config,
                    split,
                )  # fmt: skip
            )
    return units


def _rank(split: str) -> int:
    own = named_split(split)
    return len(SPLITS) if own is None else SPLITS.index(own)


def _load(name: str, config: str | None, split: str | None, place: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, datasets.builder.DatasetGenerationError) as error:
        problem = str(error).split("\n")[0][:300]
        remedy = "a hub id, or a folder of jsonl, parquet, csv or text files; check config and split"
        raise ConfigError(f"{place}.dataset", f"cannot load {name!r}: {problem}", remedy) from None


@lru_cache(maxsize=8)
def _loaded(name: str, config: str | None, split: str) -> Any:
    return _load(name, config, split, "dataset")


def dataset_rows(unit: Unit) -> Iterator[tuple[int, int, Any]]:
    """(row number, 0, row) of a unit; each node loads the dataset once and shares the memory-mapped copy."""
    assert unit.dataset_split is not None and unit.end is not None
    rows = _loaded(unit.file, unit.config, unit.dataset_split).select_columns([unit.text])
    for number in range(unit.start, unit.end, 100):
        batch = rows[number : min(number + 100, unit.end)][unit.text]
        yield from ((number + i, 0, {unit.text: text}) for i, text in enumerate(batch))
