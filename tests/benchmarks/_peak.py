"""The memory of a command and of all processes that it starts, sampled beside them."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

SAMPLE_PERIOD_S = 0.5


class Peak:
    """The largest memory of all processes whose environment names a home: proportional set sizes, and /dev/shm."""

    def __init__(self, home: str) -> None:
        """Begin to watch; make it before the processes start."""
        self._mark = f"ULM_HOME={home}".encode()
        self._shm_before, self._peak, self._ended = _shm_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_PERIOD_S):
            # pages of /dev/shm that are mapped count in the set sizes too, so this errs on the high side
            total = sum(map(self._pss, Path("/proc").glob("[0-9]*"))) + max(0, _shm_bytes() - self._shm_before)
            self._peak = max(self._peak, total)

    def _pss(self, process: Path) -> int:
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            if self._mark in (process / "environ").read_bytes():
                for line in (process / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        return int(line.split()[1]) * 1024
        return 0

    def stop(self) -> int:
        """The peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak


def _shm_bytes() -> int:
    held = os.statvfs("/dev/shm")
    return (held.f_blocks - held.f_bfree) * held.f_frsize
