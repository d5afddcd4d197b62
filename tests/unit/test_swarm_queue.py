"""The queue of runs on a virtual clock, with random workers, speeds, deaths and failures; and the room for workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.swarm.queue import MOVE_COST_S, START_S, Move, Queue, Work
from pipelines.swarm.slots import Shape, Slots, shape, slots
from ulm.errors import ClusterError, ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmRecipe, SwarmResources

TICK_S = 1.0
MAX_RESTARTS = 2
NODE = {"CPU": 4.0, "memory": 1e10}


@dataclass
class Worker:
    """A worker of the simulation. It trains `speed` tokens a second, begins after `start_s`, and may die."""

    name: str
    speed: int
    has_gpu: bool
    comes_s: float
    dies_s: float
    run: str | None = None
    starts_s: float = 0.0
    tokens: int = 0  # of the run that it has


@dataclass
class Simulation:
    """A driver and its workers, a second at a time, with what must hold checked at every one."""

    works: list[Work]
    workers: list[Worker]
    fails_at: dict[str, int]  # runs that fail whoever trains them, and after how many tokens
    save_every: int
    start_s: float = 2.0
    moves: list[Move] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # a run that is taken back, and the idle worker it is for
    trained: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # by run, what was saved: from, to
    ended: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)  # runs in the order in which they were first leased
    now: float = 0.0

    def run(self, until_s: float = 5_000.0) -> Queue:
        """Until nothing is left to do; workers that die are replaced by their like a little later."""
        self.saved = {work.run: work.saved for work in self.works}
        self.of = {work.run: work for work in self.works}
        queue = self.queue = Queue(self.works, max_restarts=MAX_RESTARTS)
        stopping: set[str] = set()
        there: list[Worker] = []
        coming = sorted(self.workers, key=lambda worker: worker.comes_s)
        while not queue.is_over and self.now < until_s:
            while coming and coming[0].comes_s <= self.now:
                there.append(worker := coming.pop(0))
                queue.join(worker.name, self.now, has_gpu=worker.has_gpu)
            for worker in list(there):
                if worker.dies_s <= self.now:
                    there.remove(worker)
                    self._forget(worker.name)
                    if worker.run is not None:
                        stopping.discard(worker.run)
                    queue.lost(worker.name, self.saved.get(worker.run or "", 0), "died", self.now)
            self._lease(there)
            self.now += TICK_S
            for worker in there:
                if worker.run is not None and self.now >= worker.starts_s:
                    self._train(worker, stopping)
            for move in queue.overtake(self.now):
                waiting = [w.run for w in self.works if queue.state(w.run) == "waiting"]
                assert set(waiting) <= self.kept.keys(), "a run is taken from somebody while another could be begun"
                assert move.idle in queue.idle
                assert next(worker for worker in there if worker.name == move.slow).run == move.run
                stopping.add(move.run)
                self.moves.append(move)
                self.kept[move.run] = move.idle
            assert not queue.stuck(self.now), "all of them make steps"
        return queue

    def _forget(self, worker: str) -> None:
        self.kept = {run: name for run, name in self.kept.items() if name != worker}

    def _lease(self, there: list[Worker]) -> None:
        for name in self.queue.idle:
            waiting = [w for w in self.works if self.queue.state(w.run) == "waiting"]
            run = self.queue.lease(name, self.now)
            may = [w for w in waiting if self.kept.get(w.run, name) == name]
            if run is None:
                assert not may, "an idle worker waits while a run waits that it may take"
                continue
            self._forget(name)
            assert [worker.name for worker in there if worker.run == run] == [], "two workers on one run"
            assert self.of[run] in may
            assert self.of[run].priority == max(work.priority for work in may)
            if run not in self.first:
                self.first.append(run)
            worker = next(worker for worker in there if worker.name == name)
            worker.run, worker.starts_s, worker.tokens = run, self.now + self.start_s, self.saved[run]

    def _train(self, worker: Worker, stopping: set[str]) -> None:
        run = worker.run
        assert run is not None
        work, before = self.of[run], worker.tokens
        worker.tokens = min(work.tokens, worker.tokens + worker.speed)
        fails = self.fails_at.get(run)
        if fails is not None and worker.tokens >= fails:
            self.queue.failed(run, "it fails", self.now)
            worker.run = None
        elif worker.tokens == work.tokens:
            self._save(run, worker.tokens)
            self.queue.done(run, self.now)
            self.ended.append(run)
            worker.run = None
        elif run in stopping:
            self._save(run, worker.tokens)
            self.queue.returned(run, worker.tokens, self.now)
            worker.run = None
        else:
            if worker.tokens // self.save_every > before // self.save_every:
                self._save(run, worker.tokens)
            self.queue.progress(run, worker.tokens, self.now)
        if worker.run is None:
            stopping.discard(run)
            if self.queue.state(run) != "waiting":
                self.kept.pop(run, None)

    def _save(self, run: str, tokens: int) -> None:
        assert tokens > self.saved[run]
        self.trained.setdefault(run, []).append((self.saved[run], tokens))
        self.saved[run] = tokens


worker_of = st.tuples(
    st.integers(5, 200),  # tokens a second
    st.booleans(),
    st.floats(0, 200),
    st.one_of(st.just(float("inf")), st.floats(0, 300)),  # seconds that it lives
)
work_of = st.tuples(st.integers(1, 8_000), st.integers(-2, 2), st.sampled_from([1.0, 3.0]))


@settings(max_examples=150, deadline=None)
@example(  # a run waits for the worker that it was taken back for, while another is taken back for a second one
    works=[(127, 0, 1.0), (1_981, 0, 3.0)],
    workers=[(5, False, 1.0, float("inf")), (5, False, 1.0, float("inf")), (17, False, 0.0, float("inf"))],
    failing={},
    save_every=50,
)
@given(
    works=st.lists(work_of, min_size=1, max_size=8),
    workers=st.lists(worker_of, min_size=1, max_size=6),
    failing=st.dictionaries(st.integers(0, 7), st.integers(1, 5_000), max_size=2),
    save_every=st.integers(50, 3_000),
)
def test_every_run_that_can_end_ends_once_by_one_worker_at_a_time_and_nothing_is_done_twice(
    works, workers, failing, save_every
):
    of = [Work(f"r{n}", tokens, 0, cost, priority) for n, (tokens, priority, cost) in enumerate(works)]
    crew = [
        Worker(f"w{n}", speed, has_gpu, comes_s, comes_s + lives_s)
        for n, (speed, has_gpu, comes_s, lives_s) in enumerate(workers)
    ]
    crew.append(Worker("last", 50, False, 300.0, float("inf")))  # so that somebody is always left
    fails_at = {f"r{n}": min(tokens, of[n].tokens) for n, tokens in failing.items() if n < len(of)}
    simulation = Simulation(of, crew, fails_at, save_every)
    queue = simulation.run()
    assert queue.is_over
    assert len(simulation.ended) == len(set(simulation.ended))
    for work in of:
        if queue.state(work.run) == "done":
            assert work.run in simulation.ended
            pieces = simulation.trained[work.run]
            assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
            assert pieces[-1][1] == work.tokens
        else:
            assert queue.state(work.run) == "failed"
            if queue.failures[work.run] == "it fails":
                assert work.run in fails_at
            else:  # more workers died on it, one after another, than it may lose
                assert queue.failures[work.run] == "died" and sum(w.dies_s < float("inf") for w in crew) > MAX_RESTARTS
    assert sum(queue.by_state().values()) == len(of)
    assert 0 <= queue.idle_share(simulation.now) <= 1


def test_higher_priorities_go_first_and_among_equals_the_longest() -> None:
    works = [Work("a", 10), Work("b", 30), Work("c", 20, priority=1), Work("d", 40, priority=-1), Work("e", 20, 0, 2.0)]
    simulation = Simulation(works, [Worker("w", 10, False, 0.0, float("inf"))], {}, 100)
    assert simulation.run().by_state()["done"] == 5
    assert simulation.first == ["c", "e", "b", "a", "d"]


def test_a_run_is_lost_without_progress_only_so_often_and_each_new_checkpoint_counts_anew() -> None:
    queue = Queue([Work("fragile", 100), Work("other", 50)], max_restarts=2)
    for number, saved in enumerate([0, 0, 10, 10, 20, 20]):
        queue.join(f"w{number}", 0.0)
        assert queue.lease(f"w{number}", 0.0) == "fragile"
        assert queue.lost(f"w{number}", saved, "its process died", 1.0) == "fragile"
        assert queue.state("fragile") == "waiting"
    queue.join("last", 0.0)
    assert queue.lease("last", 0.0) == "fragile"
    queue.lost("last", 20, "its process died", 1.0)
    assert queue.failures == {"fragile": "its process died"}
    queue.join("next", 0.0)
    assert queue.lease("next", 0.0) == "other", "the rest goes on"


def paced(*paces: float, tokens: int = 10_000, gpu: int | None = None) -> Queue:
    """A run for each worker, all under way for ten seconds at these tokens a second; the last has ended its run."""
    queue = Queue([Work(f"r{n}", tokens - n) for n in range(len(paces))])
    for n in range(len(paces)):
        queue.join(f"w{n}", 0.0, has_gpu=n == gpu)
        assert queue.lease(f"w{n}", 0.0) == f"r{n}"
    for now in range(11):
        for n, pace in enumerate(paces):
            queue.progress(f"r{n}", 1 + int(pace * now), float(now))
    queue.done(f"r{len(paces) - 1}", 10.0)
    return queue


def test_an_idle_worker_takes_over_what_it_ends_sooner_and_the_slow_one_returns_it_first() -> None:
    queue = paced(10.0, 100.0)
    assert queue.overtake(10.0) == [Move("r0", "w0", "w1")]
    assert queue.overtake(10.0) == [], "once"
    assert queue.lease("w1", 10.0) is None, "it is still with the slow one"
    queue.returned("r0", 130, 11.0)
    assert queue.lease("w0", 11.0) is None, "it is kept for the one that is faster"
    assert queue.lease("w1", 11.0) == "r0"
    assert queue.overtake(12.0) == [], "not back again"


def test_what_is_nearly_done_or_would_not_end_sooner_stays_where_it_is() -> None:
    assert paced(100.0, 100.0).overtake(10.0) == []
    left_s = MOVE_COST_S / 2
    assert paced(10.0, 1_000.0, tokens=int(100 + 10 * left_s)).overtake(10.0) == []
    slow_one = paced(100.0, 10.0)
    assert slow_one.overtake(10.0) == []


def test_a_worker_that_became_slow_is_overtaken_by_its_like() -> None:
    queue = paced(50.0, 50.0)
    assert queue.overtake(10.0) == []
    for now in range(11, 300):
        queue.progress("r0", 501 + (now - 10), float(now))
    assert queue.overtake(300.0) == [Move("r0", "w0", "w1")]


def test_a_gpu_that_comes_overtakes_a_cpu_worker_before_it_has_been_measured() -> None:
    queue = Queue([Work("r", 10_000)])
    queue.join("cpu", 0.0)
    queue.lease("cpu", 0.0)
    for now in range(5):
        queue.progress("r", 1 + 10 * now, float(now))
    queue.join("like", 4.0)
    queue.join("gpu", 4.0, has_gpu=True)
    assert queue.overtake(4.0) == [Move("r", "cpu", "gpu")]


@pytest.mark.parametrize(("tokens", "is_tried"), [(1_000, False), (3_000, True)])
def test_a_worker_that_has_not_been_measured_is_tried_on_a_run_with_minutes_to_go(tokens: int, is_tried: bool) -> None:
    queue = Queue([Work("r", tokens)])
    queue.join("known", 0.0)
    queue.lease("known", 0.0)
    for now in range(5):
        queue.progress("r", 1 + 10 * now, float(now))
    queue.join("new", 4.0)
    assert queue.overtake(4.0) == ([Move("r", "known", "new")] if is_tried else [])
    if is_tried:
        queue.returned("r", 50, 5.0)
        assert queue.lease("new", 5.0) == "r"
        for now in range(10, 20):
            queue.progress("r", 51 + (now - 10), float(now))
        assert queue.overtake(20.0) == [Move("r", "new", "known")], "it is ten times slower"


@pytest.mark.parametrize("how", ["the slow one dies", "the idle one dies", "the idle one finds other work"])
def test_a_run_that_was_to_move_is_lost_in_no_case(how: str) -> None:
    queue = paced(10.0, 12.0, 100.0)
    assert queue.overtake(10.0) == [Move("r0", "w0", "w2")]
    if how == "the slow one dies":
        queue.lost("w0", 50, "died", 11.0)
        assert queue.lease("w2", 11.0) == "r0"
        return
    if how == "the idle one dies":
        queue.lost("w2", 0, "died", 11.0)
        queue.returned("r0", 130, 12.0)
        assert queue.lease("w0", 12.0) == "r0"
        return
    queue.lost("w1", 0, "died", 11.0)
    assert queue.lease("w2", 11.0) == "r1"
    queue.returned("r0", 130, 12.0)
    assert queue.lease("w0", 12.0) == "r0"


def test_a_run_is_not_taken_back_before_its_worker_has_brought_it_on() -> None:
    queue = paced(10.0, 100.0)
    queue.overtake(10.0)
    queue.returned("r0", 130, 11.0)
    assert queue.lease("w1", 11.0) == "r0"
    queue.join("new", 11.0, has_gpu=True)
    assert queue.overtake(12.0) == []
    for now in (12, 13):
        queue.progress("r0", 130 + 100 * (now - 11), float(now))
    assert queue.overtake(13.0) == [Move("r0", "w1", "new")]


def test_a_move_makes_the_job_end_sooner() -> None:
    works = [Work("long", 40_000), Work("short", 30_000)]
    workers = [Worker("slow", 20, False, 0.0, float("inf")), Worker("fast", 400, False, 0.0, float("inf"))]
    simulation = Simulation(works, workers, {}, 10_000)
    assert simulation.run().by_state()["done"] == 2
    assert [(move.run, move.idle) for move in simulation.moves] == [("long", "fast")]
    assert simulation.now < 250, "of 2,000 seconds on the slow one"


def test_a_worker_is_stuck_when_it_makes_no_step_for_longer_than_an_evaluation_takes() -> None:
    queue = Queue([Work("r", 10_000, pause_tokens=1_000)], stuck_after_s=30.0)
    queue.join("w", 0.0)
    queue.lease("w", 0.0)
    assert queue.stuck(29.0 + START_S) == [], "its pace is not known yet"
    assert queue.stuck(31.0 + START_S) == ["w"]
    for now in range(100, 111):
        queue.progress("r", 10 * now, float(now))
    assert queue.stuck(110.0 + 229.0) == [], "an evaluation of 1,000 tokens takes 100 s at its pace, perhaps twice that"
    assert queue.stuck(110.0 + 231.0) == ["w"]


def test_steps_that_are_done_again_after_a_loss_are_signs_of_life_and_no_progress() -> None:
    queue = Queue([Work("r", 1_000)], stuck_after_s=30.0)
    queue.join("a", 0.0)
    queue.lease("a", 0.0)
    for now in range(11):
        queue.progress("r", 1 + 10 * now, float(now))
    queue.lost("a", 50, "died", 11.0)
    queue.join("b", 11.0)
    assert queue.lease("b", 11.0) == "r"
    queue.progress("r", 101, 12.0)  # the file still has the lines that were lost
    for now in range(20, 60):
        queue.progress("r", 50 + (now - 20), float(now))
    assert queue.stuck(60.0) == []
    assert queue.state("r") == "running"


def test_when_all_are_asked_to_stop_nobody_begins_a_run() -> None:
    queue = Queue([Work("a", 10), Work("b", 5)])
    queue.join("w", 0.0)
    queue.lease("w", 0.0)
    queue.stop_waiting()
    queue.returned("a", 4, 1.0)
    assert queue.is_over and queue.lease("w", 1.0) is None
    assert queue.by_state() == {"waiting": 0, "running": 0, "done": 0, "failed": 0, "stopped": 2}


def test_idle_time_is_a_share_of_the_time_that_workers_were_there() -> None:
    queue = Queue([Work("a", 10), Work("b", 5)])
    queue.join("w", 0.0)
    queue.join("v", 10.0)
    queue.lease("w", 2.0)
    queue.done("a", 6.0)  # 4 of 20
    queue.lease("v", 10.0)
    queue.lost("v", 0, "died", 14.0)  # 4 of 4
    assert queue.idle_share(20.0) == pytest.approx(1 - 8 / 24)


# --- room ---


def resources(**fields: object) -> SwarmResources:
    return validate(SwarmResources, fields)


@pytest.mark.parametrize(
    ("nodes", "given", "most", "each", "number"),
    [
        ([NODE], {}, 4, Shape(1, 0), Slots(0, 4)),
        ([NODE], {}, 2, Shape(2, 0), Slots(0, 2)),
        ([NODE], {}, 3, Shape(1, 0), Slots(0, 3)),
        ([NODE, {"CPU": 2.0}], {}, 2, Shape(2, 0), Slots(0, 2)),
        ([NODE], {"cpus_per_worker": 0.5}, 10, Shape(0.5, 0), Slots(0, 8)),
        ([{"CPU": 16.0, "GPU": 1.0}], {}, 8, Shape(16, 1), Slots(1, 0)),
        ([{"CPU": 16.0, "GPU": 1.0}], {"gpus_per_worker": 0.1}, 20, Shape(1, 0.1), Slots(10, 0)),
        ([{"CPU": 16.0, "GPU": 1.0}], {"gpus_per_worker": 0.25}, 8, Shape(4, 0.25), Slots(4, 0)),
        ([{"CPU": 16.0, "GPU": 1.0}], {"gpus_per_worker": 0.3, "cpu_workers": 1}, 8, Shape(4, 0.3), Slots(3, 1)),
        ([{"CPU": 8.0, "GPU": 1.0}, NODE], {"cpu_workers": 2, "cpus_per_worker": 4}, 8, Shape(4, 1), Slots(1, 2)),
        ([{"CPU": 8.0, "GPU": 2.0}], {"cpu_workers": 2}, 2, Shape(4, 1), Slots(2, 0)),
        ([{"CPU": 8.0, "GPU": 1.0}], {"gpus_per_worker": 0}, 4, Shape(2, 0), Slots(0, 4)),
    ],
)
def test_a_cluster_has_room_for_so_many_workers_of_such_a_shape(nodes, given, most, each, number) -> None:
    assert shape(nodes, resources(**given), most) == each
    assert slots(nodes, each, resources(**given), most) == number


def test_without_room_for_one_worker_the_error_says_what_is_missing() -> None:
    with pytest.raises(ClusterError, match="a worker needs 8 CPUs and 0 GPUs, the cluster has 4 and 0; give a worker"):
        shape([NODE], resources(cpus_per_worker=8), 4)


# --- the recipe's part ---


def swarm_recipe(**fields: object) -> SwarmRecipe:
    train = {"steps": 40, "batch_tokens": 256, "context_tokens": 64, **fields.pop("train", {})}  # type: ignore[dict-item]
    return validate(SwarmRecipe, {"name": "t", "corpus": "tiny", "experts": 3, "train": train, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priorities": {"e03": 1}}, r"priorities\.e03: no such run in this recipe \(did you mean 'e02'\?\)|e00"),
        ({"priorities": {"r00": 1}}, r"priorities\.r00: no such run"),
        ({"controls": [], "priorities": {"dense": 1}}, r"priorities\.dense: no such run"),
        ({"resources": {"cpu_workers": 1}, "train": {"workers": 2}}, r"resources\.cpu_workers: 1, but train\.workers"),
        ({"resources": {"cpu_workers": 1, "gpus_per_worker": 0}}, r"resources\.cpu_workers: no worker has a GPU"),
    ],
)
def test_a_queue_that_cannot_be_is_refused_by_the_recipe(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        swarm_recipe(**fields)


def test_a_recipe_names_runs_by_their_member_or_control() -> None:
    told = {"e02": 5, "dense": -1, "r01": 2}
    assert swarm_recipe(controls=["dense", "random"], priorities=told).priorities == told
