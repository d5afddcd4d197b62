"""Group `engine`: the local engine against vLLM, transformers and the memory's bandwidth, and many members in it.

Run by `ulm bench engine` in a checkout. About a quarter of an hour on two cores, to which everything is bound. The
model is `mini` with random weights, exported once for all. Ours and every setting of a peer are processes of their own,
asked by turns; one that is not asked stands still (_asked.py). The first round warms everything up and does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._asked import Asked, Failed
from tests.benchmarks._decoding import (
    CORES,
    LONG,
    NUM_MEMBERS,
    PREFILL,
    PROMPT_TOKENS,
    How,
    Measure,
    Peers,
    Weights,
    first_token_s,
    make_models,
    ours,
    prefill_s,
    seconds,
    step_of,
    step_s,
    transformers_peers,
    vllm_peers,
)
from tests.benchmarks._figures import report

LONG_OF_256 = 40  # tokens of each of 256 answers
GPU_KV_CACHE_BYTES = 1 << 32
VLLM, TRANSFORMERS = "vLLM at its best", "transformers at its best"
ONE = {"weights": [{"m0": 1.0}]}
EIGHT = {"weights": [{f"m{number}": 1.0} for number in range(NUM_MEMBERS)]}

Values = dict[str, Any]
FIGURES: dict[str, Values] = {  # as report takes them
    "decode_b32": {"unit": "tokens/s", "goal": ">= 1.5", "peer": VLLM},
    "decode_b32_transformers": {"unit": "tokens/s", "peer": TRANSFORMERS},
    "decode_b1": {"unit": "ms/token", "goal": "<= 0.7", "peer": VLLM},
    "decode_b1_bandwidth": {"unit": "share of the limit", "goal": ">= 0.6"},
    "decode_b1_transformers": {"unit": "tokens/s", "goal": ">= 3", "peer": TRANSFORMERS},
    "first_token_b1": {"unit": "ms", "peer": VLLM},
    "prefill": {"unit": "tokens/s", "peer": VLLM},
    "cold_start": {"unit": "s", "goal": "<= 4"},
    "cold_start_empty_cache": {"unit": "s"},
    "eight_pss": {"unit": "bytes", "goal": "<= 1", "peer": "weights x 1.3 + 1 GB"},
    "eight_b256": {"unit": "tokens/s", "goal": ">= 0.7", "peer": "256 answers of one member"},
    "eight_b32_bandwidth": {"unit": "share of the limit", "goal": ">= 0.6"},
    "eight_b32_in_turn": {"unit": "tokens/s", "goal": ">= 1", "peer": "4 answers of each member, one after another"},
    "mixture_2_of_8": {"unit": "ms/token", "goal": "<= 2.4", "peer": "one member, 8 answers as well"},
    "mixture_4_of_8": {"unit": "ms/token", "goal": "<= 4.5", "peer": "one member, 8 answers as well"},
    "mixture_2_spread": {"unit": "ms/token", "peer": "8 answers, each of another member"},
    "mixture_4_spread": {"unit": "ms/token", "peer": "8 answers, each of another member"},
    "cuda_decode_b1": {"unit": "tokens/s", "peer": TRANSFORMERS},
    "cuda_decode_b32": {"unit": "tokens/s", "peer": TRANSFORMERS},
    "cuda_decode_b1_bandwidth": {"unit": "share of the limit"},
    "cuda_decode_b32_bandwidth": {"unit": "share of the limit"},
    "cuda_first_token_b1": {"unit": "ms", "peer": TRANSFORMERS},
}


def main() -> None:
    """All figures of the group."""
    measures: dict[str, Callable[[Path, int, bool], None]] = {
        "cuda": cuda, "decode": decode, "cold": cold, "eight": eight,
    }  # fmt: skip
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="cuda adds the GPU's figures")
    options.add_argument("--full", action="store_true", help="transformers at batch 32 as well")
    options.add_argument("--only", default=None, choices=measures)
    options.add_argument("--runs", type=int, default=3, help="of each, by turns; 1 for a quick look")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, and the folder removed
    on_gpu = bool(chosen.device and chosen.device.startswith("cuda"))
    with tempfile.TemporaryDirectory(prefix="ulm-bench-") as folder:
        make_models(Path(folder))
        for name, measure in measures.items():
            if chosen.only != name if chosen.only else name == "cuda" and not on_gpu:
                continue
            if name != "cuda":
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
            measure(Path(folder), chosen.runs, chosen.full)


def _report(figure: str, values: Sequence[float], peer_values: Sequence[float] = (), note: str | None = None) -> None:
    report(figure, values, peer_values=peer_values, note=note, **FIGURES[figure])


def _failed(start: str | tuple[str, ...], why: str) -> None:
    for figure in FIGURES:
        if figure.startswith(start):
            _report(figure, [], note=why)


# ---- one member against peers


def decode(place: Path, runs: int, full: bool) -> None:
    """Steps of 1 and of 32 answers, the first token and prompts, against vLLM and transformers."""
    from tests.benchmarks._bandwidth import read_bandwidth

    whats: dict[str, Measure] = {"b1": step_of(1), "b32": step_of(32), "first": first_token_s, "prefill": prefill_s}
    asked = {VLLM: tuple(whats), TRANSFORMERS: ("b1", "b32") if full else ("b1",)}
    makers = {TRANSFORMERS: lambda: transformers_peers(place, "cpu")}
    if importlib.util.find_spec("vllm") is not None:
        makers[VLLM] = lambda: vllm_peers(place)
    try:
        found = Found.by_turns(place, makers, whats, asked, lambda: read_bandwidth(CORES), runs)
    except Failed as error:
        _failed(("decode", "first", "prefill"), f"our process failed: {error}")
        return
    prompt_tokens = PREFILL["batch"] * PREFILL["prompt"]
    found.report("decode_b32", VLLM, "b32", lambda step_s: 32 / step_s)
    if full:
        found.report("decode_b32_transformers", TRANSFORMERS, "b32", lambda step_s: 32 / step_s)
    found.report("decode_b1", VLLM, "b1", lambda step_s: 1e3 * step_s)
    found.report_share("decode_b1_bandwidth", "b1")
    found.report("decode_b1_transformers", TRANSFORMERS, "b1", lambda step_s: 1 / step_s)
    found.report("first_token_b1", VLLM, "first", lambda first_s: 1e3 * first_s)
    found.report("prefill", VLLM, "prefill", lambda all_s: prompt_tokens / all_s)


class Found:
    """What one member of ours and its peers took, by turns."""

    def __init__(self, weights: Weights, peers: Mapping[str, Peers], machine: str = "") -> None:
        self._weights, self._peers, self._machine = weights, peers, machine
        self._seconds: dict[str, list[float]] = {}
        self._bandwidths: list[float] = []

    @classmethod
    def by_turns(
        cls,
        place: Path,
        makers: Mapping[str, Callable[[], Peers]],
        whats: Mapping[str, Measure],
        asked: Mapping[str, Sequence[str]],
        bandwidth: Callable[[], float],
        runs: int,
        machine: str = "",
        **config: object,
    ) -> Found:
        """Measure `whats`, of each peer those that it is asked. Raises Failed where our own process does."""
        with ExitStack() as held:
            engine = held.enter_context(ours(place, **config))
            weights = Weights.of(engine.ask("ready"))
            peers = {name: make() for name, make in makers.items()}
            for peer in peers.values():
                held.callback(peer.close)
            found = cls(weights, peers, machine)
            for run in range(-1, runs):
                found._turn(engine, whats, asked, bandwidth(), counts=run >= 0)
        return found

    def _turn(
        self,
        engine: Asked,
        whats: Mapping[str, Measure],
        asked: Mapping[str, Sequence[str]],
        bandwidth: float,
        *,
        counts: bool,
    ) -> None:
        if counts:
            self._bandwidths.append(bandwidth)
        for what, measure in whats.items():
            took_s = measure(engine, **ONE)
            if counts:
                self._seconds.setdefault(what, []).append(took_s)
            for name, peer in self._peers.items():
                if what in asked[name]:
                    peer.measure(what, measure, counts=counts)

    def report(self, figure: str, peer: str, what: str, scale: Callable[[float], float]) -> None:
        """Ours against a peer at its best, each run's seconds scaled to the figure's unit."""
        if peer not in self._peers:
            _report(figure, [], note="vLLM is not installed: `make setup` installs it")
            return
        best, seen = self._peers[peer].best(what)
        note = f"{self._said(what)}; {seen}"
        if best:
            _report(figure, [*map(scale, self._seconds[what])], [*map(scale, best)], note)
        else:
            _report(figure, [], note=note)

    def report_share(self, figure: str, what: str) -> None:
        """Ours against the limit that the memory's bandwidth sets."""
        _report(figure, self._weights.shares(self._seconds[what], self._bandwidths), note=self._said(what))

    def _said(self, what: str) -> str:
        if what in ("first", "prefill"):
            return self._machine + self._weights.conditions()
        return self._machine + self._weights.said(self._seconds[what], self._bandwidths)


