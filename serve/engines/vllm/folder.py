"""What vLLM reads: a checkpoint as a Hugging Face folder, exported once for each dtype and kept in the root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import WEIGHTS, read_manifest
from ulm.errors import UnsupportedError
from ulm.exchange.hf import export_hf, fitting
from ulm.exchange.own import export_mixture, export_own, vllm_refusals
from ulm.spec import ModelSpec

# Stock architectures that vLLM 0.29 computes a little otherwise (Bloom's GELU by erf, not by tanh); ours is exact.
DRIFTING = ("BloomForCausalLM",)


def together(checkpoints: Mapping[str, Path], dtype: str, root: Path) -> Path:
    """What vLLM reads for one member, or for several that it is to mix: a folder that says where theirs are.

    UnsupportedError where vLLM cannot run one, ConfigError where their tokenizers differ.
    """
    folders = {member: exported(checkpoint, dtype, root) for member, checkpoint in checkpoints.items()}
    if len(folders) == 1:
        return next(iter(folders.values()))
    digest = artefacts.digest_json({member: folder.name for member, folder in folders.items()})
    place = root / "exports" / f"{digest}-mixture"
    if not place.is_dir():
        with artefacts.new_folder(place) as partial:
            export_mixture(folders, partial)
    return place


def exported(checkpoint: Path, dtype: str, root: Path) -> Path:
    """The folder of a checkpoint under exports/, made if it is not there; UnsupportedError where vLLM cannot run it."""
    place = root / "exports" / f"{read_manifest(checkpoint).digest}-{dtype}"
    if not place.is_dir():
        model: Any
        model, tokenizer = store.load(checkpoint)
        export: Any = export_hf if _is_stock(model.spec) else export_own
        with artefacts.new_folder(place) as partial:  # one that somebody else has made meanwhile stays
            export(model, tokenizer, partial, dtype=dtype)
    return place


def _is_stock(spec: ModelSpec) -> bool:
    """Whether vLLM runs it by a class of its own; False where by ours (models/), UnsupportedError where by none."""
    reasons = vllm_refusals(spec)
    try:
        architecture, _ = fitting(spec)
    except UnsupportedError:
        if reasons:
            raise UnsupportedError("; ".join(reasons)) from None
        return False
    return bool(reasons) or architecture.name not in DRIFTING


def dtype_of(checkpoint: Path) -> str:
    """bfloat16 where any of a checkpoint's weights is, else float32; the tensors are not read."""
    with safe_open(checkpoint / WEIGHTS, framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}
    return "bfloat16" if "BF16" in dtypes else "float32"
