"""Asking a run to save and stop: a file in its folder, which its workers look for after every step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP = "stop"  # a file in the run's folder: save and return after the step under way
log = logging.getLogger(__name__)


def request_stop(run_folder: Path) -> None:
    """Ask the workers of the run in this folder to save after the step they are in, and to return."""
    if run_folder.is_dir():
        (run_folder / STOP).touch()


@contextmanager
def stopping(run_folders: Sequence[Path]) -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C ask these runs to stop; a second Ctrl-C interrupts at once.

    Only the main thread of a process can catch signals; in another this does nothing.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        for run_folder in run_folders:
            request_stop(run_folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("saving and stopping after this step")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
