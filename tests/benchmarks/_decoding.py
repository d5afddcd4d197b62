"""What the figures of `engine` are taken with: models, processes of ours and of peers, and the time of a step.

Time per token is the difference between long and short answers, greedy and all of equal length, so that neither
prompts nor what comes once are in it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks._asked import Asked, Failed, Process
from ulm import runtime

HERE = Path(__file__).parent
CORES = 2
PRESET, VOCAB_SIZE = "mini", 8_192
NUM_MEMBERS = 8
PROMPT_TOKENS, SHORT, LONG = 32, 8, 128  # SHORT is more steps than the prompts of 256 answers take
PREFILL = {"batch": 8, "prompt": 512, "new": 1}
TRIES = 3
FIRST_TOKENS = 5  # requests that the time to first token is the median of
CONFIG = {
    "device": "cpu",
    "dtype": "bfloat16",
    "threads": CORES,
    "kv_cache_bytes": 1 << 29,  # 256 answers of mini need 0.3 GB
    "max_answers": 256,
    "max_batch_tokens": 2_048,
    "compile_after_steps": 10,  # in the round that does not count
}

Values = dict[str, Any]
Measure = Callable[..., float]  # of who is asked, and what only ours is asked: seconds


# ---- models and processes


def make_models(place: Path) -> None:
    """Eight checkpoints of different random weights and one tokenizer, the first exported for the peers, in `place`.

    <|endoftext|>, token 0, has the zero vector and so the logit 0, which is never the largest: no answer ends early.
    """
    import torch

    import ulm
    from ulm.exchange.hf import export_hf
    from ulm.tokenizers.bpe import train_bpe

    torch.set_num_threads(CORES)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    tokenizer = train_bpe((path.read_text(encoding="utf-8") for path in library), VOCAB_SIZE)
    assert tokenizer.vocab_size == VOCAB_SIZE and tokenizer.eot_id == 0
    spec = ulm.ModelSpec.preset(PRESET, vocab_size=VOCAB_SIZE)
    for number in range(NUM_MEMBERS):
        model = ulm.build(spec, seed=number)
        with torch.no_grad():
            model.embedding.weight[tokenizer.eot_id] = 0
        ulm.save(model, tokenizer, place / f"m{number}")
        if number == 0:
            export_hf(model, tokenizer, place / "hf")


def ours(place: Path, num_members: int = 1, home: Path | None = None, **config: object) -> Process:
    """A process of ours with the first members; `home` holds what it compiles (default: one for all)."""
    members = {f"m{number}": str(place / f"m{number}") for number in range(num_members)}
    settings = json.dumps({"members": members, "config": {**CONFIG, **config}})
    command = [sys.executable, HERE / "_engine_process.py", settings]
    return Process(command, _environment(home or place / "home"), place / "ours.log")


def _environment(home: Path) -> dict[str, str]:
    """With everything that is compiled and kept in `home`; of threads that wait nothing said, as peers like it."""
    home.mkdir(exist_ok=True)
    kept = {"ULM_HOME": "ulm", "XDG_CACHE_HOME": "cache", "VLLM_CACHE_ROOT": "vllm"}
    kept |= {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TORCH_EXTENSIONS_DIR": "extensions", "TRITON_CACHE_DIR": "triton"}
    environment = {key: value for key, value in runtime.environment().items() if key != "GOMP_SPINCOUNT"}
    return {**environment, **{key: str(home / name) for key, name in kept.items()}, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class How:
    """One of a peer's settings."""

    dtype: str
    compile: bool

    def __str__(self) -> str:
        return f"{self.dtype} {'compiled' if self.compile else 'eager'}"


