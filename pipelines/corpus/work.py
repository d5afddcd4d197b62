"""The folder of a build that is not finished: what is done stays done, until the corpus stands.

corpora/build.<identity>.partial/
    lock            held by the process that builds
    about.json      the recipe's name, for `ulm gc` and for a later build of that name
    parts/00000/    see part.py            base/00000/   fingerprints of a corpus that is extended
    bands/00.npy    near duplicates        tokens/<of what>/00000/   see tokens.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ulm import artefacts
from ulm.errors import CorpusError

PREFIX, LOCK = "build.", "lock"


@contextmanager
def unfinished(root: Path, name: str, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder of this build, new or as a killed build left it; nobody else builds the same meanwhile.

    It stays when the block ends by an error; `finished` removes it. Raises CorpusError if another process holds it.
    """
    corpora = root / "corpora"
    folder = corpora / f"{PREFIX}{artefacts.digest_json(identity)[:16]}{artefacts.PARTIAL}"
    corpora.mkdir(parents=True, exist_ok=True)
    _remove_older(corpora, name, but=folder)
    lock = _locked(folder)
    try:
        artefacts.write_json(folder / "about.json", {"name": name})
        yield folder
    finally:
        os.close(lock)


def _locked(folder: Path) -> int:
    """The lock of a folder, taken; of one that its last builder removed meanwhile that of the folder made anew."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:
            continue
        if not _take(lock):
            os.close(lock)
            raise CorpusError(f"{folder}: another process builds this corpus now; wait for it, or end it")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
                return lock
        os.close(lock)


def finished(folder: Path) -> None:
    """Remove a folder that is not needed any more: of a build whose corpus stands, or of a part to be read again."""
    shutil.rmtree(folder, ignore_errors=True)


def _take(lock: int) -> bool:
    for _ in range(5):  # `ulm gc` holds a lock for an instant to see whether anybody does
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def _remove_older(corpora: Path, name: str, *, but: Path) -> None:
    """Remove what an unfinished build of the same name left, whose sources or settings have changed since."""
    for folder in corpora.glob(f"{PREFIX}*{artefacts.PARTIAL}"):
        with suppress(OSError, ValueError, KeyError):
            if folder == but or json.loads((folder / "about.json").read_text(encoding="utf-8"))["name"] != name:
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                if _take(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def numbered(folder: Path, number: int) -> Path:
    """The place of a part."""
    return folder / f"{number:06d}"


def write_array(path: Path, array: NDArray[Any]) -> None:
    """An array as a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{artefacts.PARTIAL}")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """A .npy file to fill, mapped: it may be larger than memory."""
    array: NDArray[Any] = np.lib.format.open_memmap(str(path), "w+", dtype, shape)  # type: ignore[no-untyped-call]
    return array
