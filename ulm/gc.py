"""What of a root nothing points to, and its removal.

Names, runs and swarms are what a person knows; what they name is kept, and what that names. A reference is any digest
that a pointer, recipe, manifest or record spells, so that a new field in one of them never costs an artefact.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ulm import artefacts
from ulm.errors import ArtefactError

LEFTOVER_S = 3_600.0  # a `.partial` that has not changed for so long has no writer
BUILD, LOCK = "build.*" + artefacts.PARTIAL, "lock"  # a corpus being built, and the file that its builder holds
PLACES = ("corpora", "tokenizers", "runs", "models", "swarms", "exports")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Unused:
    """A file or folder that may go."""

    path: Path
    num_bytes: int  # that its removal frees: a file with another hard link is not counted
    why: str


@dataclass(frozen=True)
class Survey:
    """What a root holds: the unused, and how many corpora and tokenizers stay."""

    unused: list[Unused]
    num_kept: int


def survey(root: Path) -> Survey:
    """What nothing in the root points to. Nothing behind a symbolic link is looked at.

    While a corpus is being built all corpora and tokenizers stay: it may use one that nothing names yet. Raises
    ArtefactError where a pointer or manifest is not readable, for what it names is then not known.
    """
    root = root.resolve()
    found = [_unused(path, "left by a writer that was stopped") for path in sorted(_leftovers(root))]
    corpora, tokenizers = _artefacts(root / "corpora"), _artefacts(root / "tokenizers")
    if not any(_is_locked(folder) for folder in (root / "corpora").glob(BUILD)):
        used = _used(root, corpora)
        found += [_unused(p, "used by no name, run, model, swarm or corpus") for p in corpora if p.name not in used]
        found += [_unused(p, "used by no name, corpus, model or swarm") for p in tokenizers if p.name not in used]
        # A checkpoint outside the root is not known here: an engine that is started again makes its folder anew.
        exports = [p for p in _folders(root / "exports") if p.name.partition("-")[0] not in used]
        found += [_unused(p, "exported from a checkpoint that no run, model or swarm has") for p in exports]
    kept = {*corpora, *tokenizers} - {unused.path for unused in found}
    return Survey(found, len(kept))


def remove(root: Path, found: list[Unused]) -> list[Unused]:
    """Take out of the root what of this is still unused; what went.

    Nobody points a name anew while it is looked at again and renamed away; then it goes file by file.
    """
    gone = []
    with ExitStack() as trash, artefacts.exclusive_lock(root):
        still = {unused.path for unused in survey(root).unused}
        for unused in found:
            if unused.path in still and _rename_away(unused.path, trash):
                gone.append(unused)
    return gone


def _rename_away(path: Path, trash: ExitStack) -> bool:
    """Move it to a folder that goes when `trash` is closed; False where a builder has taken it up meanwhile."""
    with _lock(path) as is_free:
        if not is_free:
            return False
        try:
            place = tempfile.TemporaryDirectory(prefix="removed.", suffix=artefacts.PARTIAL, dir=path.parent)
            os.rename(path, Path(trash.enter_context(place)) / path.name)
        except FileNotFoundError:  # its writer came back and cleaned up
            return False
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be removed: {error}") from None
    return True


def tree_bytes(path: Path, *, freed: bool = False) -> int:
    """Bytes of a file or of all files below a folder; with `freed` only of those without another hard link."""
    files = [path] if not path.is_dir() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        try:
            about = file.lstat()
        except FileNotFoundError:  # a writer at work
            continue
        total += about.st_size if not freed or about.st_nlink == 1 else 0
    return total


def _unused(path: Path, why: str) -> Unused:
    return Unused(path, tree_bytes(path, freed=True), why)


def _artefacts(folder: Path) -> list[Path]:
    """Folders named by a digest, by name; none where the folder or an entry is a link."""
    return [path for path in _folders(folder) if _DIGEST.fullmatch(path.name)]


def _folders(folder: Path) -> list[Path]:
    """The whole folders in a folder, by name, but no links."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    whole = (path for path in folder.iterdir() if not path.name.endswith(artefacts.PARTIAL))
    return sorted(path for path in whole if path.is_dir() and not path.is_symlink())


def _used(root: Path, corpora: list[Path]) -> set[str]:
    """Every digest that names, runs, models and swarms spell, and what the corpora among them spell."""
    pointers = [root / "corpora" / "names", root / "tokenizers" / "names", root / "swarms" / "names", root / "models"]
    used: set[str] = set()
    for folder in pointers:
        for target in artefacts.names(folder).values():
            used |= set(_DIGEST.findall(str(target)))
            if folder.name == "models" and (target / "manifest.json").is_file():  # perhaps a checkpoint elsewhere
                used |= _digests(target / "manifest.json")
    for pattern in ("runs/*/recipe.yaml", "runs/*/task.json", "runs/*/step-*/manifest.json", "swarms/*/swarm.json"):
        for path in root.glob(pattern):
            used |= _digests(path)
    open_ = [path for path in corpora if path.name in used]
    while open_:  # a corpus names its tokenizer and the corpus that it extends
        named = _digests(open_.pop() / "manifest.json") - used
        used |= named
        open_ += [path for path in corpora if path.name in named]
    return used


def _digests(path: Path) -> set[str]:
    """The digests that a record spells."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except FileNotFoundError:  # pruned or removed meanwhile
        return set()
    except (ValueError, RecursionError, OSError) as error:
        problem = f"not readable, so that what it uses is not known: {error}"
        raise ArtefactError(f"{path}: {problem}; mend it, or remove its folder") from None
    return set(_DIGEST.findall(text))


def _leftovers(root: Path) -> Iterator[Path]:
    """Half-written files and folders that nobody has touched for LEFTOVER_S and nobody holds."""
    before = time.time() - LEFTOVER_S
    for place in PLACES:
        if (root / place).is_symlink():
            continue
        for at, folders, files in os.walk(root / place):
            partial = [Path(at) / name for name in (*folders, *files) if name.endswith(artefacts.PARTIAL)]
            folders[:] = [name for name in folders if not name.endswith(artefacts.PARTIAL)]
            yield from (p for p in partial if not p.is_symlink() and _changed(p) < before and not _is_locked(p))


def _changed(path: Path) -> float:
    """When a file, or the newest of what is in a folder, was changed, in seconds of the epoch."""
    inside = [Path(at) / name for at, folders, files in os.walk(path) for name in (*folders, *files)]
    times = []
    for file in (path, *inside):
        try:
            times.append(file.lstat().st_mtime)
        except FileNotFoundError:
            return time.time()  # somebody is at work there
    return max(times)


def _is_locked(folder: Path) -> bool:
    with _lock(folder) as is_free:
        return not is_free


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """True, and no builder can take the folder up in the block; False where one holds it."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # no such file: nothing that locks
        yield True
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
