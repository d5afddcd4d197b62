"""What the figures of `ulm bench engine` rest on: the time of a step, the limit, and processes that stand still."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks._asked import Failed, Process, prompts
from tests.benchmarks._bandwidth import best_s
from tests.benchmarks._decoding import SHORT, TRIES, How, Peers, Weights, first_token_s, step_s

ANSWERS = """
import sys
sys.path.insert(0, {root!r})
from tests.benchmarks._asked import Questions
questions = Questions()
print("a library's greeting")
def spin():
    import threading
    def turn():
        while True: pass
    threading.Thread(target=turn, daemon=True).start()
def fail():
    raise SystemExit("no memory left")
questions.answer_all(double=lambda x: 2 * x, spin=spin, fail=fail)
"""
SPIN_S = 0.5
ONE_TICK_S = 0.02  # what /proc counts in, and once more for the moment before the stop


class ConstantPace:
    """Takes 3 s for prompts, and 0.1 s a step of every answer."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def ask(self, do: str, **question: int) -> float:
        self.seeds.append(question["seed"])
        return 3 + 0.1 * question["new"] * question["batch"]


def process(tmp_path: Path) -> Process:
    code = ANSWERS.format(root=str(Path(__file__).parents[2]))
    return Process([sys.executable, "-c", code], {}, tmp_path / "log")


def test_a_steps_time_holds_nothing_that_comes_once_and_no_prompt_is_asked_twice():
    pace = ConstantPace()
    assert step_s(pace, 4) == pytest.approx(0.4)
    assert first_token_s(pace) == pytest.approx(3.1)
    assert len(set(pace.seeds)) == len(pace.seeds) == 7


class Disturbed:
    """Another program runs during the first short answers: 90 s more."""

    def __init__(self, times: int) -> None:
        self.times = times

    def ask(self, do: str, **question: int) -> float:
        self.times -= question["new"] == SHORT
        return 0.1 * question["new"] + (90 if question["new"] == SHORT and self.times >= 0 else 0)


def test_a_step_that_would_take_less_than_no_time_is_measured_anew_and_then_given_up():
    assert step_s(Disturbed(TRIES - 1), 1) == pytest.approx(0.1)
    with pytest.raises(Failed, match="the machine has other work"):
        step_s(Disturbed(TRIES), 1)


def test_prompts_are_the_same_for_all_who_are_asked_and_never_end_a_text():
    assert prompts(5, 7, 3, seed=4) == prompts(5, 7, 3, seed=4) != prompts(5, 7, 3, seed=5)
    assert {token for prompt in prompts(50, 7, 3, seed=4) for token in prompt} == {1, 2}


def test_the_limit_counts_the_weights_of_every_member_in_the_engines_dtype():
    weights = Weights.of({"parameters": 1_000, "config": {"dtype": "bfloat16"}})
    assert weights.nbytes == 2_000
    assert Weights.of({"parameters": 1_000, "config": {}}).nbytes == 4_000
    assert weights.share(0.5, 40_000.0, members=8) == pytest.approx(0.8)  # 16 kB at 40 kB/s: 0.4 s of the 0.5
    assert "limit 400 ms a step (0 MB of weights at 0.0 GB/s), taken 500 ms: 80% of it" in weights.said(
        [0.5, 0.5, 9.0], [40_000.0, 40_000.0, 40_000.0], members=8
    )


def test_the_best_pass_counts_and_the_first_does_not():
    times = iter([0.0, 3.0, 3.0, 5.0, 5.0, 9.0])
    done = []
    assert best_s(lambda: done.append(1), 3, lambda: next(times)) == 2.0
    assert len(done) == 4


def test_a_peers_best_setting_is_found_and_one_that_fails_is_named(tmp_path):
    peers = Peers("_vllm_peer.py", tmp_path, {}, [])
    fast, slow, broken = How("bfloat16", True), How("float32", False), How("float32", True)
    speeds = {fast: [0.1, 0.3, 0.1], slow: [0.2, 0.2, 0.2]}
    peers.processes = {fast: iter(speeds[fast]), slow: iter(speeds[slow]), broken: None}

    def measure(times):
        if times is None:
            raise Failed("no AMX")
        return next(times)

    for _ in range(3):
        peers.measure("b1", measure)
    best, said = peers.best("b1")
    assert best == speeds[fast]
    assert "bfloat16 compiled 100 ms; float32 eager 200 ms; float32 compiled failed: no AMX" in said


def test_a_process_that_is_not_asked_takes_no_time_of_any_core(tmp_path):
    with process(tmp_path) as spinning:
        spinning.ask("spin")
        before_s = spinning.cpu_s()
        time.sleep(SPIN_S)
        assert spinning.cpu_s() - before_s <= ONE_TICK_S
        assert spinning.ask("double", x=21) == 42


def test_a_process_that_ends_says_its_last_words(tmp_path):
    with process(tmp_path) as failing:
        with pytest.raises(Failed, match="no memory left"):
            failing.ask("fail")


def test_what_libraries_print_is_no_answer_and_memory_is_counted(tmp_path):
    with process(tmp_path) as asked:
        assert asked.ask("double", x=1) == 2
        assert 1_000_000 < asked.pss_bytes() < 1_000_000_000
    assert "a library's greeting" in (tmp_path / "log").read_text()
