"""Imports point one way, Ray and the environment are touched only at the edges. Read from the source, file by file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ulm", "pipelines", "serve")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

RAY_EDGES = (
    "pipelines/*job.py",  # fnmatch's * crosses folders
    "serve/app.py",
    "serve/door.py",
    "serve/gateway.py",
    "serve/graph.py",
    "serve/member.py",
    "serve/metrics.py",
    "serve/limits.py",
    "serve/api/control.py",
    "serve/engines/vllm.py",
    "serve/engines/vllm/*.py",
)
HEAVY = {"torch", "ray", "transformers", "vllm", "sklearn", "datasets", "pipelines", "serve"}


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(node: ast.AST) -> Iterator[tuple[str, str, str | None]]:
    """(module, name or "", alias) of every import below a node."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((alias.name, "", alias.asname) for alias in found.names)
        elif isinstance(found, ast.ImportFrom) and found.module and not found.level:
            yield from ((found.module, alias.name, alias.asname) for alias in found.names)


def modules(node: ast.AST) -> set[str]:
    """The top-level modules imported below a node."""
    return {module.partition(".")[0] for module, _, _ in imports(node)}


def at_import(node: ast.AST) -> ast.Module:
    """What of a file runs when it is imported: all of it but the bodies of functions."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

    return WithoutFunctions().visit(node)


def is_edge(path: str) -> bool:
    return any(fnmatch(path, edge) for edge in RAY_EDGES)


def test_the_three_packages_are_there() -> None:
    assert {path.partition("/")[0] for path in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.startswith("ulm/cli/") and not is_edge(path)])
def test_ray_is_imported_at_the_edges_only(path: str) -> None:
    assert "ray" not in modules(tree(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.startswith("ulm/cli/")])
def test_the_cli_imports_what_is_heavy_inside_functions_only(path: str) -> None:
    assert not HEAVY & modules(at_import(tree(path)))


@pytest.mark.parametrize("path", SOURCES)
def test_ray_serve_is_always_ray_serve(path: str) -> None:
    for module, name, alias in imports(tree(path)):
        if (module, name) == ("ray", "serve"):
            assert alias == "ray_serve"
        assert (module, name) != ("ray.serve", ""), "from ray import serve as ray_serve"


@pytest.mark.parametrize("path", [path for path in SOURCES if path != "ulm/runtime.py"])
def test_only_runtime_reads_the_environment(path: str) -> None:
    source = tree(path)
    names = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute) and _is_os(node.value)}
    names |= {name for module, name, _ in imports(source) if module == "os"}
    assert not names & {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def _is_os(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "os"


def test_a_planted_offence_is_seen() -> None:
    """The scan itself: an import in a class body runs at import, one in a function does not."""
    planted = ast.parse("class A:\n    import ray\ndef f():\n    import torch\n    from ray import serve\n")
    assert modules(planted) == {"ray", "torch"}
    assert ("ray", "serve", None) in set(imports(planted))
    assert modules(at_import(planted)) == {"ray"}


def test_the_import_contracts_hold() -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 kept, 0 broken" in found.stdout
