"""What this process runs on: root folder, device, precision, threads, memory. The one reader of the environment."""

from __future__ import annotations

import os
import resource
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


def environment() -> dict[str, str]:
    """A copy of the environment, for a child process."""
    return dict(os.environ)


def num_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rss_bytes() -> int:
    """Resident memory of this process now (its peak where /proc is missing)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except OSError:
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


def gpu_bytes() -> int:
    """Memory allocated by torch on the current GPU, 0 without one."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
