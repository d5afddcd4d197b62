"""Compiles kernels.cpp for this machine, keeps the result under the root, and registers its operators with torch.

The source uses torch's stable ABI as of 2.11, so that it compiles in seconds and one text serves later versions too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ulm import runtime
from ulm.errors import UnsupportedError

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
NAMESPACE = "ulm_engine"
MACHINES = ("x86_64", "aarch64", "arm64")
FLAGS = (
    *("-O3", "-march=native", "-std=c++20", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # of the ABI: 2.11, the oldest that we run on
)
COMPILE_TIMEOUT_S = 300
DIGEST_BYTES = 32
_loading = threading.Lock()  # two engines of one process may start at once, and torch takes an operator once


def load() -> str | None:
    """None once `torch.ops.ulm_engine` is there; else why it is not, told in the log once, and plain torch must run."""
    with _loading:
        return _load()


@cache
def _load() -> str | None:
    try:
        path = compiled()
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError:  # cut short or from another system: once more from the source
            path.unlink(missing_ok=True)
            torch.ops.load_library(str(compiled()))  # type: ignore[no-untyped-call]
    except (UnsupportedError, OSError) as error:
        log.warning("the local engine's kernels are missing, and plain torch runs instead: %s", error)
        return str(error)
    for fake in (_linear, _embed, _attend, _norm, _rotate, _gate):
        torch.library.register_fake(f"{NAMESPACE}::{fake.__name__[1:]}", fake)
    return None


def compiled() -> Path:
    """The library for this machine, compiled unless it is under the root. UnsupportedError where it cannot be."""
    if platform.machine() not in MACHINES:
        raise UnsupportedError(f"this processor is {platform.machine()}: the kernels know {', '.join(MACHINES)}")
    compiler = runtime.variable("CXX") or "g++"
    parts = (SOURCE.read_text(), *FLAGS, _run(compiler, "--version"), _processor(), torch.__version__)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = runtime.root() / "kernels" / f"{digest}.so"
    if _is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError as error:
        raise UnsupportedError(f"{path.parent} cannot be written: {error}") from error
    os.close(number)
    installed = Path(torch.__file__).parent
    places = ("-isystem", str(installed / "include"), f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10")
    try:
        _run(compiler, *FLAGS, str(SOURCE), "-o", unfinished, *places)
        library = Path(unfinished)
        library.write_bytes(_sealed(library.read_bytes()))
        os.replace(library, path)  # at once, whoever else compiles the same
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _sealed(library: bytes) -> bytes:
    """A library and its SHA-256 behind it, where a loader does not look: to load one cut short ends the process."""
    return library + hashlib.sha256(library).digest()


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    sealed = path.read_bytes()
    return _sealed(sealed[:-DIGEST_BYTES]) == sealed


def _run(compiler: str, *arguments: str) -> str:
    """What the compiler writes."""
    command = [*compiler.split(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except OSError as error:
        message = f"no compiler {compiler} ({error.strerror}): install g++, or name another in CXX"
        raise UnsupportedError(message) from error
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{compiler} took more than {COMPILE_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnsupportedError(f"{compiler} failed: {lines[-1]}")
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a root may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


# ---- what torch.compile sees of the operators: shapes and dtypes


def _linear(x: Tensor, weights: Tensor, biases: Tensor, segments: Tensor, num_out: int, is_bfloat16: bool) -> Tensor:
    return x.new_empty(x.shape[0], num_out)


def _embed(tokens: Tensor, slots: Tensor, weights: Tensor, num_rows: int, width: int, is_bfloat16: bool) -> Tensor:
    return tokens.new_empty(tokens.shape[0], width, dtype=torch.float32)


def _norm(x: Tensor, slots: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_centred: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gate(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    spans: Tensor,
    positions: Tensor,
    window: int,
    num_sink_tokens: int,
    soft_cap: float,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)
