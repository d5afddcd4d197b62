"""Real processes, started, watched and killed: `from tests.processes import start, wait_for, …`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ULM = [sys.executable, "-m", "ulm.cli.main"]
TIMEOUT_S = 240.0  # Ray's processes may take a minute to notice that their driver is gone


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """`ulm` with these arguments, in a process group of its own."""
    return subprocess.Popen(
        [*ULM, *arguments],
        env={**os.environ, "ULM_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )


def said_last(command: Sequence[str], given: Any, env: Mapping[str, str], timeout_s: float) -> Any:
    """What a command says in its last line, as JSON; it is given JSON on its standard input."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        input=json.dumps(given),
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; a terminal's jobs heed it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(child: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    """Ctrl-C goes to the whole foreground group, as a terminal sends it; SIGTERM to the process, as `kill` does."""
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    return ended(child)


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process, once it has ended by itself."""
    out, err = child.communicate(timeout=TIMEOUT_S)
    return child.returncode, out, err


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Until something is true."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(0.1)


def processes_of(home: Path) -> list[int]:
    """Processes that were started with this root in their environment."""
    mark, found = f"ULM_HOME={home}".encode(), []
    for process in _processes():
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def nothing_is_left(home: Path) -> None:
    """No process of this root, and nothing half-written in it."""
    wait_for(lambda: not processes_of(home), "orphan processes to end")
    assert [str(p) for p in home.rglob("*.partial")] == []


def training_workers(title: bytes = b"ray::RayTrainWorker") -> list[int]:
    """The processes of Ray Train's workers, or of other actors, below this one."""
    found = []
    for process in _processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (process / "cmdline").read_bytes().startswith(title) and _is_below_this(process):
                found.append(int(process.name))
    return found


def rank_0_of(run: Path, workers: list[int]) -> int:
    """The one of these processes that writes the run's metrics."""
    for pid in workers:
        with contextlib.suppress(OSError):
            if any(os.readlink(file) == str(run / "metrics.jsonl") for file in Path(f"/proc/{pid}/fd").iterdir()):
                return pid
    raise AssertionError(f"none of {workers} writes {run}")


def _processes() -> Iterator[Path]:
    return Path("/proc").glob("[0-9]*")


def _is_below_this(process: Path) -> bool:
    ancestor = int(process.name)
    while ancestor > 1 and ancestor != os.getpid():
        ancestor = int(Path(f"/proc/{ancestor}/stat").read_text().rpartition(")")[2].split()[1])
    return ancestor == os.getpid()