# ---- cold start


def cold(place: Path, runs: int, full: bool) -> None:
    """From the start of a process to the first token of its first answer, files in the page cache; no Ray."""
    empty_s, warm_s = [], []
    try:
        for run in range(runs):
            home = place / f"cold-{run}"
            empty_s.append(_cold_start_s(place, home))
            warm_s.append(_cold_start_s(place, home))
    except Failed as error:
        _failed("cold", f"our process failed: {error}")
        return
    note = f"Python, torch, one member, a prompt of {PROMPT_TOKENS} tokens and the first token of its answer"
    _report("cold_start", warm_s, note=f"{note}; with what an earlier process compiled")
    _report("cold_start_empty_cache", empty_s, note=f"{note}; nothing compiled before")


def _cold_start_s(place: Path, home: Path) -> float:
    started_s = time.perf_counter()
    with ours(place, home=home) as process:
        seconds(process, batch=1, prompt=PROMPT_TOKENS, new=1, **ONE)
        return time.perf_counter() - started_s


# ---- eight members


def eight(place: Path, runs: int, full: bool) -> None:
    """Eight members in one process: memory, together against alone and in turn, and mixtures of them."""
    try:
        _memory(place, runs)
        _together(place, runs)
    except Failed as error:
        _failed(("eight", "mixture"), f"our process failed: {error}")


