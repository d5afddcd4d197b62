"""Artefacts appear whole or not at all, and are found by names that may be hostile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ulm import artefacts
from ulm.errors import ArtefactError, ConfigError


def look_up(root: Path, text: str) -> Path:
    return artefacts.find(text, folder=root / "swarms", names_in=root / "swarms" / "names", what="swarm", place="swarm")


def test_an_artefact_is_found_by_name_digest_beginning_and_path(root: Path) -> None:
    digest = "ab" * 32
    place = root / "swarms" / digest
    with artefacts.new_folder(place) as folder:
        (folder / "x").write_text("1")
    artefacts.point(root / "swarms" / "names" / "mine", place)
    (root / "mine").mkdir()  # a folder of that name hides nothing
    assert look_up(root, "mine") == look_up(root, digest[:10]) == look_up(root, str(place)) == place


@pytest.mark.parametrize("text", ["/nonexistent/absolute", "~nouser/x", "x" * 5_000, "a\0b", "", "[*", "../../etc/x"])
def test_odd_names_are_errors_with_a_place(root: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="^swarm: "):
        look_up(root, text)


def test_a_damaged_pointer_is_named_and_hides_no_other(root: Path) -> None:
    names = root / "swarms" / "names"
    names.mkdir(parents=True)
    (names / "bad").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ArtefactError, match="bad: not a readable pointer"):
        look_up(root, "bad")
    with pytest.raises(ConfigError, match="one of these names: bad"):
        look_up(root, "other")


def test_a_failed_or_killed_writer_leaves_nothing_that_is_listed(root: Path) -> None:
    place = root / "corpora" / ("cd" * 32)
    with pytest.raises(ZeroDivisionError), artefacts.new_folder(place) as folder:
        (folder / "x").write_text("half")
        raise ZeroDivisionError
    assert not place.exists() and not list(place.parent.glob("*"))
    code = (
        "import sys, time; from pathlib import Path; from ulm import artefacts\n"
        "with artefacts.new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'x').write_text('half'); print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"in\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not place.exists()
    assert [p.suffix for p in place.parent.iterdir()] == [artefacts.PARTIAL]


def test_of_two_writers_of_the_same_artefact_the_first_stays(root: Path) -> None:
    place = root / "a"
    with artefacts.new_folder(place) as first, artefacts.new_folder(place) as second:
        (first / "x").write_text("1")
        (second / "x").write_text("1")
    assert (place / "x").read_text() == "1" and [p.name for p in root.iterdir()] == ["a"]


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    for name in ("../secret", "/etc/hostname", "..", ".", ""):
        with pytest.raises(ArtefactError, match="no file of this folder"):
            artefacts.verify_files(tmp_path, {name: "0" * 64})
    for name in ("x" * 5_000, "a\0b", "absent"):
        with pytest.raises(ArtefactError, match="missing"):
            artefacts.verify_files(tmp_path, {name: "0" * 64})


def test_a_manifest_of_another_version_or_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ArtefactError, match="format_version is 99"):
        artefacts.read_manifest(tmp_path, "corpus")
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtefactError, match="not a readable manifest"):
        artefacts.read_manifest(tmp_path, "corpus")


def test_a_name_that_looks_half_written_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"name: 'mine\.partial' ends as what is half-written does"):
        artefacts.point(root / "names" / "mine.partial", root)
    assert not (root / "names").exists()


def test_the_exclusive_lock_waits_for_the_shared_ones(root: Path) -> None:
    order = []

    def remove() -> None:
        with artefacts.exclusive_lock(root):
            order.append("removed")

    with artefacts.shared_lock(root), artefacts.shared_lock(root):
        thread = threading.Thread(target=remove)
        thread.start()
        thread.join(0.2)
        order.append("pointed")
    thread.join()
    assert order == ["pointed", "removed"]


def test_a_lock_that_cannot_be_had_is_named(root: Path) -> None:
    (root / ".lock").mkdir(parents=True)
    with pytest.raises(ArtefactError, match=r"\.lock: cannot be opened"), artefacts.exclusive_lock(root):
        pass


def test_names_are_replaced_atomically(root: Path) -> None:
    pointer = root / "names" / "n"
    for target in ("a", "b"):
        (root / target).mkdir(parents=True)
        artefacts.point(pointer, root / target)
        assert artefacts.names(root / "names") == {"n": root / target}
    assert time.time() - pointer.stat().st_mtime < 60
