"""`ulm export`, `ulm import`: models for other tools, and from them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ulm import runtime
from ulm.cli import console
from ulm.cli.options import Checkpoint


class Format(StrEnum):
    """What a checkpoint can become."""

    hf = "hf"


class Dtype(StrEnum):
    """How weights are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("export")(export)
    app.command("import")(import_)


def export(
    checkpoint: Checkpoint,
    target: Annotated[Path, typer.Argument(help="A folder to make.", show_default=False)],
    to: Annotated[Format, typer.Option(help="hf: a Hugging Face folder.")] = Format.hf,
    dtype: Annotated[Dtype, typer.Option(help="How weights are stored.")] = Dtype.float32,
) -> None:
    """Write a checkpoint as a folder that transformers and vLLM open.

    One of a stock architecture where one has all that the model has, so that any tool opens it; else one that brings
    its own modelling code, for trust_remote_code=True, with the reasons.

    Example: ulm export demo-e00 ./demo-e00-hf --to hf
    """
    from ulm.checkpoints import store
    from ulm.errors import UnsupportedError
    from ulm.exchange.hf import export_hf
    from ulm.exchange.own import export_own

    model, tokenizer = store.load(store.resolve(checkpoint, root=runtime.root(), near=Path.cwd()))
    why = None
    try:
        export_hf(model, tokenizer, target, dtype=dtype)
    except UnsupportedError as no_stock:
        why = str(no_stock)
        console.err.print(f"{why}; the folder brings its own modelling code", soft_wrap=True, markup=False)
        export_own(model, tokenizer, target, dtype=dtype)
    console.finish({"folder": str(target.absolute()), "format": to.value, "why_not_stock": why})


def import_(
    folder: Annotated[Path, typer.Argument(help="A folder of transformers' save_pretrained.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of the checkpoint. Default: the folder's name.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="A shorter context than the folder's, in tokens.", show_default=False)
    ] = None,
) -> None:
    """Take a Hugging Face folder as a checkpoint: to generate with, to serve, to begin a training or a swarm with.

    Of the architectures that `ulm export` writes, with a byte-level BPE and weights as safetensors. What the spec has
    no word for is refused by name.

    Example: ulm import ./demo-e00-hf --name again
    """
    import re

    from ulm.exchange.hf_import import import_hf

    usual = re.sub(r"[^a-z0-9._-]+", "-", folder.absolute().name.lower()).strip("-._") or "imported"
    with console.bars() as bars:
        bars.step("import", 0, 1, {})
        taken = import_hf(folder, root=runtime.root(), name=name or usual, context_tokens=context)
        bars.step("import", 1, 1, {})
    for note in taken.notes:
        console.err.print(note, soft_wrap=True, markup=False)
    facts = {"architecture": taken.architecture, "notes": taken.notes, "spec": taken.spec.model_dump(mode="json")}
    console.finish({"checkpoint": str(taken.checkpoint), "digest": taken.digest, "name": name or usual, **facts})
