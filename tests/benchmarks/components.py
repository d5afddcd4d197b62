"""Group `components`: what every kind of attention costs beside dense attention, as rows get longer.

Run by `ulm bench components` in a checkout. About two minutes on two cores. One layer alone, d_model 256 and 8 heads
of 32, rotary positions, one row, float32, a window of 256 tokens; dense is kind gqa, plainly causal, through PyTorch's
SDPA. All kinds take their turns in one process; only peaks of memory are taken in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import ulm
from tests.benchmarks._figures import report
from tests.benchmarks._one_layer import STEPS, Layer, pass_bytes, pass_seconds
from ulm import registry, runtime

CORES = 2
DENSE = "gqa"
BOUNDED = ("sliding", "linear", "performer")  # their time must grow clearly slower than dense, their state not at all
LENGTHS = (1_024, 4_096, 16_384)
LENGTHS_FULL = (*LENGTHS, 32_768)
GROWTH = (4_096, 16_384)  # of which the times are compared; dense has 16 times the pairs
MAX_GROWTH = 6
NEAR, FAR = 1_024, 16_384  # tokens known when decoding is measured
MAX_DECODING_GROWTH = 1.25  # of a token's time, where the state is bounded: a step of a model still looks at all places


def main() -> None:
    """All figures of the group."""
    measures = {"passes": passes, "decoding": decoding}
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="cuda adds the GPU's figures")
    options.add_argument("--full", action="store_true", help="rows of 32k too")
    options.add_argument("--only", default=None, choices=measures)
    options.add_argument("--runs", type=int, default=3, help="of each, by turns; 1 for a quick look")
    chosen = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
    torch.set_num_threads(CORES)
    devices = [torch.device("cpu")]
    if chosen.device and chosen.device.startswith("cuda"):
        if torch.cuda.is_available():
            devices.append(torch.device(chosen.device))
        else:
            report("attention_cuda", [], "ms", note="no CUDA device on this machine")
    kinds = [kind for kind in ulm.kinds("attention") if not registry.find("attention", kind).needs_source]
    for device in devices:
        for name, measure in measures.items():
            if chosen.only in (None, name):
                measure(kinds, device, LENGTHS_FULL if chosen.full else LENGTHS, chosen.runs)


def _name(kind: str, what: str, device: torch.device) -> str:
    return f"attention_{kind}_{what}" + ("" if device.type == "cpu" else f"_{device.type}")


# ---- forward and backward


def passes(kinds: Sequence[str], device: torch.device, lengths: Sequence[int], runs: int) -> None:
    """Time of a pass forward and backward of every kind at every length against dense, peaks of memory, and growth."""
    megabytes = {(kind, length): _peak_bytes(kind, length, device) / 1e6 for kind in kinds for length in lengths}
    layers = {kind: Layer.make(kind, max(lengths), device) for kind in kinds}
    found: dict[tuple[str, int], list[float]] = {(kind, length): [] for kind in kinds for length in lengths}
    for layer in layers.values():
        for length in lengths[:2]:
            layer.pass_of(length)()
    for _ in range(runs):
        for length in lengths:
            for kind, layer in layers.items():
                found[kind, length].append(1e3 * pass_seconds(layer, length))
    for kind in kinds:
        for length in lengths:
            note, own, dense = f"peak {megabytes[kind, length]:.0f} MB", found[kind, length], found[DENSE, length]
            name = _name(kind, f"{length // 1024}k", device)
            if kind == DENSE:
                report(name, own, "ms", note=note)
                continue
            note += f", dense {megabytes[DENSE, length]:.0f} MB"
            report(name, own, "ms", peer="dense attention", peer_values=dense, note=note)
    growths = {kind: _ratios(found[kind, GROWTH[1]], found[kind, GROWTH[0]]) for kind in kinds}
    for kind, values in growths.items():
        goal = f"<= {MAX_GROWTH}" if kind in BOUNDED else None
        said = f"time at 16k over time at 4k; dense {statistics.median(growths[DENSE]):.1f}"
        memory = f"memory {megabytes[kind, GROWTH[1]] / megabytes[kind, GROWTH[0]]:.1f}"
        report(_name(kind, "growth", device), values, "times", goal=goal, note=f"{said}; {memory}")


def _peak_bytes(kind: str, length: int, device: torch.device) -> int:
    if device.type != "cpu":
        return pass_bytes(Layer.make(kind, length, device), length)
    command = [sys.executable, str(Path(__file__).with_name("_one_layer.py")), kind, str(length), str(CORES)]
    # Every tensor its own pages: else glibc keeps freed ones, another share in every run, and peaks differ by a third.
    environment = {**runtime.environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peak_bytes: int = json.loads(done.stdout)["peak_bytes"]
    return peak_bytes


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, base, strict=True)]


# ---- decoding


def decoding(kinds: Sequence[str], device: torch.device, lengths: Sequence[int], runs: int) -> None:
    """Bytes of what a layer remembers of a long row, and the time of one token more after few tokens and after many."""
    layers = {kind: Layer.make(kind, FAR + STEPS + 1, device) for kind in kinds}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, layer in layers.items():
            near_s, far_s = layer.decoding_s([NEAR, FAR])
            found[kind].append((1e6 * near_s, 1e6 * far_s))
    for kind, layer in layers.items():
        near, far = (layer.state(length).nbytes for length in (NEAR, FAR))
        goal = "<= 1" if kind in BOUNDED else None
        note = "float32, of one layer and one row of 16k"
        name = _name(kind, "state", device)
        report(name, [far], "bytes", goal=goal, peer="the same for a row of 1k", peer_values=[near], note=note)
    for kind, times in found.items():
        near_us, far_us = zip(*times, strict=True)
        goal = f"<= {MAX_DECODING_GROWTH}" if kind in BOUNDED else None
        note = f"after 16k tokens, the peer after 1k; median of {STEPS} steps"
        name = _name(kind, "decoding", device)
        report(name, far_us, "us/token", goal=goal, peer="the same after 1k", peer_values=near_us, note=note)


if __name__ == "__main__":
    main()