ALL_HOWS = [How(dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (True, False)]


class Peers:
    """A peer's processes, one for each of its settings: which is at its best is known once all are measured."""

    def __init__(self, script: str, place: Path, settings: Values, hows: Sequence[How]) -> None:
        """Start them one after another."""
        self.processes: dict[How, Asked] = {}
        self.failed: dict[How, str] = {}
        self.found: dict[str, dict[How, list[float]]] = {}
        self.version = script
        for how in hows:
            given = json.dumps({**settings, "dtype": how.dtype, "compile": how.compile})
            log = place / f"{script}-{how.dtype}-{how.compile}.log"
            process = Process([sys.executable, HERE / script, given], _environment(place / "home"), log)
            try:
                self.version = process.ask("ready")["version"]
                self.processes[how] = process
            except Failed as error:
                self.failed[how] = str(error)

    def measure(self, what: str, measure: Measure, *, counts: bool = True) -> None:
        """One turn: every process once. One that fails is left out from then on, with what it said."""
        for how, process in list(self.processes.items()):
            try:
                seconds = measure(process)
            except Failed as error:
                del self.processes[how]
                self.failed[how] = str(error)
                continue
            if counts:
                self.found.setdefault(what, {}).setdefault(how, []).append(seconds)

    def best(self, what: str) -> tuple[Sequence[float], str]:
        """The seconds of the fastest setting, none where all failed; and what was seen of every setting."""
        found = {how: values for how, values in self.found.get(what, {}).items() if how in self.processes}
        seen = [f"{how} {1e3 * statistics.median(values):.4g} ms" for how, values in found.items()]
        failed = [f"{how} failed: {why}" for how, why in self.failed.items()]
        best = min(found.values(), key=statistics.median, default=[])
        return best, f"{self.version}: " + "; ".join([*seen, *failed])

    def close(self) -> None:
        """End them."""
        for process in self.processes.values():
            process.close()


def vllm_peers(place: Path) -> Peers:
    """vLLM's offline engine in four settings."""
    return Peers("_vllm_peer.py", place, {"model": str(place / "hf")}, ALL_HOWS)


def transformers_peers(place: Path, device: str, hows: Sequence[How] = ALL_HOWS) -> Peers:
    """transformers' `generate` in these settings."""
    settings = {"model": str(place / "hf"), "device": device, "threads": CORES}
    return Peers("_transformers_peer.py", place, settings, hows)


# ---- the time of a step

_seeds = itertools.count(1)


def seconds(process: Asked, **question: object) -> float:
    """Of these answers to prompts that nobody has seen before."""
    took_s: float = process.ask("seconds", seed=next(_seeds), **question)
    return took_s


def step_s(process: Asked, batch: int, long: int = LONG, **question: object) -> float:
    """Seconds of one decoding step of all answers: long answers less short ones, over the tokens they differ by.

    Another program on the machine can make the short ones take longer than the long ones: measured anew, and where
    that does not help it is Failed.
    """
    asked = {"batch": batch, "prompt": PROMPT_TOKENS, **question}
    for _ in range(TRIES):
        long_s, short_s = (seconds(process, new=new, **asked) for new in (long, SHORT))
        if long_s > short_s:
            return (long_s - short_s) / (long - SHORT)
    raise Failed(f"{TRIES} times {SHORT} tokens took longer than {long}: the machine has other work")


def step_of(batch: int) -> Measure:
    """The same as a measure."""
    return lambda process, **question: step_s(process, batch, **question)


def first_token_s(process: Asked, **question: object) -> float:
    """Seconds from a request of one short prompt to its first token."""
    asked = {"batch": 1, "prompt": PROMPT_TOKENS, "new": 1, **question}
    return statistics.median(seconds(process, **asked) for _ in range(FIRST_TOKENS))


def prefill_s(process: Asked, **question: object) -> float:
    """Seconds of all prompt tokens of PREFILL."""
    return seconds(process, **PREFILL, **question)


@dataclass(frozen=True)
class Weights:
    """What a step must read of one member's weights, and how the engine ran that did."""

    nbytes: int
    config: Mapping[str, object]

    @classmethod
    def of(cls, ready: Mapping[str, Any]) -> Weights:
        """From what our process says of itself."""
        size = 2 if ready["config"].get("dtype") in ("bfloat16", "float16") else 4
        return cls(ready["parameters"] * size, ready["config"])

    def share(self, seconds: float, bandwidth: float, members: int = 1) -> float:
        """Of the limit that a step of so many seconds reaches, at so many bytes a second; 1 is the limit itself."""
        return members * self.nbytes / bandwidth / seconds

    def shares(self, steps_s: Sequence[float], bandwidths: Sequence[float], members: int = 1) -> list[float]:
        """The same of each run."""
        return [self.share(step, bandwidth, members) for step, bandwidth in zip(steps_s, bandwidths, strict=True)]

    def said(self, steps_s: Sequence[float], bandwidths: Sequence[float], members: int = 1) -> str:
        """The conditions, and how far from the limit these steps are."""
        nbytes, bandwidth = members * self.nbytes, statistics.median(bandwidths)
        share = statistics.median(self.shares(steps_s, bandwidths, members))
        limit = f"limit {1e3 * nbytes / bandwidth:.3g} ms a step ({nbytes / 1e6:.0f} MB of weights at "
        limit += f"{bandwidth / 1e9:.1f} GB/s), taken {1e3 * statistics.median(steps_s):.3g} ms: {share:.0%} of it"
        return f"{limit}; {self.conditions()}"

    def conditions(self) -> str:
        """How ours ran."""
        return "ours: " + ", ".join(f"{key} {value}" for key, value in self.config.items())
