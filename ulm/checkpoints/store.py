"""Checkpoints on disk: saved whole or not at all, found by path, run or name, verified when read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ulm import artefacts, registry, runtime
from ulm.checkpoints.manifest import (
    OPTIMIZER,
    REMEDY,
    SPEC,
    STATE,
    WEIGHTS,
    CheckpointManifest,
    read_manifest,
    verify,
    write_manifest,
)
from ulm.errors import ArtefactError, ConfigError
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import FILES as TOKENIZER_FILES
from ulm.tokenizers.tokenizer import Tokenizer

_STEP = re.compile(r"step-(\d{8,})")


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after `step` updates."""
    return run / f"step-{step:08d}"


def whole_steps(run: Path) -> list[Path]:
    """Complete step directories of a run, oldest first. A half-written one has another name and is not among them."""
    if not run.is_dir():
        return []
    steps = [p for p in run.iterdir() if _STEP.fullmatch(p.name) and (p / "manifest.json").is_file()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def newest(run: Path) -> Path | None:
    """The newest complete step directory of a run."""
    return (whole_steps(run) or [None])[-1]  # type: ignore[list-item]


def resolve(text: str, *, root: Path, near: Path | None = None, place: str = "checkpoint") -> Path:
    """The step directory that a text means: its path, a run (its newest whole step) or a name under models/."""
    artefacts.check_path(text, place)
    given = Path(text)
    candidates = [*([near / given] if near else []), given, root / given, root / "runs" / given]
    for folder in (c for c in candidates if c.is_dir()):
        if (folder / "manifest.json").is_file():
            return folder.resolve()
        if (step := newest(folder)) is not None:
            return step.resolve()
    pointer = root / "models" / given
    if pointer.is_file() and (folder := artefacts.follow(pointer)).is_dir():
        return newest(folder) or folder
    if any(c.is_dir() for c in candidates):
        raise ConfigError(place, f"{text}: no complete checkpoint in this folder", "train it first")
    known = sorted({*artefacts.names(root / "models"), *(p.parent.name for p in (root / "runs").glob("*/step-*"))})
    remedy = "a step directory, a run or a name under models/; there are: " + (", ".join(known) or "none yet")
    raise ConfigError(place, f"no checkpoint {text!r}", remedy)


def save(
    model: nn.Module,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    step: int = 0,
    run: str | None = None,
    corpus_digest: str | None = None,
    init_from: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; with an optimizer and a state a run can go on from it.

    `init_from` is the digest of the checkpoint that the weights began with. An existing path is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise ArtefactError(f"{path}: exists already; give another path, or remove it first")
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    with artefacts.new_folder(path) as folder:
        artefacts.write_json(folder / SPEC, spec.model_dump(mode="json"))
        save_file(_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
        tokenizer.write(folder)
        if optimizer is not None:
            tensors, rest = _flatten(model, optimizer)
            save_file(tensors, folder / OPTIMIZER, metadata={"format": "pt"})
            artefacts.write_json(folder / STATE, {**(state or {}), "optimizer": rest})
        write_manifest(
            folder,
            run=run,
            step=step,
            spec_digest=spec_digest(spec),
            tokenizer_digest=tokenizer.digest,
            corpus_digest=corpus_digest,
            init_from=init_from,
        )
    return path


def load(path: str | Path, device: str | torch.device | None = None) -> tuple[nn.Module, Tokenizer]:
    """Model (in evaluation mode, on the CPU unless `device` says otherwise) and tokenizer of a checkpoint."""
    folder = resolve(str(path), root=runtime.root())
    spec, manifest = read_spec(folder), read_manifest(folder)
    verify(folder, manifest, *TOKENIZER_FILES)
    model: nn.Module = registry.find("model", spec.model)(spec)
    load_weights(model, folder)
    return model.to(device or "cpu").eval(), Tokenizer.read(folder)


def read_spec(folder: Path) -> ModelSpec:
    """The verified spec of a checkpoint."""
    verify(folder, read_manifest(folder), SPEC)
    try:
        fields = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{folder / SPEC}: not a readable spec: {error}") from None
    return ModelSpec.parse(fields)


def spec_digest(spec: ModelSpec) -> str:
    """SHA-256 of a spec's values."""
    return artefacts.digest_json(spec.model_dump(mode="json"))


def load_weights(model: nn.Module, folder: Path) -> CheckpointManifest:
    """Fill a model with a checkpoint's verified weights; ArtefactError where names or shapes differ."""
    manifest = read_manifest(folder)
    verify(folder, manifest, WEIGHTS)
    stored, own = _read_tensors(folder / WEIGHTS), _tensors(model)
    for name in sorted(own.keys() | stored.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (stored, own)]
        if shapes[0] != shapes[1]:
            raise ArtefactError(f"{folder / WEIGHTS}: {name} is {shapes[0]}, the spec's model has {shapes[1]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return manifest


def load_training(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Fill model and optimizer from a training checkpoint; returns what was saved as its state."""
    manifest = load_weights(model, folder)
    verify(folder, manifest, OPTIMIZER, STATE)
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _unflatten(model, optimizer, _read_tensors(folder / OPTIMIZER), state.pop("optimizer"))
    return state


def prune(run: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` whole steps of a run, and what killed writers left; returns what is gone."""
    gone = whole_steps(run)[:-keep] if keep else []
    for folder in gone:
        hidden = folder.with_name(
            f".{folder.name}{artefacts.PARTIAL}"
        )  # never listed, even if the removal is cut short
        folder.rename(hidden)
        shutil.rmtree(hidden)
    for left in run.glob(f"*{artefacts.PARTIAL}"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return gone


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; shared ones once, under their first name."""
    names = dict(model.state_dict(keep_vars=True))
    seen: set[int] = set()
    kept = {}
    for name, tensor in names.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:  # verified, so another program wrote it
        raise ArtefactError(f"{path}: not a safetensors file: {error}; {REMEDY}") from None
    return tensors


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as tensors named `<parameter>/<key>`, and the rest as JSON values."""
    names = _names(model, optimizer)
    held = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in held["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{names[index]}/{key}"] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in held["param_groups"]]
    return tensors, {"groups": groups, "values": values}


def _unflatten(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    index = {name: number for number, name in enumerate(_names(model, optimizer))}
    held: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *rest["values"].items()]:
        parameter, _, key = name.rpartition("/")
        held.setdefault(index[parameter], {})[key] = value
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in rest["groups"]]
    optimizer.load_state_dict({"state": held, "param_groups": groups})


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's numbering."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
