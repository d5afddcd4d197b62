"""What this process runs on: root folder, device, precision, threads, memory. The one reader of the environment."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
import time
from functools import cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from ulm.errors import ConfigError

if TYPE_CHECKING:
    import torch


def root() -> Path:
    """The folder that holds all artefacts: ULM_HOME, else ~/.ulm."""
    home = os.environ.get("ULM_HOME", "")
    if "://" in home:
        raise ConfigError("ULM_HOME", f"{home} is a remote root", "this version keeps artefacts in a local folder")
    return Path(home or "~/.ulm").expanduser().absolute()


def variable(name: str) -> str | None:
    """An environment variable, None when unset or empty."""
    return os.environ.get(name) or None


def set_variable(name: str, value: str, *, keep: bool = True) -> None:
    """Set an environment variable for this process and its children; `keep` leaves a value that the user set."""
    if not (keep and name in os.environ):
        os.environ[name] = value


def spare_cores() -> None:
    """Let threads of a parallel sum wait asleep after a short while; before torch is imported, for child processes too.

    By default GNU's OpenMP spins for milliseconds. With one other busy process on two cores that took nano from 11,000
    tokens/s to 4,400; after 20,000 turns (tens of microseconds) nothing is lost, busy or not (docs/experiments.md).
    """
    set_variable("GOMP_SPINCOUNT", "20000")


def environment() -> dict[str, str]:
    """A copy of the environment, for a child process."""
    return dict(os.environ)


def num_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Threads for one process that has the machine to itself: OMP_NUM_THREADS where the user set it, else the cores."""
    given = variable("OMP_NUM_THREADS") or ""
    return int(given) if given.isdecimal() and int(given) else num_cpus()


def rss_bytes() -> int:
    """Resident memory of this process now (its peak where /proc is missing)."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # asked for after every step of a training
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss_bytes()


def tree_rss_bytes() -> int:
    """Resident memory of this process and of all below it; pages that they share count for each."""
    total, open_ = 0, [os.getpid()]
    while open_:
        pid = open_.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
            for task in Path(f"/proc/{pid}/task").iterdir():
                open_ += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
        except OSError:  # it has ended meanwhile
            continue
    return total or rss_bytes()


def free_bytes(where: torch.device) -> int:
    """Memory of a device that could be allocated now; of a CPU without /proc a GiB is assumed."""
    import torch

    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 30
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 1 << 30)


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device(name: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else CPU."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device", f"{name} is not on this machine", "leave it out, or use cpu")
    return torch.device(name)


def has_fast_bfloat16(where: torch.device) -> bool:
    """Whether bfloat16 products are native: Ampere or later, AMX or AVX-512 BF16. Emulated ones are 4x slower."""
    import torch

    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private names: absent means unknown, so False
    return where.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def precision(wanted: str, where: torch.device) -> str:
    """What `auto` means on a device: bfloat16 where it is native, float16 on older GPUs, else float32."""
    if wanted != "auto":
        return wanted
    if has_fast_bfloat16(where):
        return "bfloat16"
    return "float16" if where.type == "cuda" else "float32"


# Dense matrix products in bfloat16 or float16, from NVIDIA's data sheets; a name may be part of the device's.
GPU_PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "A10G": 70e12, "A10": 125e12, "L4": 121e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 4070": 58e12, "RTX 3090": 71e12, "RTX 3080": 59e12,
}  # fmt: skip
PROBE_SIZES = (256, 512, 1024, 2048)
PROBE_S = 0.02  # a product that takes so long is large enough; an emulated dtype would take minutes at the next size


@cache
def peak_flops(where: torch.device, precision: str) -> float:
    """Floating-point operations a second that the device can do: a data sheet's, else of a square product here.

    Of a CPU it is what this process's threads reach now; another program on the machine makes it less.
    """
    import torch

    dtype = {"float32": torch.float32, "float16": torch.float16}.get(precision, torch.bfloat16)
    if where.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(where)
        for known, flops in GPU_PEAK_FLOPS.items():
            if known in name:
                return flops
    reached = 0.0
    for size in PROBE_SIZES:
        a, b = (torch.full((size, size), 0.5, dtype=dtype, device=where) for _ in range(2))
        a @ b
        times_s = []
        for _ in range(3):
            synchronize(where)
            started_s = time.perf_counter()
            a @ b
            synchronize(where)
            times_s.append(time.perf_counter() - started_s)
        reached = max(reached, 2 * size**3 / min(times_s))
        if min(times_s) > PROBE_S:
            break
    return reached


def seed(where: torch.device, value: int) -> None:
    """Seed torch's generator of a device, and of the CPU. torch.manual_seed asks every backend: 0.3 ms each time."""
    import torch

    if where.type not in ("cpu", "cuda"):
        torch.manual_seed(value)
        return
    torch.default_generator.manual_seed(value)
    if where.type == "cuda":
        with torch.cuda.device(where):
            torch.cuda.manual_seed(value)


def synchronize(where: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if where.type == "cuda":
        torch.cuda.synchronize(where)


def can_compile(where: torch.device) -> bool:
    """Whether torch.compile has what it needs: a compiler and Python's headers, and Triton for CUDA."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return False
    if where.type == "cuda":  # Triton compiles what starts its kernels
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc"]
        return util.find_spec("triton") is not None and any(shutil.which(compiler) for compiler in compilers)
    return where.type == "cpu" and shutil.which(os.environ.get("CXX") or "g++") is not None


def has_vllm() -> bool:
    """Whether vLLM is installed, for GPUs or for CPUs; it is not imported."""
    return util.find_spec("vllm") is not None


def gpu_bytes() -> int:
    """Memory allocated by torch on the current GPU, 0 without one."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
