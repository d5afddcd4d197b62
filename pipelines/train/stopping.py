"""Asking a run to save and stop: a file in its folder, which its workers look for after every step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipelines.train import status
from pipelines.train.events import Event
from ulm import artefacts

STOP = "stop"  # a file in the run's folder: save and return after the step under way
ASKED = "saving and ending after this step; Ctrl-C again ends it at once"
log = logging.getLogger(__name__)


def request_stop(run_folder: Path) -> None:
    """Ask the workers of the run in this folder to save after the step they are in, and to return."""
    if run_folder.is_dir():
        (run_folder / STOP).touch()


@contextmanager
def stopping(
    run_folders: Sequence[Path], on_event: Callable[[str, Event], None] | None = None
) -> Iterator[threading.Event]:
    """While inside, SIGTERM and Ctrl-C ask these runs to stop, and set the event; a second Ctrl-C interrupts at once.

    `on_event` is told of it at once, for each run that is under way, else the log. Only the main thread of a process
    can catch signals; in another this does nothing.
    """
    is_asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        is_asked.set()
        for run_folder in run_folders:
            request_stop(run_folder)
            if on_event is not None and artefacts.is_locked(run_folder):
                step = status.of(run_folder)["step"] or 0
                on_event(run_folder.name, Event(time.time(), step, "stop", ASKED))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if on_event is None:
            log.warning(ASKED)

    if threading.current_thread() is not threading.main_thread():
        yield is_asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield is_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
