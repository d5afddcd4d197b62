"""Checkpoints written beside training: a copy is taken between two steps, a thread writes it."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ulm.checkpoints import store
from ulm.checkpoints.store import Snapshot
from ulm.errors import TrainingError

SAVE_EVERY_S = 600.0  # where the recipe does not say after how many steps
SPARE_BYTES = 16 * 2**20  # beside the tensors: tokenizer, manifests, metrics


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk, or what may be used of it, is full."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or "No space left" in str(error)  # safetensors has an exception of its own


def full_disk(run: Path) -> TrainingError:
    """What to say where a run could not write."""
    remedy = "make room and run it again: it resumes from its newest checkpoint"
    return TrainingError(f"{run.name}: no space left for what the run writes in {run}; {remedy}")


@contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """A disk too full for metrics or events comes out of the block as a TrainingError that says what to do."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise full_disk(run) from None


class Saver:
    """One writer of a run's checkpoints, at most one at a time."""

    def __init__(self, run: Path, keep_last: int, keep_best: int) -> None:
        self._run, self._keep_last, self._keep_best = run, keep_last, keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._whole: Path | None = None
        self._begun_s = time.monotonic()

    def save(self, snapshot: Snapshot, place: Path) -> None:
        """Begin to write; waits for the one before. TrainingError where that one could not be written."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, place)
        self._begun_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last write was begun so long ago that it is time for another."""
        return time.monotonic() - self._begun_s > SAVE_EVERY_S

    def done(self) -> Path | None:
        """The newest checkpoint that has become whole since the last call; TrainingError if it could not be written."""
        if self._writing is not None and self._writing.done():
            self.wait()
        whole, self._whole = self._whole, None
        return whole

    def wait(self) -> None:
        """Until nothing is being written; TrainingError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._whole = writing.result()

    def _write(self, snapshot: Snapshot, place: Path) -> Path:
        free_bytes = shutil.disk_usage(self._run).free
        if free_bytes < snapshot.num_bytes + SPARE_BYTES:
            raise self._full(place, snapshot.num_bytes)
        try:
            store.write(snapshot, place)
        except Exception as error:
            if is_full(error):
                raise self._full(place, snapshot.num_bytes) from None
            if isinstance(error, OSError):
                raise TrainingError(f"{place}: the checkpoint could not be written: {error}") from None
            raise
        store.prune(self._run, self._keep_last, self._keep_best)
        return place

    def _full(self, place: Path, num_bytes: int) -> TrainingError:
        free = shutil.disk_usage(self._run).free
        newest = store.newest(self._run)
        kept = f"the last whole checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
        return TrainingError(
            f"{place}: no space for a checkpoint of {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; {kept}; "
            "make room and run it again: it resumes"
        )

    def close(self) -> None:
        """End the thread; an error of a write under way is not raised here."""
        self._thread.shutdown(wait=True)
