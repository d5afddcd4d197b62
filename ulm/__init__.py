"""µLM: language models small enough to own, trained and served as one swarm.

Names are imported on first use, so that `import ulm` (and `ulm --help`) needs neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulm.checkpoints.store import load, save
    from ulm.models.decoder import build
    from ulm.models.generate import generate
    from ulm.registry import kinds
    from ulm.spec import ModelSpec

__version__ = "0.1.0"
__all__ = ["ModelSpec", "build", "generate", "kinds", "load", "save"]

_HOME = {
    "ModelSpec": "ulm.spec",
    "build": "ulm.models.decoder",
    "generate": "ulm.models.generate",
    "kinds": "ulm.registry",
    "load": "ulm.checkpoints.store",
    "save": "ulm.checkpoints.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ulm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
