"""The queue at work: Ray actors that train one run at a time, and the driver's loop that leases runs to them."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.metrics import Gauge

from pipelines.swarm.queue import Queue, Work
from pipelines.swarm.slots import Node, Shape, shape, slots
from pipelines.train import events, folder, status
from pipelines.train.events import Event
from pipelines.train.job import GUESSES, MISTAKES, POLL_S, ROOM_WAIT_S, Watch, ours
from pipelines.train.legs import TASK
from pipelines.train.loop import train
from pipelines.train.stopping import STOP, request_stop, stopping
from pipelines.train.task import TrainTask
from pipelines.train.worker_job import Exporter, declared
from ulm import runtime
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.errors import ClusterError, TrainingError
from ulm.models.account import on_meta, train_flops_per_token
from ulm.recipes.train import SwarmResources

RunProgress = Callable[[str, int, int, dict[str, Any]], None]  # run, step, steps, the line of metrics.jsonl
COUNT_NODES_EVERY_S = 5.0
log = logging.getLogger(__name__)


class ExpertWorker:
    """An actor of its own process: a run at a time, on the threads or the GPU that it was given."""

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS, which torch has read before
        logging.getLogger("pipelines").setLevel(logging.INFO)
        self._device, self._exporter = runtime.device(device), Exporter()

    def ready(self) -> None:
        """Answers once the process is there."""

    def train(self, task: TrainTask) -> bool:
        """Train a run from its newest checkpoint; whether it was asked to stop before its end, and has saved."""
        try:
            with self._exporter.of(task) as on_step:
                stop = task.folder / STOP
                return train(task, device=self._device, on_step=on_step, should_stop=stop.exists).stopped
        finally:
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # of a GPU that others share


def train_all(
    tasks: Sequence[TrainTask],
    *,
    name: str,
    priorities: Mapping[str, int] | None = None,
    resources: SwarmResources = SwarmResources(),  # noqa: B008  frozen
    parallel: int | None = None,
    on_progress: RunProgress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train every task to its end, each by one worker of this cluster; how the time was spent.

    Returns {"wall_s", "workers": the most at a time, "idle_share": of their time, "lost": workers}. Finished tasks are
    skipped; a lost worker's goes to another in exact order. SIGTERM and Ctrl-C make all save and stop: the runs'
    folders say how far they came. `priorities` by run, `name` is the metrics' tag.

    TrainingError names every run that failed, when the others are finished. ClusterError where there is room for no
    worker, or another process trains one of these runs.
    """
    begun_s = time.monotonic()
    tasks = [task for task in tasks if not folder.is_finished(task)]
    if not tasks:
        return {"wall_s": 0.0, "workers": 0, "idle_share": 0.0, "lost": 0}
    for task in tasks:
        with folder.held(task):  # no other process is at it, which this would disturb
            (task.folder / STOP).unlink(missing_ok=True)
    works = _works(tasks, priorities or {})
    queue = Queue(works, max_restarts=resources.max_restarts)
    crew = _Crew(name, tasks, queue, resources, parallel, _most(works, resources, parallel))
    crew.watches = {
        task.run: Watch(task, partial(on_progress, task.run) if on_progress else None, on_event) for task in tasks
    }
    try:
        with stopping([task.folder for task in tasks], on_event) as is_asked:
            crew.work(is_asked)
    finally:
        crew.end()
    for task in tasks:
        (task.folder / STOP).unlink(missing_ok=True)
    found = {"wall_s": time.monotonic() - begun_s, **crew.figures()}
    text = "%s: %d runs by %d workers in %.0f s, idle for %.1f %% of their time, %d lost"
    log.info(text, name, len(tasks), found["workers"], found["wall_s"], 100 * found["idle_share"], found["lost"])
    if queue.failures and not is_asked.is_set():
        raise failed(queue.failures, len(tasks))
    return found


def failed(whys: Mapping[str, str], of: int) -> TrainingError:
    """The error that ends a job of several runs, once the others are done; why, by run."""
    told = "; ".join(f"{run}: {why.removeprefix(f'{run}: ')}" for run, why in whys.items())
    return TrainingError(
        f"{len(whys)} of {of} runs failed; the others are kept, running it again resumes these: {told}"
    )


def _works(tasks: Sequence[TrainTask], priorities: Mapping[str, int]) -> list[Work]:
    works = []
    for task in tasks:
        held_out = Corpus.open(str(task.corpus), verify=False).num_tokens("val")
        evaluated = held_out if task.train.eval_tokens is None else min(held_out, task.train.eval_tokens)
        works.append(
            Work(
                task.run,
                task.num_steps * task.batch_tokens,
                saved=_saved(task),
                flops_per_token=train_flops_per_token(on_meta(task.spec), task.spec.context_tokens),
                priority=priorities.get(task.run, 0),
                pause_tokens=task.batch_tokens + evaluated,
            )
        )
    return works


