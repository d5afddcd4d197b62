"""What a corpus folder must be like before any of it is read: it may come from anywhere."""

from __future__ import annotations

import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ulm.errors import ArtefactError

if TYPE_CHECKING:
    import pyarrow as pa

SplitName = Literal["train", "val", "test"]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """What is read of a part of a manifest; it may come from anywhere. Other keys do no harm."""

    model_config = ConfigDict(strict=True)


class _Source(_Part):
    name: str
    origin: str
    domain: str
    licence: str
    weight: float = Field(gt=0, allow_inf_nan=False)


class _Content(_Part):
    shards: dict[str, Digest]
    sources: list[dict[str, Any]]
    clean: dict[str, Any] = {}
    split: dict[str, Any] = {}
    exclude: list[str] = []


class _Documents(_Part):
    num_in: Count = Field(alias="in")
    kept: Count


class _Stage(_Part):
    stage: str
    num_in: Count = Field(alias="in")
    out: Count
    dropped: dict[str, Count]


class _Manifest(_Part):
    digest: Digest
    name: str
    content: _Content
    tokens: dict[SplitName, Count]
    shards: dict[SplitName, list[str]]
    files: dict[str, Digest]
    sources: list[_Source]
    dtype: Literal["<u2", "<u4"]
    clean: dict[str, Any] = {}
    split: dict[str, Any] = {}
    created: str = ""
    documents: _Documents | None = None
    stages: list[_Stage] = []


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """That it has what a corpus needs, and names as shards only what `ulm corpus build` names so."""

    def refuse(key: str, problem: str) -> ArtefactError:
        return ArtefactError(f"{path}: not the manifest of a corpus: {key}: {problem}")

    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = first["msg"].partition(" or instance of ")[0]  # a class of this file says nothing to a user
        raise refuse(".".join(map(str, first["loc"])), problem) from None
    content, files = manifest["content"], manifest["files"]
    for split, names in manifest["shards"].items():
        if names != [f"{split}-{number:05d}.bin" for number in range(len(names))]:
            raise refuse(f"shards.{split}", f"{reprlib.repr(names)} are not {split}-00000.bin and so on")
    shards = [name for names in manifest["shards"].values() for name in names]
    if set(shards) != set(content["shards"]):
        raise refuse("content.shards", f"{reprlib.repr(list(content['shards']))} are not those of shards")
    for name in shards:
        if files.get(name) != content["shards"][name]:
            raise refuse(f"files.{name}", "not the digest that content.shards has")
    if len(content["sources"]) > len(manifest["sources"]):
        raise refuse("content.sources", "more than sources has")


def check_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """That the shards are files, no links, and hold as many tokens as the manifest says."""
    token_bytes = np.dtype(manifest["dtype"]).itemsize
    for split in {**manifest["tokens"], **manifest["shards"]}:
        num_bytes = 0
        for name in manifest["shards"].get(split, []):
            try:
                about = (folder / name).lstat()
            except OSError:
                problem = "missing; the artefact is incomplete, make or copy it again"
                raise ArtefactError(f"{folder / name}: {problem}") from None
            if not stat.S_ISREG(about.st_mode):
                raise ArtefactError(f"{folder / name}: not a file but a link or something else; copy the corpus again")
            if not about.st_size or about.st_size % token_bytes:
                raise ArtefactError(f"{folder / name}: {about.st_size} bytes are no shard; copy the corpus again")
            num_bytes += about.st_size
        if num_bytes != token_bytes * (stated := manifest["tokens"].get(split, 0)):
            problem = f"says {stated}, its shards hold {num_bytes // token_bytes}; copy the corpus again"
            raise ArtefactError(f"{folder / 'manifest.json'}: tokens.{split}: {problem}")


def stand_within(documents: pa.Table, num_tokens: Mapping[str, int]) -> bool:
    """Whether all documents stand whole in these splits of so many tokens, and nothing is missing in the table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    split = pc.index_in(documents["split"], value_set=pa.array(list(num_tokens), pa.string()))
    if split.null_count or any(column.null_count for column in documents.columns):
        return False
    end = np.array(list(num_tokens.values()), np.int64)[split.to_numpy()]
    first, count, of_source = (
        documents[name].to_numpy() for name in ("first_token", "num_tokens", "num_source_tokens")
    )
    inside = (first >= 0) & (of_source >= 0) & (of_source <= count) & (count <= end) & (first <= end - count)
    return bool(inside.all())
