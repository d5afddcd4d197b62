"""What a swarm is: its members, router and default strategy, in one verified file, swarm.json."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from ulm import artefacts
from ulm.checkpoints.manifest import read_manifest, verify
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.base import Section
from ulm.recipes.serve import Budget, MemberId
from ulm.registry import config_error
from ulm.swarm.router import Router

SEED = "seed"  # the member all experts come from; outside the router's weights
OWN_ROUTER = "router"  # the folder of a router within the swarm's own


class CheckpointEntry(Section):
    """A checkpoint by path, relative to swarm.json's folder, and digest."""

    checkpoint: str
    digest: str


class MemberEntry(CheckpointEntry):
    """One member: an expert with its cluster and that cluster's main domain, or the seed with neither."""

    cluster: int | None = Field(None, ge=0)
    domain: str | None = None


class RouterEntry(Section):
    """A clustering by path, relative to swarm.json's folder, and the digest of its router."""

    path: str
    digest: str


class RandomControl(Section):
    """The same swarm over a random clustering."""

    members: dict[MemberId, MemberEntry]
    router: RouterEntry


class Controls(Section):
    """What the swarm was compared with; none of it is a member."""

    dense: CheckpointEntry | None = None
    dense_flops: CheckpointEntry | None = None  # a larger one, of the mixture's cost per token
    random: RandomControl | None = None


class SwarmManifest(Section):
    """The content of swarm.json."""

    format_version: int
    digest: str
    members: dict[MemberId, MemberEntry] = Field(min_length=1)
    router: RouterEntry | None
    strategy: dict[str, Any]  # {kind, …}: what the model name `swarm` answers with
    budget: Budget
    tokenizer_digest: str
    corpus_digest: str
    controls: Controls

    @model_validator(mode="after")
    def _kind(self) -> Self:
        if not isinstance(self.strategy.get("kind"), str):
            raise ValueError("strategy names no kind")
        return self

    def content_digest(self) -> str:
        """SHA-256 of what the swarm is: everything but where its parts lie and the digest itself."""
        fields = _without_paths(self.model_dump(exclude={"digest"}))
        if fields["controls"]["dense_flops"] is None:  # which the first swarms did not know of
            del fields["controls"]["dense_flops"]
        return artefacts.digest_json(fields)


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_paths(inner) for key, inner in value.items() if key not in ("checkpoint", "path")}


def checkpoint_digest(folder: Path, *, read_files: bool) -> str:
    """The digest that a checkpoint's manifest states; with `read_files`, every file of it is read and checked."""
    manifest = read_manifest(folder)
    if read_files:
        verify(folder, manifest, *manifest.files)
    return manifest.digest


class Swarm:
    """A swarm on disk, opened and checked."""

    def __init__(self, folder: Path, manifest: SwarmManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.digest, self.members = manifest.digest, manifest.members

    def checkpoint(self, member: str) -> Path:
        """The step directory of a member."""
        return self.path_of(self.members[member])

    def path_of(self, entry: CheckpointEntry) -> Path:
        """The step directory of a member or control."""
        return self._path(entry.checkpoint)

    def router_folder(self) -> Path | None:
        """The clustering that routes for this swarm."""
        return self._path(self.manifest.router.path) if self.manifest.router else None

    def router(self) -> Router | None:
        """The loaded router; its `ids` are members of this swarm."""
        entry = self.manifest.router
        return self.open_router(entry) if entry else None

    def _path(self, relative: str) -> Path:
        return (self.folder / relative).resolve()

    def open_router(self, entry: RouterEntry) -> Router:
        """The router of the swarm or of a control, as recorded."""
        router = Router.load(self._path(entry.path))
        if router.digest != entry.digest:
            raise ArtefactError(f"{self._path(entry.path)}: not the router that {self.folder / 'swarm.json'} names")
        return router

    @classmethod
    def open(
        cls, text: str, *, root: Path, near: Path | None = None, place: str = "swarm", verify: bool = True
    ) -> Swarm:
        """The swarm of a name, digest or path; its members, controls and router are there and as recorded.

        `verify` False leaves out reading the weights; what loads them checks them again.
        """
        folder = artefacts.find(
            text, folder=root / "swarms", names_in=root / "swarms" / "names", what="swarm", place=place, near=near
        )
        swarm = cls(folder, _read(folder / "swarm.json"))
        swarm._check(verify)
        return swarm

    def _check(self, read_files: bool) -> None:
        named = self.folder / "swarm.json"
        manifest = self.manifest
        if manifest.content_digest() != manifest.digest:
            raise ArtefactError(f"{named}: content does not match its digest; write the swarm again")
        random = manifest.controls.random
        dense = {"dense": manifest.controls.dense, "dense_flops": manifest.controls.dense_flops}
        checkpoints: dict[str, CheckpointEntry] = {
            **{f"members.{name}": entry for name, entry in self.members.items()},
            **{f"controls.{name}": entry for name, entry in dense.items() if entry},
            **({f"controls.random.{name}": entry for name, entry in random.members.items()} if random else {}),
        }
        for where, entry in checkpoints.items():
            folder = self._path(entry.checkpoint)
            if checkpoint_digest(folder, read_files=read_files) != entry.digest:
                raise ArtefactError(f"{named}: {where}: {folder} is another checkpoint than the one recorded")
        routers = [(manifest.router, manifest.members)] + ([(random.router, random.members)] if random else [])
        for router_entry, members in routers:
            ids = () if router_entry is None else self.open_router(router_entry).ids
            unknown = sorted(set(ids) - set(members))
            if unknown:
                raise ArtefactError(f"{named}: the router weighs {unknown}, which are not members")
            wrong = [name for number, name in enumerate(ids) if members[name].cluster != number]
            if wrong:
                raise ArtefactError(f"{named}: the cluster of {wrong[0]} is not its place in the router")


def _read(path: Path) -> SwarmManifest:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path.parent}: no swarm here (swarm.json is missing)") from None
    except ValueError as error:
        raise ArtefactError(f"{path}: not readable: {error}") from None
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if found != artefacts.FORMAT_VERSION:
        raise ArtefactError(f"{path}: format_version is {found}, this version reads {artefacts.FORMAT_VERSION}")
    try:
        return SwarmManifest(**fields)
    except ValidationError as error:
        raise ArtefactError(f"{path}: {config_error(error, SwarmManifest)}") from None


