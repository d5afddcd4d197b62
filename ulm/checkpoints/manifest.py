"""What a checkpoint says about itself: its files, their digests, and what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ulm import artefacts
from ulm.errors import ArtefactError

SPEC, WEIGHTS, OPTIMIZER, STATE = "spec.json", "model.safetensors", "optimizer.safetensors", "state.json"
REMEDY = "copy the checkpoint again, or remove its folder to use the one before"


class CheckpointManifest(BaseModel):
    """manifest.json of a step directory. `digest` is over the file digests, `manifest_digest` over all the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    kind: Literal["checkpoint"]
    run: str | None  # None: saved by hand or imported
    step: int
    spec_digest: str
    tokenizer_digest: str
    corpus_digest: str | None
    init_from: str | None  # digest of the checkpoint whose weights it began with
    files: dict[str, str]
    digest: str
    manifest_digest: str

    @property
    def is_training(self) -> bool:
        """Whether a run can go on from it."""
        return OPTIMIZER in self.files


def write_manifest(folder: Path, **lineage: Any) -> None:
    """Seal a folder that is being made: digests of all its files, and where they come from."""
    files = artefacts.digest_files(folder)
    sealed = {"format_version": artefacts.FORMAT_VERSION, "kind": "checkpoint", **lineage, "files": files}
    sealed["digest"] = artefacts.digest_json(files)
    sealed["manifest_digest"] = artefacts.digest_json(sealed)
    artefacts.write_json(folder / "manifest.json", CheckpointManifest(**sealed).model_dump())


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint whose files are all there; ArtefactError names what is missing or damaged."""
    path = folder / "manifest.json"
    fields = artefacts.read_manifest(folder, "checkpoint")
    try:
        manifest = CheckpointManifest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtefactError(f"{path}: not a checkpoint's manifest: {where}: {first['msg']}; {REMEDY}") from None
    rest = {key: value for key, value in fields.items() if key != "manifest_digest"}
    if artefacts.digest_json(rest) != manifest.manifest_digest:
        raise ArtefactError(f"{path}: content does not match its digest; {REMEDY}")
    for name in manifest.files:
        if "/" in name or not (folder / name).is_file():
            raise ArtefactError(f"{folder / name}: missing; {REMEDY}")
    return manifest


def verify(folder: Path, manifest: CheckpointManifest, *names: str) -> None:
    """Check the named files against their digests, before they are read."""
    for name in names:
        if name not in manifest.files:
            raise ArtefactError(f"{folder}: holds no {name}")
        if artefacts.digest_file(folder / name) != manifest.files[name]:
            raise ArtefactError(f"{folder / name}: content does not match its digest; {REMEDY}")
