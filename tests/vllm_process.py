"""vLLM in a process of its own: it sets process-wide things (threads, groups, signal handlers). One core is enough."""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.processes import said_last

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
TIMEOUT_S = 240


def answers(script: str, given: Any) -> Any:
    """What a script that uses vLLM says in its last line, as JSON; it is given JSON on its standard input."""
    return said_last([sys.executable, "-c", script], given, {**os.environ, **ENVIRONMENT}, TIMEOUT_S)
