"""Programs that Debian has and no Python registry: a test gets them unpacked in a cache folder, without root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

DOWNLOAD_S = 120


def program(package: str, path: str) -> Path:
    """A file of a package, for example `usr/bin/promtool`; the test is skipped where the package cannot be had."""
    cache = Path(os.environ.get("ULM_CACHE") or "~/.cache/ulm").expanduser() / "debian"
    folder = cache / package
    if not folder.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            pytest.skip(f"no {package}: this is no Debian, nor one of its kin")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack(package, Path(scratch))
            try:
                (Path(scratch) / "files").rename(folder)
            except OSError:  # another test was faster
                assert folder.exists()
    assert (folder / path).exists(), f"{package} has no {path}"
    return folder / path


def _unpack(package: str, scratch: Path) -> None:
    """The package's files in scratch/files."""
    if (said := _download(package, scratch)) is not None:
        # The lists of packages may be missing or old. New ones of our own need no root.
        private = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
        for part in ("state/lists/partial", "cache/archives/partial"):
            (scratch / part).mkdir(parents=True)
        _run(["apt-get", "update", *private], scratch)
        said = _download(package, scratch, *private)
    if said is not None:
        pytest.skip(f"the Debian package {package} could not be downloaded: {said[-200:]}")
    (file,) = scratch.glob("*.deb")
    subprocess.run(["dpkg", "-x", str(file), str(scratch / "files")], check=True)


def _download(package: str, into: Path, *options: str) -> str | None:
    """None, or what went wrong."""
    done = _run(["apt-get", "download", package, *options], into)
    return None if done.returncode == 0 else done.stderr


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"nothing came within {DOWNLOAD_S} s")
