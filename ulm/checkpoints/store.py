"""Checkpoints on disk: saved whole or not at all, found by path, run or name, verified when read."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
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
from ulm.errors import ArtefactError, ConfigError, did_you_mean
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import FILES as TOKENIZER_FILES
from ulm.tokenizers.tokenizer import Tokenizer

_STEP = re.compile(r"step-(\d{8,})")
RAW = "/raw"  # after a parameter's name in optimizer.safetensors: the weight, where the checkpoint serves an average


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after `step` updates."""
    return run / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a step directory is named after."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run: Path) -> list[Path]:
    """Step directories of a run, oldest first. A half-written one has another name and is not among them."""
    if not run.is_dir():
        return []
    return sorted((p for p in run.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()), key=step_of)


def whole_steps(run: Path) -> list[Path]:
    """Those of the `step_folders` that have a manifest: all, unless someone has been at them."""
    return [p for p in step_folders(run) if (p / "manifest.json").is_file()]


def newest(run: Path) -> Path | None:
    """The newest complete step directory of a run."""
    return (whole_steps(run) or [None])[-1]  # type: ignore[list-item]


def resolve(text: str, *, root: Path, near: Path | None = None, place: str = "checkpoint") -> Path:
    """The step directory that a text means: its path, a name under models/ or a run (its newest whole step).

    A run that has ended has its name under models/ too, which may mean its best step.
    """
    artefacts.check_path(text, place)
    given = Path(text)
    candidates = [*([near / given] if near else []), given, root / given]
    if (pointer := root / "models" / given).is_file():
        candidates.append(artefacts.follow(pointer))
    candidates.append(root / "runs" / given)
    for folder in (c for c in candidates if c.is_dir()):
        if (folder / "manifest.json").is_file():
            return folder.resolve()
        if (step := newest(folder)) is not None:
            return step.resolve()
    if any(c.is_dir() for c in candidates):
        raise ConfigError(place, f"{text}: no complete checkpoint in this folder", "train it first")
    if (swarm := root / "swarms" / "names" / given).is_file():
        remedy = f"one of its members' runs, as `ulm swarm show {text}` lists them"
        raise ConfigError(place, f"{swarm.name} is a swarm, not one checkpoint", remedy)
    known = sorted({*artefacts.names(root / "models"), *(p.parent.name for p in (root / "runs").glob("*/step-*"))})
    remedy = f"a step directory, a run or a name under models/; {did_you_mean(text, known or ['none yet'])}"
    raise ConfigError(place, f"no checkpoint {text!r}", remedy)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, in memory: training may change its model while this is written."""

    spec: ModelSpec
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    training: dict[str, Tensor] | None  # of the optimizer, and RAW weights
    state: dict[str, Any] | None
    lineage: dict[str, Any]  # step, run, corpus_digest, init_from

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, which is nearly all that it takes on disk."""
        return sum(t.numel() * t.element_size() for part in (self.weights, self.training or {}) for t in part.values())


def snapshot(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    step: int = 0,
    run: str | None = None,
    corpus_digest: str | None = None,
    init_from: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    average: dict[str, Tensor] | None = None,
    copy: bool = True,
) -> Snapshot:
    """A model as it is now; with an optimizer and a state a run can go on from it.

    `init_from` is the digest of the checkpoint that the weights began with. `average` (as `tensors` names them) is
    what the checkpoint serves in place of the weights, which it then keeps beside the optimizer. `copy` False shares
    memory with the model, for a caller that writes it at once.
    """
    weights, training = tensors(model), None
    if optimizer is not None:
        training, rest = _flatten(model, optimizer)
        state = {**(state or {}), "optimizer": rest}
        if average is not None:
            training |= {name + RAW: weights[name] for name in average}
    lineage = {"step": step, "run": run, "corpus_digest": corpus_digest, "init_from": init_from}
    kept = [weights if average is None else {**weights, **average}, training]
    if copy:
        kept = [held and {name: t.to("cpu", copy=True) for name, t in held.items()} for held in kept]
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    return Snapshot(spec, tokenizer, kept[0] or {}, kept[1], state if optimizer is not None else None, lineage)


def write(taken: Snapshot, path: Path) -> Path:
    """Write a checkpoint folder, whole or not at all. An existing path is never overwritten."""
    if path.exists():
        raise ArtefactError(f"{path}: exists already; give another path, or remove it first")
    with artefacts.new_folder(path) as folder:
        artefacts.write_json(folder / SPEC, taken.spec.model_dump(mode="json"))
        save_file(taken.weights, folder / WEIGHTS, metadata={"format": "pt"})
        taken.tokenizer.write(folder)
        if taken.training is not None:
            save_file(taken.training, folder / OPTIMIZER, metadata={"format": "pt"})
            artefacts.write_json(folder / STATE, taken.state)
        digests = {"spec_digest": spec_digest(taken.spec), "tokenizer_digest": taken.tokenizer.digest}
        write_manifest(folder, **taken.lineage, **digests)
    return path


