"""Where source files lie, a folder here or an object store behind a URI: listed alike, opened alike."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ulm.errors import ConfigError
from ulm.recipes.base import resolve_path

# Opened by pyarrow itself; any other scheme is fsspec's.
_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_REMEDY = "a file, a folder or a glob"
MAX_SHOWN_CHARS = 300


@dataclass(frozen=True)
class Found:
    """A file of a source."""

    path: str  # relative to the source's folder, valid Unicode, parts joined by /
    file: str  # where it is: an absolute path in os.fsdecode's spelling, or a URI
    size: int = 0
    version: str | None = None  # changes when the file does; None where the place does not say
    problem: str | None = None  # why it cannot even be tried


def is_uri(path: str) -> bool:
    """Whether a path names a place by its scheme."""
    return "://" in path


def find_files(path: str, place: str, *, near: Path | None, root: Path) -> list[Found]:
    """The files of a source in the order of their paths. Raises ConfigError naming `place` where there are none."""
    path = re.sub(r"^file://(?=/)", "", path)
    if is_uri(path):
        try:
            found = _remote_files(path)
        except Exception as error:  # a backend of fsspec's raises what its own libraries do
            raise ConfigError(f"{place}.path", f"cannot list {path!r}: {first_line(error)}", _REMEDY) from error
    else:
        found = _local_files(path, place, near=near, root=root)
    if not found and glob.has_magic(path):
        raise ConfigError(f"{place}.path", f"nothing matches {path!r}", _REMEDY)
    return sorted(found, key=lambda file: file.path)


def open_file(file: str) -> BinaryIO:
    """A file of a listing, to be read from any place in it."""
    if not is_uri(file):
        return open(file, "rb")
    store, path = _store_of(file)
    return cast(BinaryIO, store.open_input_file(path))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error).split("\n")[0][:300] or type(error).__name__


def shown(text: str) -> str:
    """A text as valid Unicode, whatever bytes a file name or a key holds."""
    try:
        return os.fsencode(text).decode("utf-8", errors="backslashreplace")
    except UnicodeEncodeError:  # of a surrogate that stands for no byte
        return text.encode(errors="backslashreplace").decode()


def brief(text: str) -> str:
    """A text as reports and tables take it: valid Unicode of at most MAX_SHOWN_CHARS."""
    text = shown(text[: MAX_SHOWN_CHARS + 1])
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _local_files(text: str, place: str, *, near: Path | None, root: Path) -> list[Found]:
    path = os.path.abspath(resolve_path(text, near=near, root=root, place=f"{place}.path"))
    if os.path.isdir(path):
        return list(_walk(path, path))
    if os.path.isfile(path):
        return [_found(path, os.path.dirname(path))]
    if glob.has_magic(text):
        given = Path(os.path.normpath(Path(text).expanduser())).parts
        depth = next(i for i, part in enumerate(given) if glob.has_magic(part))
        # Two double stars match what one does, and glob takes exponentially longer to say so.
        pattern = [part for i, part in enumerate(given) if i < depth or given[i - 1 : i + 1] != ("**", "**")][depth:]
        for folder in (near or Path.cwd(), root):
            base = os.path.abspath(folder.joinpath(*given[:depth]))
            matches = glob.glob(os.path.join(glob.escape(base), *pattern), recursive=True)
            files = (f for m in matches for f in (_walk(m, base) if os.path.isdir(m) else [_found(m, base)]))
            if found := {file.path: file for file in files}:
                return list(found.values())
        return []
    problem = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
    raise ConfigError(f"{place}.path", f"{shown(path)} {problem}", f"{_REMEDY}, relative to the recipe")


def _walk(folder: str, base: str) -> Iterator[Found]:
    """Files below a folder; hidden ones are left out, a folder reached twice through links is read once."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            yield Found(_relative(here, base), here, problem=f"unreadable: {first_line(error)}")
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
            except OSError:  # a link that leads to itself; as a file it says so
                pass
            yield _found(entry.path, base, entry)
        waiting += reversed(folders)


def _found(file: str, base: str, entry: os.DirEntry[str] | None = None) -> Found:
    path = _relative(file, base)
    try:
        status = os.stat(file) if entry is None else entry.stat()
    except OSError:
        return Found(path, file)  # the reader says what is wrong with it
    problem = None if stat.S_ISREG(status.st_mode) else "not_a_file"
    version = f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"  # times can be set back, ctime cannot
    return Found(path, file, status.st_size, version, problem)


def _relative(file: str, base: str) -> str:
    return shown(os.path.relpath(file, base) if not file.startswith(base + os.sep) else file[len(base) + 1 :])


def _remote_files(uri: str) -> list[Found]:
    import pyarrow.fs

    prefix, path, query = _parts(uri)
    parts = path.strip("/").split("/")
    depth = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    folder = "/".join(parts[:depth])
    store, base = _store_of(f"{prefix}/{folder}{query}")
    information = store.get_file_info(base)
    if information.type == pyarrow.fs.FileType.File and depth is not None:
        return []  # a web server, which has no folders to look for a match in
    if information.type == pyarrow.fs.FileType.File:
        folder, name = "/".join(parts[:-1]), parts[-1]
        return [_of_store(information, name, f"{prefix}/{folder}", query)]
    if information.type == pyarrow.fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no {base}")
    listed = store.get_file_info(pyarrow.fs.FileSelector(base, recursive=True))
    found = []
    for information in listed:
        path = information.path.removeprefix(base).lstrip("/")
        names = path.split("/")
        if not information.is_file or any(name.startswith(".") for name in names):
            continue
        if depth is None or any(_matches(names[:end], parts[depth:]) for end in range(1, len(names) + 1)):
            found.append(_of_store(information, path, f"{prefix}/{folder}".rstrip("/"), query))
    return found


def _of_store(information: Any, path: str, folder: str, query: str) -> Found:
    version = None if information.mtime_ns is None else str(information.mtime_ns)
    return Found(shown(path), f"{folder.rstrip('/')}/{path}{query}", information.size or 0, version)


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether path parts match those of a glob, where ** stands for any number of them."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _parts(uri: str) -> tuple[str, str, str]:
    """("s3://bucket", "folder/file", "?region=…"); only pyarrow's schemes have options behind a question mark."""
    scheme, _, rest = uri.partition("://")
    query = re.search(r"\?\w+=[^/]*$|\?\w+=.*://.*$", rest) if scheme in _ARROW_SCHEMES else None
    if query:
        rest = rest[: query.start()]
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}", path, query.group() if query else ""


def _store_of(uri: str) -> tuple[Any, str]:
    prefix, path, query = _parts(uri)
    store, base = _store(prefix, query)
    return store, f"{base.rstrip('/')}/{path}" if path else base


@lru_cache(maxsize=16)
def _store(prefix: str, query: str) -> tuple[Any, str]:
    """A connection that the files of a store share, and what its paths begin with."""
    import pyarrow.fs

    if prefix.partition("://")[0] in _ARROW_SCHEMES:
        store, base = pyarrow.fs.FileSystem.from_uri(prefix + query)
        return store, base
    import fsspec  # type: ignore[import-untyped]

    inner, base = fsspec.core.url_to_fs(prefix)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner)), base