def _most(works: Sequence[Work], resources: SwarmResources, parallel: int | None) -> int:
    """Workers beyond which nothing ends sooner: one for each run, and where they share out the CPUs fewer.

    The job is as long as its longest run, so no more then than have enough to do beside that one.
    """
    if parallel is not None:
        return parallel
    costs = [(work.tokens - work.saved) * work.flops_per_token for work in works]
    has_gpus = resources.gpus_per_worker != 0 and ray.cluster_resources().get("GPU", 0.0) > 0
    if has_gpus or resources.cpus_per_worker is not None:
        return len(works)
    return min(len(works), int(-(-sum(costs) // max(costs))))


def _saved(task: TrainTask) -> int:
    newest = store.newest(task.folder)
    return store.step_of(newest) * task.batch_tokens if newest else 0


def _nodes() -> list[Node]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass
class _Member:
    """A worker as the driver sees it: it starts, and then is idle or has a run."""

    name: str
    actor: Any
    has_gpu: bool
    future: Any  # of what it does now; None: nothing
    run: str | None = None


class _Crew:
    """The workers of a queue: started, given runs, heard, ended."""

    def __init__(
        self,
        name: str,
        tasks: Sequence[TrainTask],
        queue: Queue,
        resources: SwarmResources,
        parallel: int | None,
        most: int,
    ) -> None:
        self.watches: dict[str, Watch] = {}
        self._name, self._queue, self._resources = name, queue, resources
        self._tasks = {task.run: task for task in tasks}
        self._at_most, self._most = parallel or len(tasks), most  # the recipe's limit; and what makes sense at first
        nodes = _nodes()
        self._shape: Shape = shape(nodes, resources, most)
        self._first_room = slots(nodes, self._shape, resources, self._at_most).all
        self._members: dict[str, _Member] = {}
        self._names = (f"w{number}" for number in count())
        self._moving: set[str] = set()  # runs that a move has asked to stop
        self._largest, self._num_lost, self._failed_starts = 0, 0, 0
        self._counted_s, self._seen_s = -COUNT_NODES_EVERY_S, 0.0
        self._empty_s: float | None = None  # since when there is no worker
        self._gauges = {kind: declared(Gauge, f"ulm_queue_{kind}") for kind in ("tasks", "workers")}

    def work(self, is_asked: threading.Event) -> None:
        """Until no run waits and none is under way. `is_asked`: all were asked to stop, no further one begins."""
        while not self._queue.is_over:
            if is_asked.is_set():
                self._queue.stop_waiting()
            else:
                self._grow()
                self._lease()
            self._wait(is_asked)
            self._look()
            now = time.monotonic()
            for move in self._queue.overtake(now) if not is_asked.is_set() else ():
                self._moving.add(move.run)
                request_stop(self._tasks[move.run].folder)
                self._say(move.run, "moved", f"{move.slow} saves it for {move.idle}, which will end it sooner")
            for name in self._queue.stuck(now):
                ray.kill(self._members[name].actor)
                self._lose(self._members[name], "has made no step for too long, and was ended")
        self._look(at_once=True)

    def end(self) -> None:
        """End all workers."""
        for member in self._members.values():
            with suppress(RayError):
                ray.kill(member.actor)

    def figures(self) -> dict[str, Any]:
        """What train_all returns of the workers."""
        idle_share = self._queue.idle_share(time.monotonic())
        return {"workers": self._largest, "idle_share": idle_share, "lost": self._num_lost}

    # --- the loop's parts ---

    def _grow(self) -> None:
        """Start workers where there is room and work for them: at first, after losses, on nodes that have come."""
        now = time.monotonic()
        if now - self._counted_s < COUNT_NODES_EVERY_S:
            return
        self._counted_s = now
        room = slots(_nodes(), self._shape, self._resources, self._at_most)
        joined = max(0, room.all - self._first_room)
        # One more than there are runs is started on a node that has come: it may be the faster one.
        has_spare = any(member.run is None for member in self._members.values())
        wanted = min(self._queue.num_open, self._most + joined) + (joined > 0 and not has_spare)
        have = Counter(member.has_gpu for member in self._members.values())
        for has_gpu, number in ((True, room.gpu), (False, room.cpu)):
            while have[has_gpu] < number and have.total() < wanted and not self._starts_fail():
                self._start(has_gpu)
                have[has_gpu] += 1
        self._check_empty(now)

    def _check_empty(self, now: float) -> None:
        if self._members:
            self._empty_s = None
            return
        self._empty_s = self._empty_s or now
        if now - self._empty_s > ROOM_WAIT_S:
            given = self._shape
            needs = f"no node has {given.cpus:g} CPUs and {given.gpus:g} GPUs for a worker"
            raise ClusterError(f"{self._name}: {needs} any more; running it again resumes it")

    def _starts_fail(self) -> bool:
        return self._failed_starts > self._resources.max_restarts

    def _start(self, has_gpu: bool) -> None:
        gpus = self._shape.gpus if has_gpu else 0.0
        actor_class = ray.remote(ExpertWorker).options(
            num_cpus=self._shape.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        name = next(self._names)
        actor = actor_class.remote(self._shape.threads, "cuda" if has_gpu else "cpu")
        self._members[name] = _Member(name, actor, has_gpu, actor.ready.remote())

    def _lease(self) -> None:
        for name in self._queue.idle:
            if (run := self._queue.lease(name, time.monotonic())) is not None:
                member = self._members[name]
                member.run, member.future = run, member.actor.train.remote(self._tasks[run])

    def _wait(self, is_asked: threading.Event) -> None:
        """Until a worker has ended what it does, or it is time to look how far they are."""
        members = {member.future: member for member in self._members.values() if member.future is not None}
        if not members:
            time.sleep(POLL_S)
            return
        ended, _ = ray.wait(list(members), num_returns=1, timeout=POLL_S)
        for future in ended:
            self._settle(members[future], is_asked)

    def _settle(self, member: _Member, is_asked: threading.Event) -> None:
        """Take note of how a worker ended what it did."""
        try:
            has_stopped = ray.get(member.future)
        except RayTaskError as error:
            self._judge(member, error)
            return
        except RayError as error:
            with suppress(RayError):
                ray.kill(member.actor)  # it may be cut off only, and go on
            why = GUESSES.split(str(error).strip().rpartition("\n")[2])[0][:300]
            self._lose(member, f"was lost ({why})")
            return
        run, member.run, member.future = member.run, None, None
        now = time.monotonic()
        if run is None:
            self._failed_starts = 0
            self._queue.join(member.name, now, has_gpu=member.has_gpu)
            self._largest = max(self._largest, self._num_joined())
            return
        self._look_at(run)
        if has_stopped:
            self._queue.returned(run, _saved(self._tasks[run]), now)
        else:
            self._queue.done(run, now)
        self._take_back(run, is_asked.is_set())

    def _num_joined(self) -> int:
        return sum(member.run is not None or member.future is None for member in self._members.values())

    def _judge(self, member: _Member, error: RayTaskError) -> None:
        """An exception of the run itself: one that comes again wherever it is trained fails it, others may not."""
        known, cause, run = ours(error), error.cause, member.run
        is_held = isinstance(known, ClusterError)  # by a worker that was lost and has not quite ended
        if run is None or is_held or not (known or isinstance(cause, MISTAKES)):
            with suppress(RayError):
                ray.kill(member.actor)  # its GPU, say, may be in no state for the next run
            self._lose(member, f"failed ({type(cause).__name__}: {str(cause)[:300]})")
            return
        why = str(known) if known else f"{type(cause).__name__}: {cause}"
        if not known:
            log.error("%s", error)  # with the worker's traceback
        member.run, member.future = None, None
        self._look_at(run)
        self._queue.failed(run, why, time.monotonic())
        self._take_back(run, False)
        if not events.has_failed(self._tasks[run].folder):
            self._say(run, events.FAILED, why)

    def _lose(self, member: _Member, how: str) -> None:
        """A worker is gone; its run goes back to the queue, or has failed."""
        del self._members[member.name]
        self._counted_s = -COUNT_NODES_EVERY_S
        if member.run is None and member.future is not None:  # it never came
            self._failed_starts += 1
            log.warning("%s: worker %s %s while it started", self._name, member.name, how)
            if self._starts_fail() and not self._members:
                raise ClusterError(f"{self._name}: workers do not start, running it again resumes it: the last {how}")
            return
        self._num_lost, self._failed_starts = self._num_lost + 1, 0
        saved = _saved(self._tasks[member.run]) if member.run else 0
        why = f"a worker failed, running it again resumes it: {member.name} {how}"
        run = self._queue.lost(member.name, saved, why, time.monotonic())
        if run is None:
            return
        self._look_at(run)
        self._take_back(run, False)
        if self._queue.state(run) == "failed":
            self._say(run, events.FAILED, why)
        elif (self._tasks[run].folder / TASK).is_file():
            self._say(run, "restart", f"{member.name} {how}; another worker goes on from here")

    def _take_back(self, run: str, keep: bool) -> None:
        """The request to stop that a move has made is met; `keep`: everybody was asked meanwhile."""
        if run in self._moving:
            self._moving.discard(run)
            if not keep:
                (self._tasks[run].folder / STOP).unlink(missing_ok=True)

    def _look(self, *, at_once: bool = False) -> None:
        """Tell the queue, and whoever asked, how far the runs are, and Ray's metrics how the queue is."""
        now = time.monotonic()
        if not at_once and now - self._seen_s < POLL_S:
            return
        self._seen_s = now
        for run in [member.run for member in self._members.values() if member.run is not None]:
            self._look_at(run)
            task = self._tasks[run]
            self._queue.progress(run, status.newest_step(task.folder) * task.batch_tokens, now)
        for state, number in self._queue.by_state().items():
            self._gauges["tasks"].set(number, {"swarm": self._name, "state": state})
        idle = len(self._queue.idle)
        for doing, number in (("idle", idle), ("busy", self._num_joined() - idle)):
            self._gauges["workers"].set(number, {"swarm": self._name, "state": doing})

    def _look_at(self, run: str) -> None:
        self.watches[run].look()

    def _say(self, run: str, kind: str, text: str) -> None:
        task = self._tasks[run]
        events.say(task.folder, folder.newest_step(task)[1], kind, text)
        self._look_at(run)
