from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipelines.train.events import Event
from ulm.cli import console

FIGURES = {"loss": 2.3456, "tokens_per_second": 12_345.6, "mfu": 0.357}


@pytest.fixture
def clock(monkeypatch):
    """The time that the bars see."""
    clock = SimpleNamespace(now_s=1_000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def screen(monkeypatch, width: int, *, is_terminal: bool) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(
        console, "err", Console(file=file, width=width, force_terminal=is_terminal, highlight=False, color_system=None)
    )
    return file


def last_frame(file: io.StringIO) -> str:
    return [line for line in file.getvalue().replace("\r", "\n").splitlines() if "━" in line][-1].rstrip()


@pytest.mark.parametrize(
    ("width", "run", "shown"),
    [
        (80, "shake", r"shake [━╸]+ +500/1,000 -:--:-- loss 2\.346 1\.500 bpb 12k tok/s 36% MFU"),
        (80, "shakespeare-base", r"shakespeare-base [━╸]+ +500/1,000 -:--:-- loss 2\.346 1\.500 bpb 12k tok/s.*"),
        (120, "shake", r"shake +[━╸]{12} +500/1,000 0:00:0\d -:--:-- loss 2\.346 1\.500 bpb 12k tok/s 36% MFU"),
    ],
)
def test_a_bar_of_training_fits_the_terminal(monkeypatch, clock, width, run, shown):
    file = screen(monkeypatch, width, is_terminal=True)
    with console.bars() as bars:
        bars.step(run, 499, 1_000, {**FIGURES, "bits_per_byte": 1.5})
        clock.now_s += 1
        bars.step(run, 500, 1_000, FIGURES)
        bars._progress.refresh()
        frame = last_frame(file).rpartition("\x1b[2K")[2]
    assert re.fullmatch(shown, frame.rstrip()) and len(frame) <= width


def test_bits_per_byte_stay_in_the_bar_until_the_next_evaluation(monkeypatch, clock):
    file = screen(monkeypatch, 200, is_terminal=False)
    with console.bars() as bars:
        for step in range(1, 11):
            clock.now_s += 3
            bars.step("a", step, 10, {**FIGURES, **({"bits_per_byte": step / 4} if step % 4 == 0 else {})})
    lines = file.getvalue().splitlines()
    assert [line.partition("loss 2.346 ")[2].partition(" tok/s")[0] for line in lines if "loss" in line] == [
        "12k", "12k", "1.000 bpb 12k", "1.000 bpb 12k", "1.000 bpb 12k", "1.000 bpb 12k",
        "2.000 bpb 12k", "2.000 bpb 12k", "2.000 bpb 12k",
    ]  # fmt: skip


def test_steps_of_ten_milliseconds_are_drawn_twice_a_second(monkeypatch, clock):
    screen(monkeypatch, 80, is_terminal=True)
    with console.bars() as bars:
        moved = []
        update = bars._progress.update
        bars._progress.update = lambda task, **fields: (moved.append(fields["completed"]), update(task, **fields))
        for step in range(1, 1_001):
            clock.now_s += 0.01
            bars.step("a", step, 1_000, FIGURES)
    assert moved[-1] == 1_000 and len(moved) <= 22


def test_without_a_terminal_a_line_says_how_far_it_is_each_tenth_and_each_half_minute(monkeypatch, clock):
    file = screen(monkeypatch, 80, is_terminal=False)
    with console.bars() as bars:
        for step in range(1, 101):  # a second each: tenths
            clock.now_s += 1
            bars.step("quick", step, 100, FIGURES)
        for step in range(1, 11):  # of a run of weeks
            clock.now_s += 20
            bars.step("slow", step, 100_000, FIGURES)
    lines = file.getvalue().splitlines()
    quick = [line.split()[1] for line in lines if line.startswith("quick")]
    assert quick == [f"{n}/100" for n in (9, 19, 29, 39, 49, 59, 69, 79, 89, 99, 100)]
    assert lines[0] == "quick  9/100  loss 2.346 12k tok/s 36% MFU  0:01:31 left"
    assert lines[quick.index("100/100")] == "quick  100/100  loss 2.346 12k tok/s 36% MFU"
    assert [line.split()[1] for line in lines if line.startswith("slow")] == [f"{n}/100,000" for n in (3, 5, 7, 9)]


def test_short_work_without_a_terminal_is_one_line_at_its_end(monkeypatch, clock):
    file = screen(monkeypatch, 80, is_terminal=False)
    with console.bars() as bars:
        for done in range(51):
            clock.now_s += 0.01
            bars.update("tokenize", done, 50)
        bars.update("tokenize", 50, 50)
    assert file.getvalue() == "tokenize  50/50\n"


def test_the_time_left_of_a_resumed_run_is_of_the_steps_made_now(monkeypatch, clock):
    file = screen(monkeypatch, 80, is_terminal=False)
    with console.bars() as bars:
        bars.step("a", 500, 1_000, FIGURES)
        clock.now_s += 30  # workers are started, a model is compiled
        bars.step("a", 501, 1_000, FIGURES)
        clock.now_s += 50
        bars.step("a", 601, 1_000, FIGURES)
    assert "601/1,000" in file.getvalue() and file.getvalue().endswith("0:03:20 left\n")  # 399 steps of half a second


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_happens_to_a_run_is_said_above_its_bar_and_cannot_command_the_terminal(monkeypatch, clock, is_terminal):
    file = screen(monkeypatch, 120, is_terminal=is_terminal)
    with console.bars() as bars:
        bars.step("a", 1, 10, FIGURES)
        bars.event("a", Event(0.0, 1_230, "rollback", "loss [red]14.5[/] is \x1b[2Jmore\u202e than usual"))
    assert "a  step 1,230  rollback: loss [red]14.5[/] is \ufffd[2Jmore\ufffd than usual" in file.getvalue()
