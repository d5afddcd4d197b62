"""How fast this machine's memory can be read, as limit for what has to read all weights in every step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

READ_BYTES = 400_000_000  # many times a CPU's last cache, and a GPU's
PASSES = 6
ROW = 10_000


def read_bandwidth(threads: int) -> float:
    """Bytes a second that all threads read together: the best pass of the fastest of three sums.

    None is always the fastest; with AVX-512 the best reaches what a loop in C of nothing but additions does.
    """
    torch.set_num_threads(threads)
    numbers_C = torch.ones(READ_BYTES // 4)
    numbers_NC, ones_C = numbers_C.view(-1, ROW), torch.ones(ROW)
    sums = (
        lambda: torch.dot(numbers_C, numbers_C),
        lambda: numbers_NC.sum(1),
        lambda: torch.mv(numbers_NC, ones_C),
    )
    return max(READ_BYTES / best_s(one_sum, PASSES) for one_sum in sums)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a GPU's memory moves in a copy from itself to itself: read and written ones."""
    source_C = torch.ones(10 * READ_BYTES // 4, device=device)
    target_C = torch.empty_like(source_C)

    def copy() -> None:
        target_C.copy_(source_C)
        torch.cuda.synchronize(device)

    return 2 * source_C.nbytes / best_s(copy, PASSES)


def best_s(work: Callable[[], object], passes: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of so many passes, after one that does not count."""
    work()
    seconds = []
    for _ in range(passes):
        started_s = clock()
        work()
        seconds.append(clock() - started_s)
    return min(seconds)
