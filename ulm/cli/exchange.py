"""`ulm export`, `ulm import`: models for other tools, and from them."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ulm import runtime
from ulm.cli import console
from ulm.cli.options import Checkpoint


class To(StrEnum):
    """What a checkpoint can become."""

    hf = "hf"
    gguf = "gguf"


class Dtype(StrEnum):
    """How weights are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    q8_0 = "q8_0"


class Scheme(StrEnum):
    """How matrices are rounded to integers."""

    w8a8 = "w8a8"
    w4a16 = "w4a16"


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("export")(export)
    app.command("import")(import_)


def export(
    checkpoint: Checkpoint,
    target: Annotated[Path, typer.Argument(help="A folder, or a .gguf file, to make.", show_default=False)],
    to: Annotated[
        To | None,
        typer.Option(help="hf: a Hugging Face folder; gguf: a file for llama.cpp. Default: as the target's name ends."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights. Default: float32, of a gguf float16; q8_0 is gguf's.")
    ] = None,
    quantize: Annotated[
        Scheme | None,
        typer.Option(help="Of a folder: w8a8, integers of 8 bits; w4a16, of 4 bits.", show_default=False),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, for the model card: apache-2.0, …", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint for other tools: transformers, vLLM, llama.cpp.

    A folder is of a stock architecture where one has all that the model has, so that any tool opens it; else it brings
    its own modelling code, for trust_remote_code=True, with the reasons told. Its README.md is a model card.

    Example: ulm export demo-e00 ./demo-e00-hf --to hf
    """
    from ulm.checkpoints import store
    from ulm.exchange import export as exchange

    root = runtime.root()
    to = to or (To.gguf if target.suffix == ".gguf" else To.hf)
    found = store.resolve(checkpoint, root=root, near=Path.cwd())
    with console.bars() as bars:
        bars.step("export", 0, 1, {})
        done = exchange.export(
            found,
            target,
            root=root,
            to=to.value,
            dtype=dtype.value if dtype else None,
            scheme=quantize.value if quantize else None,
            licence=licence,
        )
        bars.step("export", 1, 1, {})
    for note in done.notes:
        console.err.print(note, soft_wrap=True, markup=False)
    cost = None
    if done.change is not None:
        cost = {"before": done.change.bits_per_byte, "after": done.change.rounded_bits_per_byte}
    facts = {"format": done.format, "architecture": done.architecture, "notes": done.notes, "bits_per_byte": cost}
    console.finish({"path": str(done.path), **facts})


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
