"""A checkpoint as what another tool opens, with its model card: one call for every format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ulm import artefacts
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError, ConfigError, UnsupportedError
from ulm.exchange.card import Format, card, facts_of
from ulm.exchange.folder import empty, writing
from ulm.exchange.gguf import export_gguf
from ulm.exchange.hf import export_hf, fitting
from ulm.exchange.own import export_own, vllm_refusals
from ulm.exchange.quantize import Change, change, quantize

HELD_OUT_BYTES = 200_000  # of text, by which what rounding costs is measured
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was made, and what is worth knowing of it."""

    path: Path
    format: Format
    architecture: str
    notes: tuple[str, ...] = ()
    change: Change | None = None  # by rounding weights to integers


def export(
    checkpoint: Path,
    target: Path | str,
    *,
    root: Path,
    to: str = "hf",
    dtype: str | None = None,
    scheme: str | None = None,
    licence: str | None = None,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder (`hf`) or a file for llama.cpp (`gguf`), whole or not at all.

    A spec that no stock architecture has becomes a folder with its own code. `scheme` (w8a8, w4a16) rounds a stock
    folder's matrices to integers. UnsupportedError with the reasons, ConfigError for options that do not go together.
    """
    model: Any
    model, tokenizer = store.load(checkpoint)
    if to == "gguf":
        if scheme is not None:
            raise ConfigError("quantize", f"{scheme} is of Hugging Face folders", "--dtype q8_0 for a file")
        with writing(Path(target)):
            path = export_gguf(model, tokenizer, target, dtype=dtype or "float16")
        return Exported(path, "gguf", fitting(model.spec)[0].name)
    if dtype == "q8_0":
        raise ConfigError("dtype", "q8_0 is of files for llama.cpp", "--to gguf, or --quantize for a folder")
    dtype, notes = dtype or "float32", []
    with writing(Path(target)):
        target = empty(target)
    kind: Format = "hf"
    try:
        architecture = fitting(model.spec)[0].name
    except UnsupportedError as no_stock:
        if scheme is not None:
            raise
        kind, architecture = "own", "UlmForCausalLM"
        notes = [f"{no_stock}; the folder brings its own modelling code"]
        notes += [f"vLLM cannot run it, our own engine can: {reason}" for reason in vllm_refusals(model.spec)]
    cost, found = None, facts_of(checkpoint, root)
    with writing(target), artefacts.new_folder(target) as partial:
        if scheme is None:
            (export_hf if kind == "hf" else export_own)(model, tokenizer, partial, dtype=dtype)
        else:
            # Beside the target, where there is room, and named as what a kill may leave is.
            place, name = target.parent, f"{target.name}."
            with TemporaryDirectory(dir=place, prefix=name, suffix=artefacts.PARTIAL) as whole:
                quantize(export_hf(model, tokenizer, Path(whole) / "hf", dtype=dtype), partial, scheme=scheme)
            if texts := list(_held_out(checkpoint, root)):
                cost = change(model, tokenizer, texts, scheme=scheme, dtype=dtype)
            else:
                notes.append("what rounding costs was not measured: the corpus is not here, or holds no text back")
        about = replace(found, format=kind, architecture=architecture, dtype=dtype, change=cost, licence=licence)
        (partial / CARD).write_text(card(about), encoding="utf-8")
        made = partial.stat().st_ino
    if target.stat().st_ino != made:
        raise ConfigError(str(target), "was made by somebody else meanwhile", "name a new folder")
    return Exported(target, kind, architecture, tuple(notes), cost)


def _held_out(checkpoint: Path, root: Path) -> Iterator[str]:
    """Texts that the checkpoint's corpus holds back, some hundred kilobytes; none where it is not here."""
    digest = read_manifest(checkpoint).corpus_digest
    if digest is None or not (folder := root / "corpora" / digest).is_dir():
        return
    try:
        corpus = Corpus.read(folder, verify=False)
        rows: list[Any] = corpus.documents["split"].to_pylist()
        left = HELD_OUT_BYTES
        for split in ("test", "val"):
            for row in (number for number, of in enumerate(rows) if of == split):
                if left <= 0:
                    return
                text = corpus.document_text(row)
                left -= len(text.encode())
                yield text
    except ArtefactError:  # damaged: nothing is measured by it
        return