def _memory(place: Path, runs: int) -> None:
    """Of a fresh process after 256 answers at once."""
    pss_bytes = []
    for _ in range(runs):
        with ours(place, NUM_MEMBERS) as process:
            weights = Weights.of(process.ask("ready"))
            seconds(process, batch=256, prompt=PROMPT_TOKENS, new=LONG, **EIGHT)
            pss_bytes.append(float(process.pss_bytes()))
    bound = NUM_MEMBERS * weights.nbytes * 1.3 + 1e9
    note = f"{NUM_MEMBERS} x {weights.nbytes / 1e6:.1f} MB of weights, after 256 answers at once of {LONG} tokens"
    _report("eight_pss", pss_bytes, [bound] * runs, f"{note}; {weights.conditions()}")


def _together(place: Path, runs: int) -> None:
    """Steps of answers by one member, by all and by mixtures, by turns."""
    asked: dict[str, Values] = {
        "one_b256": {"batch": 256, "long": LONG_OF_256, **ONE},
        "eight_b256": {"batch": 256, "long": LONG_OF_256, **EIGHT},
        "eight_b32": {"batch": 32, **EIGHT},
        "in_turn": {"batch": 32, "groups": NUM_MEMBERS, **EIGHT},
        "one": {"batch": 8, **ONE},
        "2_of_8": {"batch": 8, "weights": [_mixture(0, 2)]},
        "4_of_8": {"batch": 8, "weights": [_mixture(0, 4)]},
        "each": {"batch": 8, **EIGHT},
        "2_spread": {"batch": 8, "weights": [_mixture(number, 2) for number in range(NUM_MEMBERS)]},
        "4_spread": {"batch": 8, "weights": [_mixture(number, 4) for number in range(NUM_MEMBERS)]},
    }
    from tests.benchmarks._bandwidth import read_bandwidth

    found: dict[str, list[float]] = {what: [] for what in asked}
    bandwidths: list[float] = []
    with ours(place, NUM_MEMBERS) as process:
        weights = Weights.of(process.ask("ready"))
        for run in range(-1, runs):
            bandwidth = read_bandwidth(CORES)
            taken = {what: step_s(process, **question) for what, question in asked.items()}
            if run >= 0:
                bandwidths.append(bandwidth)
                for what, step in taken.items():
                    found[what].append(step)

    def rates(what: str) -> list[float]:
        return [asked[what]["batch"] / step for step in found[what]]

    def said(what: str, members: int = NUM_MEMBERS) -> str:
        return weights.said(found[what], bandwidths, members)

    _report("eight_b256", rates("eight_b256"), rates("one_b256"), said("eight_b256"))
    _report("eight_b32_bandwidth", weights.shares(found["eight_b32"], bandwidths, NUM_MEMBERS), note=said("eight_b32"))
    _report("eight_b32_in_turn", rates("eight_b32"), rates("in_turn"), said("eight_b32"))
    for members in (2, 4):
        for what, alone, read, which in (
            (f"{members}_of_8", "one", members, "the same members for all"),
            (f"{members}_spread", "each", NUM_MEMBERS, "each of other members"),
        ):
            mixed, single = ([1e3 * step for step in found[name]] for name in (what, alone))
            _report(f"mixture_{what}", mixed, single, f"8 answers, {which}; {said(what, read)}")


