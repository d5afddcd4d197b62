"""`ulm gc` removes what nothing points to, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.cli import console
from ulm.cli.main import app
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError
from ulm.gc import LEFTOVER_S, Unused, remove, survey

NAMES = ("corpora", "names")


def corpus(root: Path, text: str, *, named: bool = True) -> Corpus:
    found = write_corpus(root, [("d", "train", text)], name=text)
    if not named:
        root.joinpath(*NAMES, text).unlink()
    return found


def unused(root: Path) -> set[str]:
    return {str(item.path.relative_to(root.resolve())) for item in survey(root).unused}


def age(path: Path, seconds: float = LEFTOVER_S + 60) -> None:
    """Let a file or a folder with all in it have been changed so long ago."""
    then = time.time() - seconds
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (then, then), follow_symlinks=False)


def partial(root: Path, name: str, *, lock: bool = False) -> Path:
    place = root / name
    place.mkdir(parents=True)
    (place / "half").write_text("x" * 100)
    if lock:
        (place / "lock").touch()
    age(place)
    return place


def gc(*words: str, **given: Any) -> Any:
    done = CliRunner().invoke(app, ["gc", *words], catch_exceptions=False, **given)
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def test_a_corpus_and_a_tokenizer_go_once_no_name_leads_to_them(root: Path) -> None:
    kept, gone = corpus(root, "kept"), corpus(root, "gone", named=False)
    place = kept.tokenizer.save(root)
    assert unused(root) == {f"corpora/{gone.digest}", f"tokenizers/{place.name}"}  # written corpora name no tokenizer
    manifest = {**kept.manifest, "tokenizer": {"digest": place.name}}
    artefacts.write_json(kept.folder / "manifest.json", manifest)
    assert unused(root) == {f"corpora/{gone.digest}"}
    size = sum(file.stat().st_size for file in gone.folder.iterdir())
    done = gc("--yes")
    assert (done["removed"], done["bytes"], done["kept"]) == ([str(gone.folder.resolve())], size, 2)
    assert not gone.folder.exists() and Corpus.read(kept.folder).digest == kept.digest
    assert sorted(p.name for p in (root / "corpora").iterdir()) == sorted([kept.digest, "names"])
    assert gc("--yes")["found"] == []


def use_run(root: Path, digest: str) -> None:
    artefacts.write_json(root / "runs" / "r" / "task.json", {"corpus": digest})


def use_started_run(root: Path, digest: str) -> None:
    artefacts.write_text(root / "runs" / "r" / "recipe.yaml", f"name: r\ncorpus: {digest}\n")


def use_checkpoint(root: Path, digest: str) -> None:
    artefacts.write_json(root / "runs" / "r" / "step-00000001" / "manifest.json", {"corpus_digest": digest})


def use_model_elsewhere(root: Path, digest: str) -> None:
    artefacts.write_json(root.parent / "elsewhere" / "manifest.json", {"corpus_digest": digest})
    artefacts.point(root / "models" / "m", root.parent / "elsewhere")


def use_swarm(root: Path, digest: str) -> None:
    artefacts.write_json(root / "swarms" / ("aa" * 32) / "swarm.json", {"corpus_digest": digest})


def use_router(root: Path, digest: str) -> None:
    router = {"path": f"../../corpora/{digest}/domains/x"}
    artefacts.write_json(root / "swarms" / ("aa" * 32) / "swarm.json", {"router": router})


def use_extension_of_an_extension(root: Path, digest: str) -> None:
    middle, last = corpus(root, "middle", named=False), corpus(root, "last")
    for one, base in ((middle, digest), (last, middle.digest)):
        artefacts.write_json(one.folder / "manifest.json", {**one.manifest, "base": {"digest": base}})


@pytest.mark.parametrize(
    "use",
    [
        use_run,
        use_started_run,
        use_checkpoint,
        use_model_elsewhere,
        use_swarm,
        use_router,
        use_extension_of_an_extension,
    ],
)
def test_a_corpus_without_a_name_stays_while_something_uses_it(root: Path, use: Any) -> None:
    found = corpus(root, "nameless", named=False)
    assert unused(root) == {f"corpora/{found.digest}"}
    use(root, found.digest)
    assert unused(root) == set()


def test_what_was_exported_for_an_engine_goes_with_its_checkpoint(root: Path) -> None:
    kept, gone = "ab" * 32, "cd" * 32
    for name in (f"{kept}-float32", f"{gone}-float32", f"{gone}-bfloat16"):
        artefacts.write_text(root / "exports" / name / "config.json", "{}")
    use_checkpoint(root, kept)
    assert unused(root) == {f"exports/{gone}-bfloat16", f"exports/{gone}-float32"}
    assert len(gc("--yes")["removed"]) == 2 and (root / "exports" / f"{kept}-float32" / "config.json").is_file()


def test_a_corpus_that_only_an_unused_one_extends_goes_with_it(root: Path) -> None:
    base, top = corpus(root, "base", named=False), corpus(root, "top", named=False)
    artefacts.write_json(top.folder / "manifest.json", {**top.manifest, "base": {"digest": base.digest}})
    assert unused(root) == {f"corpora/{base.digest}", f"corpora/{top.digest}"}


def test_what_stopped_writers_left_goes_when_it_is_old_and_nobody_holds_it(root: Path) -> None:
    places = ["corpora/build.x.partial", "runs/r/step-1.x.partial", "tokenizers/t.partial", "swarms/s.partial"]
    for name in places:
        partial(root, name, lock=name.startswith("corpora/build"))
    pointer = root / "corpora" / "names" / ".n.x.partial"
    pointer.parent.mkdir()
    pointer.touch()
    age(pointer)
    assert unused(root) == {*places, "corpora/names/.n.x.partial"}
    (root / "runs/r/step-1.x.partial/half").write_text("more")  # its writer is at work
    with (root / "corpora/build.x.partial/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert unused(root) == {"tokenizers/t.partial", "swarms/s.partial", "corpora/names/.n.x.partial"}
        assert remove(root, [Unused(root.resolve() / "corpora/build.x.partial", 0, "")]) == []
        assert (root / "corpora/build.x.partial/half").is_file()
    assert len(gc("--yes")["removed"]) == 4
    assert unused(root) == set() and not (root / "corpora/build.x.partial").exists()


def test_while_a_corpus_is_built_corpora_and_tokenizers_stay(root: Path) -> None:
    nameless = corpus(root, "nameless", named=False)
    nameless.tokenizer.save(root)
    build = partial(root, "corpora/build.x.partial", lock=True)
    with (build / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert unused(root) == set() and survey(root).num_kept == 2
    assert len(unused(root)) == 3


def test_links_are_neither_followed_nor_removed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(corpus(root, "x", named=False).folder, outside)
    shutil.rmtree(root / "corpora")
    (root / "corpora").mkdir()
    (root / "corpora" / ("ab" * 32)).symlink_to(outside)
    (root / "corpora" / "old.partial").symlink_to(outside)
    partial(tmp_path, "away/t.partial")
    (root / "tokenizers").symlink_to(tmp_path / "away")
    assert unused(root) == set()
    assert gc("--yes")["removed"] == [] and (outside / "manifest.json").is_file()


def test_a_link_inside_what_goes_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    place = partial(root, "corpora/x.partial")
    (place / "link").symlink_to(tmp_path / "precious")
    age(place)
    assert len(gc("--yes")["removed"]) == 1
    assert not place.exists() and (tmp_path / "precious" / "file").is_file()


def test_a_shard_that_another_corpus_has_too_frees_nothing(root: Path) -> None:
    one, two = corpus(root, "one", named=False), corpus(root, "two")
    shard = "train-00000.bin"
    (one.folder / shard).unlink()
    os.link(two.folder / shard, one.folder / shard)
    [found] = survey(root).unused
    assert found.num_bytes == sum(f.stat().st_size for f in one.folder.iterdir() if f.name != shard)


@pytest.mark.parametrize("name", ["swarms/aa/swarm.json", "runs/r/task.json", "corpora/names/n"])
def test_where_a_reference_cannot_be_read_nothing_is_removed(root: Path, name: str) -> None:
    nameless = corpus(root, "nameless", named=False)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b'{"corpus_digest": "\xff')
    with pytest.raises(ArtefactError, match=f"{name}: not (a )?readable"):
        survey(root)
    assert nameless.folder.is_dir()


def test_nothing_is_removed_unasked(root: Path) -> None:
    nameless = corpus(root, "nameless", named=False)
    for words in ([], ["--dry-run"], ["--dry-run", "--yes"]):
        done = gc(*words)
        assert done["removed"] == [] and done["bytes"] == 0
        assert [item["path"] for item in done["found"]] == [str(nameless.folder.resolve())]
    assert nameless.folder.is_dir()


@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("y\n", False)])
def test_on_a_terminal_it_asks(root: Path, monkeypatch: pytest.MonkeyPatch, answer: str, stays: bool) -> None:
    nameless = corpus(root, "nameless", named=False)
    monkeypatch.setattr("ulm.cli.gc._is_terminal", lambda: True)
    gc(input=answer)
    assert nameless.folder.is_dir() == stays


def test_what_found_a_use_while_the_question_stood_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = corpus(root, "nameless", named=False)

    def answer() -> bool:
        use_run(root, nameless.digest)
        return True

    monkeypatch.setattr("ulm.cli.gc._confirmed", answer)
    assert gc()["removed"] == [] and nameless.folder.is_dir()


def test_what_got_a_name_after_it_was_found_unused_stays(root: Path) -> None:
    one, two = corpus(root, "one", named=False), corpus(root, "two", named=False)
    found = survey(root).unused
    artefacts.point(root.joinpath(*NAMES, "again"), one.folder)
    assert [item.path.name for item in remove(root, found)] == [two.digest]
    assert Corpus.open("again", root=root).digest == one.digest and not two.folder.exists()


def test_a_builder_that_finds_its_corpus_built_has_the_time_to_name_it(root: Path) -> None:
    found = corpus(root, "found", named=False)
    items, gone = survey(root).unused, []
    with artefacts.shared_lock(root):
        thread = threading.Thread(target=lambda: gone.extend(remove(root, items)))
        thread.start()
        thread.join(0.2)
        assert found.folder.is_dir()
        artefacts.point(root.joinpath(*NAMES, "found"), found.folder)
    thread.join()
    assert gone == [] and Corpus.open("found", root=root).digest == found.digest


def test_file_names_on_the_terminal_command_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "corpora/\x1b[2J\x9b2J\x7f\u202e\udcff.partial"
    partial(root, name)
    done = CliRunner().invoke(app, ["gc", "--dry-run"], catch_exceptions=False)
    [found] = json.loads(done.stdout)["found"]
    assert found["path"] == str(root.resolve() / name)
    assert not any(c in done.stdout + done.stderr for c in "\x1b\x9b\x7f\u202e\udcff")

    def fail() -> None:
        raise ArtefactError(name)

    assert console.run(fail) == 1
    assert capsys.readouterr().err == "error corpora/\ufffd[2J\ufffd2J\ufffd\ufffd\ufffd.partial\n"


def test_an_empty_root_has_nothing_to_remove(root: Path) -> None:
    assert gc() == {"removed": [], "bytes": 0, "kept": 0, "found": []}
