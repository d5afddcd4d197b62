"""Inputs that are large in one direction are built in bounded memory, and every bad file ends with its reason."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plain_build import plain_build
from ulm import runtime

CORPORA = runtime.variable("ULM_CORPORA")
BUILD = """
import json, resource, sys
from pathlib import Path
from tests.plain_build import plain_build
corpus = plain_build(Path(sys.argv[1]), {"path": sys.argv[2]})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "documents": corpus.manifest["documents"], "cut": corpus.manifest["cut"]}))
"""
EMPTY_BYTES = 400_000_000  # a process that builds one small file: torch is not in it, pyarrow and scikit-learn are
PART_BYTES = 40  # times max_document_bytes: what a worker holds of 10 MB of text, its words and their hashes among it


def built(root: Path, source: Path) -> dict[str, Any]:
    """What a build in a process of its own says, with its peak of resident memory."""
    command = [sys.executable, "-c", BUILD, str(root), str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_line_of_200_megabytes_is_cut_in_bounded_memory(root: Path, tmp_path: Path) -> None:
    with (tmp_path / "line.txt").open("w") as file:
        for number in range(20_000_000):
            file.write(f"word{number:05d} "[:10])
    found = built(root, tmp_path / "line.txt")
    assert found["cut"]["documents"] == 1
    assert found["documents"]["kept"] >= 20
    assert found["peak"] < EMPTY_BYTES + PART_BYTES * 10_000_000


@pytest.mark.slow
def test_a_bomb_is_refused_and_a_large_honest_gz_is_read_in_bounded_memory(root: Path, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", compresslevel=9) as file:
        for _ in range(500):
            file.write(bytes(1_000_000).replace(b"\0", b"a"))
    with gzip.open(tmp_path / "honest.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(300_000):
            file.write(json.dumps({"text": f"row {number} says {number * 7919 % 1_000_003} and {number**2}"}) + "\n")
    found = built(root, tmp_path)
    assert found["documents"]["dropped"] == {"bomb": 1}
    assert found["documents"]["kept"] == 300_000
    assert found["peak"] < EMPTY_BYTES + 300_000 * 1_500  # rows, signatures and texts of a part of 300,000 documents


@pytest.mark.slow
def test_a_hundred_thousand_tiny_files_are_read_in_bounded_memory(root: Path, tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / f"{folder:02d}").mkdir()
        for number in range(1_000):
            (tmp_path / f"{folder:02d}" / f"{number:03d}.txt").write_text(f"note {folder} {number}")
    found = built(root, tmp_path)
    assert found["documents"] == {"in": 100_000, "kept": 100_000, "dropped": {}}
    assert found["peak"] < EMPTY_BYTES + 200_000_000


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
def test_every_dirty_file_ends_in_the_report_with_a_reason_or_its_documents(root: Path) -> None:
    corpus = plain_build(root, {"path": f"{CORPORA}/dirty"}, clean={"max_document_bytes": 1_000_000})
    manifest = corpus.manifest
    named = {row["path"].rpartition(":")[0] or row["path"] for row in manifest["dropped"]}
    named |= {row["path"] for row in manifest["dropped"]} | {row["path"] for row in manifest["ignored"]}
    named |= set(corpus.documents["path"].to_pylist())
    files = {file.relative_to(f"{CORPORA}/dirty").as_posix() for file in Path(f"{CORPORA}/dirty").rglob("*.*")}
    lost = {path for path in files if path not in named and Path(f"{CORPORA}/dirty", path).is_file()}
    assert lost == {"names/.hidden.txt"}  # hidden files are left out
    dropped = manifest["documents"]["dropped"]
    assert {"binary", "bomb", "bad_gzip", "bad_json", "bad_parquet", "undecodable", "duplicate_near"} <= set(dropped)
    assert manifest["documents"]["in"] == manifest["documents"]["kept"] + sum(dropped.values())
