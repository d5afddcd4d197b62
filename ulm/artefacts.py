"""Reading and writing artefacts: atomic, digested, verified, found by name.

A file or folder is written beside its place under a `.partial` name, synced, and renamed; a reader therefore sees
the whole of it or nothing, and a kill at any moment leaves at most a `.partial` that nobody lists.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ulm.errors import ArtefactError, ConfigError

PARTIAL = ".partial"
LOCK = ".lock"  # of a root; see shared_lock
FORMAT_VERSION = 1


def digest_bytes(data: bytes) -> str:
    """SHA-256, as hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes 0600, which other users of a shared root could not read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """A path to write at; the file appears at `place`, whole and synced, when the block ends without an error."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=PARTIAL, dir=place.parent)
    os.close(handle)
    try:
        yield Path(name)
        _sync(Path(name))
        os.chmod(name, 0o644)  # mkstemp makes 0600
        os.replace(name, place)
    finally:
        Path(name).unlink(missing_ok=True)
    _sync(place.parent)


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill; it appears at `place`, whole and synced, when the block ends without an error.

    If `place` appeared meanwhile (the same content, made by someone else) that one stays.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=PARTIAL, dir=place.parent))
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes 0600, which other users of a shared root could not read
            _sync(file)
        _sync(partial)
        partial.chmod(0o755)
        try:
            os.rename(partial, place)
        except OSError:
            if place.exists() and not place.is_dir():
                raise ArtefactError(f"{place}: is a file where a folder is to be made; move it away") from None
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(place.parent)


@contextmanager
def shared_lock(root: Path) -> Iterator[None]:
    """What is made or found in the block, and pointed to before its end, `ulm gc` does not remove."""
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root, os.O_RDONLY, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive_lock(root: Path) -> Iterator[None]:
    """Nobody holds the `shared_lock` of the root in the block; waits for those who do."""
    with _locked(root, os.O_RDWR, fcntl.LOCK_EX):
        yield


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder's lock in the block, without waiting; a process that ends gives it up."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def is_locked(folder: Path) -> bool:
    """Whether a process has the folder's lock now. Reading is enough to ask, and nothing is written."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ArtefactError(f"{folder / LOCK}: cannot be opened: {error}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def _locked(root: Path, access: int, how: int) -> Iterator[None]:
    try:
        handle = os.open(root / LOCK, access | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ArtefactError(f"{root / LOCK}: cannot be opened: {error}") from None
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """manifest.json of an artefact, checked for its presence and format version."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(manifest, ensure_ascii=False).encode()  # half a surrogate pair would fail wherever it is written
    except FileNotFoundError:
        raise ArtefactError(f"{folder}: no {what} here (manifest.json is missing)") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtefactError(f"{path}: not a readable manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise ArtefactError(f"{path}: format_version is {found}, this version reads {FORMAT_VERSION}")
    return manifest


def digest_files(folder: Path) -> dict[str, str]:
    """Name to digest of every file in a folder, for its manifest."""
    return {p.name: digest_file(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}


def verify_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise ArtefactError at the first file that is missing or differs from its digest."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name, digest in digests.items():
        if "/" in name or name in ("", ".", ".."):
            raise ArtefactError(f"{folder}: its manifest names {reprlib.repr(name)}, which is no file of this folder")
        path = folder / name
        if name not in present:
            raise ArtefactError(f"{path}: missing; the artefact is incomplete, make or copy it again")
        if digest_file(path) != digest:
            raise ArtefactError(f"{path}: content does not match its digest; the file is damaged, copy it again")


def point(pointer: Path, target: Path) -> None:
    """Let a name point to an artefact: a text file with the relative path, replaced atomically.

    Whoever makes the artefact too holds `shared_lock` from before that until now, or `ulm gc` may come between.
    """
    if pointer.name.endswith(PARTIAL):
        raise ConfigError("name", f"{reprlib.repr(pointer.name)} ends as what is half-written does", "another name")
    write_text(pointer, os.path.relpath(target, pointer.parent) + "\n")


def follow(pointer: Path) -> Path:
    """Where a name points to."""
    try:
        target = pointer.read_text(encoding="utf-8").strip()
        check_path(target, str(pointer))
    except (UnicodeDecodeError, ConfigError):
        raise ArtefactError(f"{pointer}: not a readable pointer; remove it, or point the name anew") from None
    return (pointer.parent / target).resolve()


def _pointers(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_file() and not p.name.endswith(PARTIAL))


def names(folder: Path) -> dict[str, Path]:
    """All names in a folder of pointers, with where they point."""
    return {p.name: follow(p) for p in _pointers(folder)}


def check_path(text: str, place: str) -> None:
    """ConfigError for a text that no path can be: empty, too long, or with a NUL."""
    if not text or "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split("/")) or len(text) > 4_000:
        raise ConfigError(place, f"{reprlib.repr(text)} cannot be a path or a name")


def find(text: str, *, folder: Path, names_in: Path, what: str, place: str, near: Path | None = None) -> Path:
    """An artefact given as a path (absolute, relative to `near`, or to the root), a name, a digest or its beginning."""
    root = folder.parent
    check_path(text, place)
    pointer = names_in / text
    if "/" not in text and pointer.is_file():  # before paths: a folder that happens to have the name hides nothing
        return follow(pointer)
    for candidate in ([near / text] if near else []) + [Path(text), root / text]:
        if candidate.is_dir():
            return candidate.resolve()
    matches = list(folder.glob(f"{text}*")) if re.fullmatch("[0-9a-f]{8,64}", text) else []
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(p.name for p in _pointers(names_in)) or "none yet"
    raise ConfigError(place, f"no {what} {text!r}", f"a path, a digest, or one of these names: {known}")