def _mixture(first: int, number: int) -> dict[str, float]:
    """Equal weights of so many neighbouring members."""
    return {f"m{(first + more) % NUM_MEMBERS}": 1 / number for more in range(number)}


# ---- a GPU


def cuda(place: Path, runs: int, full: bool) -> None:
    """One member in bfloat16 against transformers, compiled with its static cache and eager, and the bandwidth."""
    import torch

    if not torch.cuda.is_available():
        _failed("cuda", "no CUDA device on this machine")
        return
    from tests.benchmarks._bandwidth import copy_bandwidth

    device = torch.device("cuda")
    whats: dict[str, Measure] = {"b1": step_of(1), "b32": step_of(32), "first": first_token_s}
    makers = {
        TRANSFORMERS: lambda: transformers_peers(place, "cuda", [How("bfloat16", True), How("bfloat16", False)]),
    }
    config = {"device": "cuda", "kv_cache_bytes": GPU_KV_CACHE_BYTES}
    try:
        found = Found.by_turns(
            place,
            makers,
            whats,
            {TRANSFORMERS: tuple(whats)},
            lambda: copy_bandwidth(device),
            runs,
            f"{torch.cuda.get_device_name(device)}; ",
            **config,
        )
    except Failed as error:
        _failed("cuda", f"our process failed: {error}")
        return
    found.report("cuda_decode_b1", TRANSFORMERS, "b1", lambda step_s: 1 / step_s)
    found.report("cuda_decode_b32", TRANSFORMERS, "b32", lambda step_s: 32 / step_s)
    found.report_share("cuda_decode_b1_bandwidth", "b1")
    found.report_share("cuda_decode_b32_bandwidth", "b32")
    found.report("cuda_first_token_b1", TRANSFORMERS, "first", lambda first_s: 1e3 * first_s)


if __name__ == "__main__":
    main()
