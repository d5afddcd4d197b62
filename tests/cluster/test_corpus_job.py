"""The corpus job on a real local Ray: the corpus that one process makes, whatever the workers, never half-done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines import tokenizer_job
from pipelines.corpus import job, steps
from tests.plain_build import corpus_recipe, plain_build
from tests.written_corpus import stdlib_docstrings
from ulm import artefacts
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, CorpusError
from ulm.recipes import load_recipe
from ulm.recipes.base import validate
from ulm.recipes.corpus import TokenizerRecipe

# Ray 2.60 sets deprecated fields of its own whenever it makes a DataContext.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")
BPE = {"kind": "bpe", "vocab_size": 500}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    docstrings = stdlib_docstrings(30)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in docstrings[:200])
    (place / "rows.jsonl").write_text(rows + "no json\n" + rows[:2_000], encoding="utf-8")
    for number, text in enumerate(docstrings[200:260]):
        (place / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    (place / "empty.md").write_bytes(b"")
    return place


def test_one_two_and_four_workers_make_the_corpus_that_one_process_makes(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(folder)}
    plain = plain_build(root / "plain", source, tokenizer=BPE)
    lines = []
    for workers in (1, 2, 4):
        if workers == 4:  # another layout of parts too
            monkeypatch.setattr(steps, "share_out", lambda units: [[n] for n in range(len(units))])
        place = root / str(workers)
        lines.append(job.build(corpus_recipe(source, tokenizer=BPE, workers=workers), root=place))
        corpus = Corpus.open("c", root=place)
        assert corpus.digest == plain.digest
        assert corpus.documents.equals(plain.documents)
    assert {key: value for key, value in lines[0].items() if key != "corpus"} == {
        "digest": plain.digest,
        "documents": plain.manifest["documents"],
        "tokens": plain.manifest["tokens"],
    }
    assert lines[0]["corpus"] == str(root / "1" / "corpora" / plain.digest)
    assert plain.manifest["documents"]["dropped"].keys() == {"bad_json", "duplicate_exact", "duplicate_near", "empty"}
    assert (root / "1" / "tokenizers" / plain.tokenizer.digest / "manifest.json").is_file()


def test_progress_is_told_by_stage(root: Path, folder: Path) -> None:
    told: list[tuple[str, int, int | None, str]] = []
    line = job.build(corpus_recipe({"path": str(folder)}), root=root, progress=lambda *step: told.append(step))
    kept = line["documents"]["kept"]
    assert ("tokenize", kept, kept) in [step[:3] for step in told]
    assert list(dict.fromkeys(stage for stage, *_ in told)) == [
        "list", "read and clean", "judge", "near duplicates", "tokenizer", "tokenize", "write",
    ]  # fmt: skip
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert max(done for stage, done, _, _ in told if stage == "read and clean") == size
    assert any("documents, " in note and note.endswith("/s") for *_, note in told)


def test_a_tokenizer_alone_is_the_one_of_the_corpus(root: Path, folder: Path) -> None:
    source = {"path": str(folder)}
    plain = plain_build(root, source, tokenizer=BPE)
    recipe = validate(TokenizerRecipe, {"name": "t", "sources": [source], "tokenizer": BPE})
    line = tokenizer_job.train(recipe, root=root)
    assert (line["digest"], line["vocab_size"]) == (plain.tokenizer.digest, 500)
    assert artefacts.names(root / "tokenizers" / "names") == {"t": Path(line["tokenizer"])}


def test_a_source_that_is_missing_or_holds_nothing_leaves_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources\.0\.path: .* does not exist"):
        job.build(corpus_recipe({"path": "nowhere"}), root=root, near=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\x00\x01")
    with pytest.raises(CorpusError, match=r"no document is left of the sources: binary 1, a\.txt \(binary\)"):
        job.build(corpus_recipe({"path": "a.txt"}), root=root, near=tmp_path)
    assert list((root / "corpora").iterdir()) == []


def test_a_worker_that_is_lost_is_retried(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_build(root / "plain", {"path": str(folder)})
    died = root / "died"

    def clean_part_once_killed(*arguments: Any, **options: Any) -> dict[str, Any]:
        from pipelines.corpus.part import clean_part

        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return clean_part(*arguments, **options)

    monkeypatch.setattr(steps, "clean_part", clean_part_once_killed)
    assert job.build(corpus_recipe({"path": str(folder)}), root=root)["digest"] == plain.digest
    assert died.exists()


def test_what_fails_on_a_worker_is_one_line_that_names_it(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> dict[str, Any]:
        raise OSError(28, "No space left on device", "/disk/part")

    monkeypatch.setattr(steps, "clean_part", full)
    with pytest.raises(CorpusError, match="^/disk/part: No space left on device; what is done stays: the same command"):
        job.build(corpus_recipe({"path": str(folder)}), root=root)


def test_the_job_module_ends_with_one_json_line_and_says_what_was_wrong(root: Path, folder: Path) -> None:
    recipe = folder.parent / "notes.yaml"
    recipe.write_text("sources: [{path: texts}]\ntokenizer: {kind: byte}\n")
    address = ray.get_runtime_context().gcs_address

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.corpus.job", str(recipe), *arguments]
        environment = {**os.environ, "RAY_ADDRESS": address, "ULM_HOME": str(root)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    done = run("--set", "name=notes")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["digest"] == Corpus.open("notes", root=root).digest
    wrong = run("--set", "sources=[{path: nowhere}]")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "sources.0.path" in wrong.stderr.splitlines()[-1]
    empty = run("--set", "sources=[{path: texts/empty.md}]")
    assert empty.returncode == 1
    assert "no document is left of the sources: empty 1" in empty.stderr.splitlines()[-1]


@pytest.mark.parametrize("stage", ["parts", "tokens"])
def test_a_build_killed_with_9_goes_on_and_ends_with_the_same_digest(root: Path, tmp_path: Path, stage: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    docstrings = stdlib_docstrings(40)
    for number in range(4_000):  # four parts
        (texts / f"{number:04d}.txt").write_text(f"{docstrings[number % len(docstrings)]}\nNumber {number}.")
    recipe = tmp_path / "notes.yaml"
    recipe.write_text("sources: [{path: texts}]\ntokenizer: {kind: bpe, vocab_size: 500}\n")
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "ULM_HOME": str(root)}
    command = [sys.executable, "-m", "pipelines.corpus.job", str(recipe)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    pattern = {"parts": "build.*/parts/*[0-9]", "tokens": "build.*/tokens/*/*[0-9]"}[stage]
    while not list((root / "corpora").glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, "the build never got there"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    left = list((root / "corpora").iterdir())
    assert [p.suffix for p in left] == [artefacts.PARTIAL] * len(left)
    with pytest.raises(ConfigError, match="no corpus 'notes'"):
        Corpus.open("notes", root=root)
    made = {p: p.stat().st_ctime for p in (root / "corpora").glob("build.*/parts/*[0-9]")}
    seen: list[str] = []
    loaded = load_recipe("corpus build", recipe)
    line = job.build(loaded, root=root, near=tmp_path, progress=lambda stage, done, *_: seen.append(f"{stage} {done}"))
    plain = plain_build(root / "plain", {"path": str(texts)}, tokenizer=BPE)
    assert line["digest"] == plain.digest
    assert made
    assert "read and clean 0" not in seen  # it began where the other ended


def test_tasks_take_runs_of_items_that_become_shorter_and_none_twice() -> None:
    items = [{"n": n} for n in range(25)]
    runs = list(job._guided(items, 2))
    assert [item for run in runs for item in run] == items
    assert [len(run) for run in runs] == [7, 5, 4, 3, 2, 1, 1, 1, 1]
    assert max(len(run) for run in job._guided([{}] * 1_000, 2)) == job.MAX_ITEMS
    assert sorted(result["n"] for result in job.over_ray(2)(lambda item: item, items)) == list(range(25))