class Part(NamedTuple):
    """A member to be: its step directory, its cluster, that cluster's main domain."""

    checkpoint: Path
    cluster: int | None = None
    domain: str | None = None


def _check_vocabulary(members: dict[str, Part], strategy: dict[str, Any]) -> None:
    """ConfigError where experts whose probabilities are mixed or compared have different tokenizers."""
    by = strategy.get("by", "clusterer")
    needs_one = strategy.get("kind") == "mixture" or strategy.get("margin", 0) > 0 or by != "clusterer"
    experts = {name: part for name, part in members.items() if part.cluster is not None}
    tokenizers = {name: read_manifest(part.checkpoint).tokenizer_digest for name, part in experts.items()}
    first = next(iter(tokenizers), None)
    other = next((name for name, digest in tokenizers.items() if first and digest != tokenizers[first]), None)
    if needs_one and other:
        problem = f"has another tokenizer than {first}, and strategy {strategy['kind']} needs one vocabulary"
        raise ConfigError(f"members.{other}", problem, "experts of one tokenizer, or strategy: {kind: route}")


def write_swarm(
    root: Path,
    name: str,
    *,
    members: dict[str, Part],
    router: Path | None,
    strategy: dict[str, Any],
    budget: Budget,
    tokenizer_digest: str,
    corpus_digest: str,
    dense: Path | None = None,
    dense_flops: Path | None = None,
    random: tuple[dict[str, Part], Path] | None = None,
    keep_router: bool = False,
) -> Swarm:
    """Store a swarm under swarms/<digest>/ and let `name` point to it.

    `router` is a clustering's folder, `dense` and `dense_flops` step directories, `random` that control's members and
    clustering. With `keep_router` the swarm's folder gets a copy of the router, for one that is nowhere else.
    ConfigError where the default strategy mixes members that have different tokenizers.
    """
    _check_vocabulary(members, strategy)
    swarms = root / "swarms"
    near = swarms / "digest"  # every swarm lies as deep as this

    def relative(path: Path) -> str:
        return os.path.relpath(path.resolve(), near.resolve())

    def checkpoint(path: Path) -> dict[str, str]:
        return {"checkpoint": relative(path), "digest": checkpoint_digest(path, read_files=False)}

    def entries(parts: dict[str, Part]) -> dict[str, Any]:
        return {key: checkpoint(p.checkpoint) | {"cluster": p.cluster, "domain": p.domain} for key, p in parts.items()}

    def clustering(path: Path) -> dict[str, str]:
        return {"path": relative(path), "digest": Router.load(path).digest}

    manifest = SwarmManifest(
        format_version=artefacts.FORMAT_VERSION,
        digest="",
        members=entries(members),
        router=RouterEntry(**clustering(router) | ({"path": OWN_ROUTER} if keep_router else {})) if router else None,
        strategy=strategy,
        budget=budget,
        tokenizer_digest=tokenizer_digest,
        corpus_digest=corpus_digest,
        controls=Controls.model_validate(
            {
                "dense": checkpoint(dense) if dense else None,
                "dense_flops": checkpoint(dense_flops) if dense_flops else None,
                "random": {"members": entries(random[0]), "router": clustering(random[1])} if random else None,
            }
        ),
    )
    manifest = manifest.model_copy(update={"digest": manifest.content_digest()})
    folder = swarms / manifest.digest
    if folder.is_dir():  # the same parts, perhaps elsewhere now
        if router and keep_router:
            with artefacts.new_folder(folder / OWN_ROUTER) as own:
                shutil.copytree(router, own, dirs_exist_ok=True)
        artefacts.write_json(folder / "swarm.json", manifest.model_dump())
    else:
        with artefacts.new_folder(folder) as partial:
            if router and keep_router:
                shutil.copytree(router, partial / OWN_ROUTER)
            artefacts.write_json(partial / "swarm.json", manifest.model_dump())
    artefacts.point(swarms / "names" / name, folder)
    return Swarm(folder, manifest)
