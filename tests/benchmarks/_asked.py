"""Processes that a benchmark asks by turns: a question is one line of JSON on stdin, its answer one on stdout.

Each starts once and stands still (SIGSTOP) whenever it is not asked: no thread of a peer spins on a core that another
is measured on. Needs nothing but Python, so that a peer of any environment can be asked.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.benchmarks._figures import Failed

ANSWER_WITHIN_S = 600  # the first answer of a peer waits for its compiler
CLOSE_WITHIN_S = 10


class Asked(Protocol):
    """Who answers questions: a process, or in a test a function."""

    def ask(self, do: str, **question: object) -> Any:
        """The answer."""
        ...


class Process:
    """A process that answers questions with `answer_all`, and stands still in between."""

    def __init__(self, command: Sequence[object], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [str(word) for word in command],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        atexit.register(self.close)  # one that stands still would not see that nobody will ask it any more

    @property
    def pid(self) -> int:
        """Its number."""
        return self._child.pid

    def ask(self, do: str, **question: object) -> Any:
        """What it answers. Raises Failed where it ends, or does not answer within ten minutes."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.send_signal(signal.SIGCONT)
            self._child.stdin.write(json.dumps({"do": do, **question}).encode() + b"\n")
            ready, _, _ = select.select([self._child.stdout], [], [], ANSWER_WITHIN_S)
            line = self._child.stdout.readline() if ready else b""
            self._child.send_signal(signal.SIGSTOP)
        except OSError as error:
            line, ready = b"", [error]
        if not line:
            self.close()
            said = self._log.read_text(errors="replace").strip()[-300:]
            raise Failed(said if ready else f"no answer within {ANSWER_WITHIN_S} s: {said}")
        return json.loads(line)

    def cpu_s(self) -> float:
        """Seconds of processor time that it has had so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def pss_bytes(self) -> int:
        """Its proportional set size now, and that of the processes that it started."""
        return sum(_pss_bytes(pid) for pid in _with_children(self.pid))

    def close(self) -> None:
        """End it, gently if it can be."""
        atexit.unregister(self.close)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.send_signal(signal.SIGCONT)
        self._child.stdin.close()
        try:
            self._child.wait(CLOSE_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # a child that ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


class Questions:
    """The asked side. Make it before anything that may print: stdout then belongs to the answers alone."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to the log

    def answer_all(self, **functions: Callable[..., object]) -> None:
        """Answer every question with the function that it names, until nobody asks any more."""
        for line in sys.stdin:
            question = json.loads(line)
            answer = functions[question.pop("do")](**question)
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def prompts(number: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """So many prompts of random tokens, the same for all who are asked; token 0, <|endoftext|>, is not among them."""
    chance = random.Random(seed)
    return [[chance.randrange(1, vocab_size) for _ in range(num_tokens)] for _ in range(number)]
