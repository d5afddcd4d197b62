"""`ulm corpus …` and `ulm tokenizer train`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from ulm import artefacts, runtime
from ulm.cli import console
from ulm.cli.cluster import session
from ulm.cli.options import Address, Overrides, Recipe
from ulm.recipes import CorpusRecipe, TokenizerRecipe, load_recipe

corpus = typer.Typer(help="Assemble, list, show and verify corpora.", no_args_is_help=True)
tokenizer = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name, a digest or a path.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(corpus, name="corpus")
    app.add_typer(tokenizer, name="tokenizer")


@corpus.command("build")
def build(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006  typer copies it
    """Make a corpus version from sources: cleaned, deduplicated, split, tokenized, sharded.

    Example: ulm corpus build corpus.yaml --set tokenizer.vocab_size=4096
    """
    loaded = cast(CorpusRecipe, load_recipe("corpus build", recipe, overrides))
    root = runtime.root()
    from pipelines.corpus import job, sources

    sources.list_sources(loaded.sources, near=recipe.parent, root=root)  # a missing path is said before Ray starts
    with session(root, address), console.bars() as bars:
        result = job.build(loaded, root=root, near=recipe.parent, progress=bars.update)
    console.finish(result)


@corpus.command("list")
def list_() -> None:
    """All named corpora."""
    from ulm.corpus.manifest import Corpus

    root = runtime.root()
    found = []
    for name in artefacts.names(root / "corpora" / "names"):
        corpus = Corpus.open(name, root=root, verify=False)
        found.append(
            {"name": name, "digest": corpus.digest, "tokens": {s: corpus.num_tokens(s) for s in corpus.splits}}
        )
        console.err.print(f"{name:<24} {corpus.digest[:12]}  {sum(found[-1]['tokens'].values()):>14,} tokens")  # type: ignore[attr-defined]
    console.finish({"corpora": found})


@corpus.command("show")
def show(name: Name) -> None:
    """A corpus's manifest: sources, stages, counts, digests."""
    from ulm.corpus.manifest import Corpus

    corpus = Corpus.open(name, root=runtime.root(), verify=False)
    console.finish({"corpus": str(corpus.folder), **corpus.manifest})


@corpus.command("verify")
def verify(name: Name) -> None:
    """Read every byte of a corpus and compare it with its digests."""
    from ulm.corpus.manifest import Corpus

    corpus = Corpus.open(name, root=runtime.root(), verify=True)
    console.finish({"corpus": str(corpus.folder), "digest": corpus.digest, "verified": True})


@tokenizer.command("train")
def train(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006
    """Train a tokenizer on a sample of the sources' cleaned training text.

    Example: ulm tokenizer train corpus.yaml --set tokenizer.vocab_size=8192
    """
    loaded = cast(TokenizerRecipe, load_recipe("tokenizer train", recipe, overrides))
    root = runtime.root()
    from pipelines import tokenizer_job

    with session(root, address), console.bars() as bars:
        result = tokenizer_job.train(loaded, root=root, near=recipe.parent, progress=bars.update)
    console.finish(result)
