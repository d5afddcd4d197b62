"""Who trains what next: runs leased to workers that differ in speed, come, die, and are overtaken.

Plain logic on a clock that the caller gives, in seconds: no Ray, no file. A run is waiting, running (leased to exactly
one worker), done, failed, or stopped. What it has done is told in tokens; the newest checkpoint says how much of that
a lost worker leaves behind.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

State = Literal["waiting", "running", "done", "failed", "stopped"]
STATES: tuple[State, ...] = ("waiting", "running", "done", "failed", "stopped")
STUCK_AFTER_S = 300.0  # without a step, beside what an evaluation takes at the pace measured
START_S = 1_500.0  # more, as long as no pace is known: text is read, a model compiled, a first step may be long
PAUSE_MARGIN = 2.0  # times the tokens between two signs of life, for a pace varies
PACE_WINDOW_S = 120.0  # over which a pace is measured: single steps vary, and a worker may become slow
PACE_MIN_S = 3.0  # a shorter look at a worker says nothing
MOVE_COST_S = 15.0  # of a move: a step to its end, a checkpoint written and read, text mapped, a model built
MOVE_MARGIN = 1.25  # so much sooner must a moved run end: paces are estimates, and runs must not go to and fro
# A worker that has not been measured is held for so many times as fast as the others: else it never would be, where
# no run waits. It is tried on a run that has minutes to go; if it is slower, that run is taken back.
GUESS, GPU_GUESS = 1.5, 5.0  # as its like; a GPU, where only CPU workers have been measured


@dataclass(frozen=True)
class Work:
    """A run, as the queue knows it."""

    run: str
    tokens: int  # in all
    saved: int = 0  # of them are in its newest checkpoint
    flops_per_token: float = 1.0  # so that a worker's paces on two models compare
    priority: int = 0  # higher first; among equals the one with the most left
    pause_tokens: int = 0  # that may pass between two signs of life: a batch, and an evaluation


@dataclass(frozen=True)
class Move:
    """A run to be taken back from a slow worker, for an idle one that will end it sooner."""

    run: str
    slow: str
    idle: str


@dataclass
class _Run:
    work: Work
    tokens: int  # where it stands
    saved: int
    state: State = "waiting"
    worker: str | None = None
    kept_for: str | None = None  # the worker for whom it is, or was, taken back
    is_revoked: bool = False  # its worker has been asked to save and return it
    losses: int = 0  # of workers, since it last saved something new
    why: str = ""  # it failed

    @property
    def flops_left(self) -> float:
        return (self.work.tokens - self.tokens) * self.work.flops_per_token


@dataclass
class _Worker:
    name: str
    has_gpu: bool
    since: float
    run: str | None = None
    leased: float = 0.0
    busy_s: float = 0.0
    heard: float = 0.0  # its last sign of life
    marks: deque[tuple[float, float]] = field(default_factory=deque)  # of this lease: time, FLOPs
    before: float | None = None  # FLOPs a second, on the run before

    @property
    def has_stepped(self) -> bool:
        """Whether it has made a step in this lease. Before, its run is not taken back: each lease brings it on."""
        return len(self.marks) > 1

    def pace(self, now: float | None = None) -> float | None:
        """FLOPs a second until its last step, or until now: then time without a step counts. None: not known yet."""
        if self.has_stepped:
            (first, begun), (last, reached) = self.marks[0], self.marks[-1]
            seconds = (last if now is None else now) - first
            if seconds >= PACE_MIN_S:
                return (reached - begun) / seconds
        return self.before


class Queue:
    """Runs and workers. Every method that names a worker or a run must name one that it knows."""

    def __init__(self, works: Iterable[Work], *, max_restarts: int = 3, stuck_after_s: float | None = None) -> None:
        """`max_restarts`: of a run, after lost workers, without a new checkpoint in between."""
        self._runs = {work.run: _Run(work, work.saved, work.saved) for work in works}
        self._workers: dict[str, _Worker] = {}
        self._max_restarts, self._stuck_after_s = max_restarts, stuck_after_s or STUCK_AFTER_S
        self._busy_s, self._there_s = 0.0, 0.0  # of workers that are gone

    # --- what happens ---

    def join(self, worker: str, now: float, *, has_gpu: bool = False) -> None:
        """A worker is there, and idle."""
        assert worker not in self._workers
        self._workers[worker] = _Worker(worker, has_gpu, now)

    def lease(self, worker: str, now: float) -> str | None:
        """The run that an idle worker begins with, from its newest checkpoint; None: there is none for it now."""
        by = self._workers[worker]
        assert by.run is None
        may = [run for run in self._in("waiting") if run.kept_for in (None, worker)]
        if not may:
            return None
        run = max(may, key=lambda run: (run.work.priority, run.flops_left))
        for other in self._runs.values():
            if other.kept_for == worker:
                other.kept_for = None
        run.state, run.worker = "running", worker
        by.run, by.leased, by.heard = run.work.run, now, now
        by.marks.clear()
        return run.work.run

    def progress(self, name: str, tokens: int, now: float) -> None:
        """Where a running run stands. It may be further back than before: what was not saved is done again."""
        run = self._runs[name]
        assert run.state == "running" and run.worker is not None
        worker, tokens = self._workers[run.worker], min(tokens, run.work.tokens)
        if tokens == run.tokens:
            return
        if tokens < run.tokens:
            worker.marks.clear()
        run.tokens, worker.heard = tokens, now
        worker.marks.append((now, tokens * run.work.flops_per_token))
        while len(worker.marks) > 2 and worker.marks[1][0] < now - PACE_WINDOW_S:
            worker.marks.popleft()

    def done(self, name: str, now: float) -> None:
        """A run has come to its end, which may be an early one."""
        self._end(name, "done", now)
        self._runs[name].tokens = self._runs[name].work.tokens

    def failed(self, name: str, why: str, now: float) -> None:
        """A run cannot go on, whoever trains it. The others do, and so does its worker."""
        self._end(name, "failed", now)
        self._runs[name].why = why

    def returned(self, name: str, saved: int, now: float) -> None:
        """A run was saved before its end and given back, as it was asked to: by a move, or else by somebody else."""
        run = self._runs[name]
        self._end(name, "waiting" if run.is_revoked else "stopped", now)
        run.tokens = run.saved = saved
        run.is_revoked = False

    def lost(self, worker: str, saved: int, why: str, now: float) -> str | None:
        """A worker is gone; the run it had, which waits again, or has failed after too many losses without progress.

        `saved` is what that run's newest checkpoint holds.
        """
        name = self._workers[worker].run
        if name is not None:
            run = self._runs[name]
            run.losses = 1 if saved > run.saved else run.losses + 1
            self._end(name, "failed" if run.losses > self._max_restarts else "waiting", now)
            run.tokens, run.saved, run.is_revoked, run.why = saved, saved, False, why
        gone = self._workers.pop(worker)
        self._busy_s, self._there_s = self._busy_s + gone.busy_s, self._there_s + now - gone.since
        for run in self._runs.values():
            if run.kept_for == worker:
                run.kept_for = None
        return name

    def stop_waiting(self) -> None:
        """Nobody begins a run any more."""
        for run in self._in("waiting"):
            run.state = "stopped"

    # --- what to do ---

    def overtake(self, now: float) -> list[Move]:
        """Runs to take back, one for each idle worker that would end one sooner; their workers are then to save it.

        They return each by `returned`, and it is kept for the idle worker, unless that has found something else.
        """
        if any(run.kept_for is None for run in self._in("waiting")):
            return []
        promised = {run.kept_for for run in self._runs.values()}
        paces = {w.name: pace for w in self._workers.values() if (pace := self._pace(w, now))}
        idle = [w for w in self._workers.values() if w.run is None and w.name in paces and w.name not in promised]
        moves = []
        for worker in sorted(idle, key=lambda worker: -paces[worker.name]):
            gains = {}
            for run in self._in("running"):
                if not run.is_revoked and run.worker in paces and self._workers[run.worker].has_stepped:
                    ends_s = run.flops_left / paces[worker.name] + MOVE_COST_S
                    gains[run.work.run] = run.flops_left / paces[run.worker] - MOVE_MARGIN * ends_s
            best = max(gains, key=gains.__getitem__, default=None)
            if best is not None and gains[best] > 0:
                run = self._runs[best]
                assert run.worker is not None
                run.is_revoked, run.kept_for = True, worker.name
                moves.append(Move(best, run.worker, worker.name))
        return moves

    def stuck(self, now: float) -> list[str]:
        """Workers that have made no step for longer than an evaluation and much more can take: to be ended as lost."""
        found = []
        for run in self._in("running"):
            assert run.worker is not None
            worker = self._workers[run.worker]
            pace = worker.pace()
            pause_s = PAUSE_MARGIN * run.work.pause_tokens * run.work.flops_per_token / pace if pace else START_S
            if now - worker.heard > self._stuck_after_s + pause_s:
                found.append(worker.name)
        return found

    # --- where it stands ---

    @property
    def is_over(self) -> bool:
        """Whether no run waits and none is under way."""
        return not any(run.state in ("waiting", "running") for run in self._runs.values())

    @property
    def num_open(self) -> int:
        """Runs that wait or are under way."""
        return sum(run.state in ("waiting", "running") for run in self._runs.values())

    @property
    def idle(self) -> list[str]:
        """Workers without a run, in the order in which they came."""
        return [worker.name for worker in self._workers.values() if worker.run is None]

    @property
    def failures(self) -> dict[str, str]:
        """Why, by run that failed."""
        return {run.work.run: run.why for run in self._in("failed")}

    def state(self, name: str) -> State:
        """Of a run."""
        return self._runs[name].state

    def by_state(self) -> dict[State, int]:
        """How many runs there are in every state."""
        counted = Counter(run.state for run in self._runs.values())
        return {state: counted[state] for state in STATES}

    def idle_share(self, now: float) -> float:
        """Of the time that workers were there, gone ones included, the share in which they had no run."""
        busy_s, there_s = self._busy_s, self._there_s
        for worker in self._workers.values():
            busy_s += worker.busy_s + (now - worker.leased if worker.run is not None else 0.0)
            there_s += now - worker.since
        return 1 - busy_s / there_s if there_s else 0.0

    # --- inside ---

    def _in(self, state: State) -> Iterator[_Run]:
        return (run for run in list(self._runs.values()) if run.state == state)

    def _end(self, name: str, state: State, now: float) -> None:
        """A run leaves its worker."""
        run = self._runs[name]
        assert run.state == "running" and run.worker is not None
        worker = self._workers[run.worker]
        worker.before, worker.run = worker.pace(), None
        worker.busy_s += now - worker.leased
        worker.marks.clear()
        run.state, run.worker = state, None
        if state != "waiting":
            run.kept_for = None

    def _pace(self, worker: _Worker, now: float) -> float | None:
        """FLOPs a second: measured, else a guess from what its like do. None: nobody has been measured."""
        if (own := worker.pace(now)) is not None:
            return own
        others = [(other.has_gpu, pace) for other in self._workers.values() if (pace := other.pace(now))]
        if like := [pace for has_gpu, pace in others if has_gpu == worker.has_gpu]:
            return GUESS * statistics.median(like)
        return GPU_GUESS * statistics.median(pace for _, pace in others) if worker.has_gpu and others else None
