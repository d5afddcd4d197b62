"""`ulm corpus …` and `ulm tokenizer train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ulm import artefacts, runtime
from ulm.cli import console
from ulm.cli.cluster import session
from ulm.cli.corpus_tables import comparison, document, plan, right, summary, token_place
from ulm.cli.options import Address, Overrides, Recipe
from ulm.errors import ArtefactError, ConfigError
from ulm.gc import tree_bytes
from ulm.recipes import CorpusRecipe, ExtendRecipe, TokenizerRecipe, load_recipe
from ulm.recipes.corpus import Clean

if TYPE_CHECKING:
    from ulm.corpus.manifest import Corpus

EXCERPT_CHARS = 500  # of a document that is shown
corpus = typer.Typer(help="Assemble, extend, compare, show and verify corpora.", no_args_is_help=True)
tokenizer = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name, a digest or a path.", show_default=False)]
Plan = Annotated[bool, typer.Option("--plan", help="Estimate time, memory and disk from a sample, and build nothing.")]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(corpus, name="corpus")
    app.add_typer(tokenizer, name="tokenizer")


@corpus.command("build")
def build(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer copies it
    address: Address = None,
    estimate: Plan = False,
) -> None:
    """Make a corpus version from sources: cleaned, deduplicated, split, tokenized, sharded.

    Example: ulm corpus build corpus.yaml --set tokenizer.vocab_size=4096
    """
    loaded = cast(CorpusRecipe, load_recipe("corpus build", recipe, overrides))
    root = runtime.root()
    if estimate:
        from pipelines.corpus import estimate as estimates

        planned = estimates.plan(loaded, root=root, near=recipe.parent)
        console.err.print(plan(planned))
        console.finish(planned)
        return
    from pipelines.corpus import job, sources
    from ulm.corpus.manifest import Corpus

    max_bytes = loaded.clean.max_document_bytes
    sources.list_sources(loaded.sources, near=recipe.parent, root=root, max_bytes=max_bytes)  # errors before Ray starts
    with session(root, address), console.bars() as bars:
        result = job.build(loaded, root=root, near=recipe.parent, progress=bars.update)
    _tell(Corpus.open(result["digest"], root=root, verify=False))
    console.finish(result)


@corpus.command("extend")
def extend(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006  typer copies it
    """Add sources to a corpus, as a new version with the same tokenizer; near duplicates are checked against the old.

    Example: ulm corpus extend more.yaml --set extends=mine
    """
    loaded = cast(ExtendRecipe, load_recipe("corpus extend", recipe, overrides))
    root = runtime.root()
    from pipelines.corpus import job, sources
    from ulm.corpus.manifest import Corpus

    max_bytes = (loaded.clean or Clean()).max_document_bytes
    sources.list_sources(loaded.sources, near=recipe.parent, root=root, max_bytes=max_bytes)
    with session(root, address), console.bars() as bars:
        result = job.build(loaded, root=root, near=recipe.parent, progress=bars.update)
    _tell(Corpus.open(result["digest"], root=root, verify=False))
    console.finish(result)


@corpus.command("list")
def list_() -> None:
    """All named corpora.

    Example: ulm corpus list
    """
    from ulm.corpus.manifest import Corpus

    root = runtime.root()
    found = []
    table = Table("name", "digest", *right("documents", "tokens", "on disk"), "created")
    for name in artefacts.names(root / "corpora" / "names"):
        try:
            corpus = Corpus.open(name, root=root, verify=False)
        except ArtefactError as error:  # the others are to be seen all the same
            found.append({"name": name, "error": str(error)})
            table.add_row(*(Text(console.printable(cell)) for cell in (name, "damaged", "", "", "", "")))
            console.err.print(console.printable(str(error)), markup=False, soft_wrap=True)
            continue
        kept = (corpus.manifest.get("documents") or {}).get("kept")
        row: dict[str, Any] = {
            "name": name,
            "digest": corpus.digest,
            "tokens": {split: corpus.num_tokens(split) for split in corpus.splits},
            "documents": kept,
            "bytes": tree_bytes(corpus.folder),
            "created": corpus.manifest.get("created"),
        }
        found.append(row)
        cells = [f"{kept or 0:,}", f"{sum(row['tokens'].values()):,}", decimal(row["bytes"])]
        table.add_row(
            *(Text(console.printable(cell)) for cell in (name, row["digest"][:12], *cells, row["created"] or ""))
        )
    if found:
        console.err.print(table)
    console.finish({"corpora": found})


@corpus.command("show")
def show(
    name: Name,
    document_id: Annotated[
        str | None,
        typer.Option("--document", metavar="ID", help="A document's id or its beginning: its text, and who saw it."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="SPLIT:NUMBER", help="A stored token, from 0: its document and file."),
    ] = None,
) -> None:
    """A corpus's figures and where its report is; or one document; or where one token comes from.

    Example: ulm corpus show mine --token train:12345
    """
    from ulm.corpus import lineage
    from ulm.corpus.manifest import Corpus

    root = runtime.root()
    corpus = Corpus.open(name, root=root, verify=False)
    if document_id is not None and token is not None:
        raise ConfigError("--token", "given with --document", "give one of the two")
    if token is not None:
        split, number = _parse_token(token)
        found = lineage.document_of_token(corpus, split, number)
        console.err.print(token_place(found))
    elif document_id is not None:
        row = lineage.find_document(corpus, document_id)
        about = corpus.documents.slice(row, 1).to_pylist()[0]
        excerpt = corpus.document_text(row)[:EXCERPT_CHARS]
        found = {"row": row, "document": about, "text": excerpt, **lineage.models_that_saw(about["id"], root)}
        console.err.print(document(found))
    else:
        lists = {"dropped", "ignored", "samples"}  # of single files and texts: in manifest.json
        found = {key: value for key, value in corpus.manifest.items() if key not in lists} | {"name": corpus.name}
        _tell(corpus)
    console.finish({"corpus": str(corpus.folder), **found})


def _tell(corpus: Corpus) -> None:
    """A corpus in a few lines, and where its report is."""
    from ulm.corpus.manifest import REPORTS

    console.err.print(summary(corpus))
    report = corpus.folder / REPORTS[0]
    shown = console.printable(str(report)) if report.is_file() else "no report"
    console.err.print(shown, markup=False, soft_wrap=True)


def _parse_token(text: str) -> tuple[str, int]:
    split, _, number = text.partition(":")
    if not number.isdecimal():
        raise ConfigError("--token", f"{text!r} is not a split and a number", "for example train:12345")
    return split, int(number)


@corpus.command("diff")
def diff(a: Name, b: Name) -> None:
    """What differs between two corpora: sources, documents, splits, domains, licences, vocabulary, stages, settings.

    Example: ulm corpus diff before after
    """
    from ulm.corpus import compare
    from ulm.corpus.manifest import Corpus

    root = runtime.root()
    found = compare.diff(
        *(Corpus.open(text, root=root, place=place, verify=False) for text, place in ((a, "A"), (b, "B")))
    )
    console.err.print(comparison(found))
    console.finish(found)


@corpus.command("verify")
def verify(name: Name) -> None:
    """Read every byte of a corpus and compare it with its digests.

    Example: ulm corpus verify mine
    """
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