def save(model: nn.Module, tokenizer: Tokenizer, path: str | Path, **how: Any) -> Path:
    """Write a model's checkpoint folder, whole or not at all; keyword arguments as `snapshot` has them."""
    return write(snapshot(model, tokenizer, copy=False, **how), Path(path))


def load(path: str | Path, device: str | torch.device | None = None) -> tuple[nn.Module, Tokenizer]:
    """Model (in evaluation mode, on the CPU unless `device` says otherwise) and tokenizer of a checkpoint."""
    folder = resolve(str(path), root=runtime.root())
    spec = read_spec(folder)
    model: nn.Module = registry.find("model", spec.model)(spec)
    load_weights(model, folder)
    return model.to(device or "cpu").eval(), read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The verified tokenizer of a checkpoint."""
    verify(folder, read_manifest(folder), *TOKENIZER_FILES)
    return Tokenizer.read(folder)


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
    stored, own = _read_tensors(folder / WEIGHTS), tensors(model)
    check_weights(folder, stored, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return manifest


def check_weights(folder: Path, stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """ArtefactError where the names or shapes of a checkpoint's weights are not those of its spec's model."""
    for name in sorted(own.keys() | stored.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (stored, own)]
        if shapes[0] != shapes[1]:
            raise ArtefactError(f"{folder / WEIGHTS}: {name} is {shapes[0]}, the spec's model has {shapes[1]}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The verified weights of a checkpoint by name."""
    verify(folder, read_manifest(folder), WEIGHTS)
    return _read_tensors(folder / WEIGHTS)


def load_training(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Fill model and optimizer from a training checkpoint; returns what was saved as its state.

    The model gets the weights that training goes on from; those that the checkpoint serves may be their average.
    """
    verify(folder, load_weights(model, folder), OPTIMIZER, STATE)
    state = read_state(folder)
    stored = _read_tensors(folder / OPTIMIZER)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            if (raw := stored.pop(name + RAW, None)) is not None:
                tensor.copy_(raw)
    _unflatten(model, optimizer, stored, state.pop("optimizer"))
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """What a training checkpoint says of its run: step, cursor, val_loss and more; {} for one that is not."""
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a readable state: {error}; {REMEDY}") from None
    if not isinstance(state, dict):
        raise ArtefactError(f"{path}: not a readable state: no object; {REMEDY}")
    return state


def best(run: Path) -> list[Path]:
    """Whole steps of a run that were saved with an evaluation, the lowest val_loss first.

    Where the run's corpus has grown or eval_tokens has changed, only those since: others are of another text.
    """
    states = []
    for path in whole_steps(run):
        with suppress(ArtefactError):  # a damaged one is no reason to stop; it is said when a run would go on from it
            states.append((read_state(path), path))
    text = states[-1][0] if states else {}
    same = [(s, path) for s, path in states if all(s.get(key) == text.get(key) for key in ("legs", "eval_tokens"))]
    scored = [(s["val_loss"], path) for s, path in same if "val_loss" in s]
    return [path for _, path in sorted(scored)]


def check(folder: Path) -> None:
    """Read all of a checkpoint and compare digests; ArtefactError names the file that is missing or damaged."""
    manifest = read_manifest(folder)
    verify(folder, manifest, *manifest.files)


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint off the list of its run, and keep it for who wants to look."""
    aside = folder.with_name(f"{folder.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)


def remove(folder: Path) -> None:
    """Remove a checkpoint; a removal that is cut short leaves nothing that is listed."""
    hidden = folder.with_name(f".{folder.name}{artefacts.PARTIAL}")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def prune(run: Path, keep: int, keep_best: int = 0) -> list[Path]:
    """Remove whole steps of a run but the newest `keep` and the best `keep_best`, and what killed writers left."""
    kept = {*whole_steps(run)[-keep:], *best(run)[:keep_best]} if keep else set(whole_steps(run))
    gone = [folder for folder in whole_steps(run) if folder not in kept]
    for folder in gone:
        remove(folder)
    for left in run.glob(f"*step-*{artefacts.PARTIAL}"):  # other files may be in the making, by other threads
        shutil.rmtree(left)
    return gone


def tensors(model: nn.Module) -> dict[str, Tensor]:
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
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:  # verified, so another program wrote it
        raise ArtefactError(f"{path}: not a safetensors file: {error}; {REMEDY}") from None
    return found


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as tensors named `<parameter>/<key>`, and the rest as JSON values."""
    names = _names(model, optimizer)
    held = optimizer.state_dict()
    found: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in held["state"].items():
        for key, value in entries.items():
            (found if isinstance(value, Tensor) else values)[f"{names[index]}/{key}"] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in held["param_groups"]]
    return found, {"groups": groups, "values": values}


def _unflatten(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    index = {name: number for number, name in enumerate(_names(model, optimizer))}
    held: dict[int, dict[str, Any]] = {}
    for name, value in [*stored.items(), *rest["values"].items()]:
        parameter, _, key = name.rpartition("/")
        held.setdefault(index[parameter], {})[key] = value
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in rest["groups"]]
    optimizer.load_state_dict({"state": held, "param_groups": groups})


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's numbering."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
