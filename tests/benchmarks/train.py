"""Group `train`: speed against peers, the machine and ourselves, and what models of two small texts learn.

Run by `ulm bench train` in a checkout, with ULM_CORPORA set for the quality figures. About forty minutes on two cores,
which all runs are given; WikiText-2 only with --full, for it takes a quarter of an hour a seed. Every run of ours is a
process of its own (_one_run.py), so that threads and memory are as a user has them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._figures import Failed, report
from ulm import runtime

HERE = Path(__file__).parent
ULM = [sys.executable, "-m", "ulm.cli.main"]
PEERS = Path(".venv-peers/bin/python")
RECIPES = Path("pipelines/recipes")
CORES = 2
H200_FLOPS = 989e12  # of dense bfloat16 products, from NVIDIA's data sheet
PRODUCT_SIZE = 2048

Values = dict[str, Any]
TRAINER = "transformers 5.23.0 Trainer"
FIGURES: dict[str, Values] = {  # as report takes them
    "mini_vs_trainer": {"unit": "tokens/s", "goal": ">= 1.5", "peer": TRAINER},
    "mini_vs_nanogpt": {"unit": "tokens/s", "goal": ">= 1.2", "peer": "nanoGPT's way of stepping, compiled"},
    "mini_share_of_matmul": {"unit": "FLOP/s", "goal": ">= 0.45", "peer": "matrix product of 2048 cubed"},
    "ray_vs_bare": {"unit": "tokens/s", "goal": ">= 0.97", "peer": "our loop in one process without Ray"},
    "data_wait_share": {"unit": "share", "goal": "<= 0.01"},
    "two_workers_vs_one": {"unit": "tokens/s", "goal": ">= 0.95", "peer": "one worker of two threads"},
    "shakespeare_loss": {"unit": "nats/character", "goal": "<= 1.88"},
    "shakespeare_fast_gain": {"unit": "nats/character", "goal": ">= 0.05"},
    "shakespeare_modern_gain": {"unit": "nats/character", "goal": ">= 0.05"},
    "wikitext2_bits_per_byte": {"unit": "bits/byte"},
    "gpu_base_mfu": {"unit": "share of 989 TFLOP/s", "goal": ">= 0.40"},
}

FIGURES_OF = {
    "gpu": ("gpu_base_mfu",),
    "mini": ("mini_vs_trainer", "mini_vs_nanogpt", "mini_share_of_matmul"),
    "ray": ("ray_vs_bare", "data_wait_share"),
    "workers": ("two_workers_vs_one",),
    "shakespeare": ("shakespeare_loss", "shakespeare_fast_gain", "shakespeare_modern_gain"),
    "wikitext2": ("wikitext2_bits_per_byte",),
}


def main() -> None:
    """All figures of the group."""
    measures: dict[str, Callable[[Path, int, bool], None]] = {
        "gpu": gpu, "mini": mini, "ray": ray, "workers": workers, "shakespeare": shakespeare, "wikitext2": wikitext2,
    }  # fmt: skip
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="cuda adds the GPU's figures")
    options.add_argument("--full", action="store_true", help="more settings of the peers, and WikiText-2")
    options.add_argument("--only", default=None, choices=measures)
    options.add_argument("--runs", type=int, default=3, help="of each; 1 for a quick look")
    chosen = options.parse_args()
    if not runtime.can_compile(runtime.device("cpu")):
        sys.stderr.write("no C++ compiler: torch.compile is off for us and fails for the peers\n")
    with tempfile.TemporaryDirectory(prefix="ulm-bench-") as folder:
        for name, measure in measures.items():
            asked = chosen.only == name if chosen.only else _is_due(name, chosen.device, chosen.full)
            if asked:
                place = Path(folder) / name
                place.mkdir()
                if name != "gpu":
                    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
                try:
                    measure(place, chosen.runs, chosen.full)
                except Failed as error:
                    for figure in FIGURES_OF[name]:
                        _report(figure, [], note=f"a run of ours failed: {error}")


def _is_due(name: str, device: str | None, full: bool) -> bool:
    return {"gpu": bool(device and device.startswith("cuda")), "wikitext2": full}.get(name, True)


def _report(figure: str, values: Sequence[float], peer_values: Sequence[float] = (), note: str | None = None) -> None:
    report(figure, values, peer_values=peer_values, note=note, **FIGURES[figure])


# ---- running


def _json_of(command: Sequence[object], environment: dict[str, str]) -> Values:
    """The last line that a process prints. Raises Failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(done.stderr.strip()[-300:])
    line: Values = json.loads(done.stdout.splitlines()[-1])
    return line


def _one_run(recipe: Path, name: str, overrides: Values, *options: object) -> list[object]:
    """The command of one run of ours without Ray."""
    return [sys.executable, HERE / "_one_run.py", recipe, *_set({"name": name, **overrides}), *options]


def _set(overrides: Values) -> list[str]:
    return [word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def _environment(home: Path) -> dict[str, str]:
    return {**runtime.environment(), "ULM_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def _library_corpus(home: Path, vocab_size: int) -> Path:
    """A corpus of the running Python's own library, without held-out text, so that no run stops to evaluate.

    Returns its file of training tokens. A file is a document, so nearly every row is full, as the peers' rows are.
    """
    text = home / "library.py"
    text.write_text("\n".join(p.read_text() for p in sorted(Path(os.__file__).parent.glob("*.py"))), encoding="utf-8")
    recipe = home / "corpus.yaml"
    source = {"path": str(text), "document": "file"}
    clean = {"max_document_bytes": 100_000_000, "duplicate_near": False}
    tokenizer = {"kind": "bpe", "vocab_size": vocab_size}
    split = {"val": 0, "test": 0}
    fields = {"name": "library", "sources": [source], "clean": clean, "split": split, "tokenizer": tokenizer}
    recipe.write_text(json.dumps(fields), encoding="utf-8")
    built = _json_of([*ULM, "corpus", "build", recipe], _environment(home))
    return next(Path(built["corpus"]).glob("train-*.bin"))


def _recipe(home: Path, name: str, fields: Values) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(json.dumps(fields), encoding="utf-8")  # JSON is YAML
    return path


# ---- mini against its peers and the machine


@dataclass(frozen=True)
class Steps:
    """What a run of mini, ours or a peer's, is asked to do; a batch is short so that many fit in the time."""

    rows: int = 4
    micro_rows: int = 4
    steps: int = 6
    warm_up_steps: int = 2
    dtype: str = "float32"
    compile: bool = True

    def __str__(self) -> str:
        how = "compiled" if self.compile else "eager"
        return f"{self.dtype} {how}, {self.rows // self.micro_rows} x {self.micro_rows} rows"


def _trials(usual: Steps) -> list[Steps]:
    """The settings that a peer may be fastest with."""
    other = replace(usual, dtype="bfloat16" if usual.dtype == "float32" else "float32")
    eager = [replace(steps, compile=False) for steps in (usual, other)]
    return [usual, replace(usual, micro_rows=1), other, *eager]


def mini(place: Path, runs: int, full: bool) -> None:
    """Our loop, transformers' Trainer, nanoGPT's way and the machine's matrix product, by turns."""
    from ulm.models.account import num_parameters, on_meta
    from ulm.spec import ModelSpec

    spec = ModelSpec.preset("mini")
    tokens, environment = _library_corpus(place, spec.vocab_size), _environment(place)
    sizes: Values = {
        "vocab_size": spec.vocab_size, "context_tokens": spec.context_tokens, "d_model": spec.d_model,
        "num_layers": spec.num_layers, "parameters": num_parameters(on_meta(spec)), "tokens": str(tokens),
        "num_heads": spec.attention.num_heads, "num_kv_heads": spec.attention.num_kv_heads,  # type: ignore[attr-defined]
        "d_hidden": spec.feedforward.d_hidden, "device": "cpu", "threads": CORES,  # type: ignore[attr-defined]
    }  # fmt: skip

    def peer(python: Path | str, name: str, steps: Steps) -> Values:
        return _json_of([python, HERE / name, json.dumps({**sizes, **asdict(steps)})], environment)

    peers: dict[str, Callable[[Steps], Values]] = {
        "mini_vs_nanogpt": lambda steps: peer(sys.executable, "_nanogpt_peer.py", steps),
    }
    if PEERS.is_file():
        peers["mini_vs_trainer"] = lambda steps: peer(PEERS, "_trainer_peer.py", steps)
    else:
        _report("mini_vs_trainer", [], note=f"no {PEERS}: `make peers` makes it")
    usual = Steps(dtype=runtime.precision("auto", runtime.device("cpu")))  # what ours has, too
    best, said = {}, {}
    for figure, run in peers.items():
        best[figure], said[figure] = _fastest(run, _trials(usual) if full else [usual])
    train = {"steps": usual.steps, "batch_tokens": usual.rows * spec.context_tokens, "compile": True}
    recipe = _recipe(place, "mini", {"corpus": "library", "model": "mini", "train": train})
    ours, theirs = [], {figure: [] for figure in peers}
    products: list[dict[str, float]] = []
    for run_number in range(runs):
        products.append({dtype: _product_flops(dtype) for dtype in ("float32", "bfloat16")})
        options = ("--threads", CORES, "--warm-up-steps", usual.warm_up_steps)
        ours.append(_json_of(_one_run(recipe, f"mini-{run_number}", {}, *options), environment))
        for figure, run in peers.items():
            try:
                theirs[figure].append(run(best[figure]))
            except Failed as error:
                said[figure] = f"the peer failed (`make peers` makes it anew): {error}"
    speeds = [line["tokens_per_second"] for line in ours]
    for figure, found in theirs.items():
        if len(found) < runs:
            _report(figure, [], note=said[figure])
            continue
        note = f"{sizes['parameters']:,} parameters, the peer {found[0]['parameters']:,}; both {usual.rows} rows of "
        note += f"{spec.context_tokens:,} a step; ours {usual.dtype} compiled; the peer: {said[figure]}"
        _report(figure, speeds, [line["tokens_per_second"] for line in found], note)
    fastest = [max(rates.values()) for rates in products]
    gigaflops = {dtype: statistics.median(rates[dtype] for rates in products) / 1e9 for dtype in products[0]}
    note = ", ".join(f"{dtype} product {rate:.0f} GFLOP/s" for dtype, rate in gigaflops.items())
    note += "; divided by the faster; the goal is stated for bfloat16 where it is native"
    _report(
        "mini_share_of_matmul", [line["flops_per_token"] * line["tokens_per_second"] for line in ours], fastest, note
    )


def _fastest(run: Callable[[Steps], Values], trials: Sequence[Steps]) -> tuple[Steps, str]:
    """The settings with the most tokens per second, and what was seen of all of them; a single one is not tried."""
    if len(trials) == 1:
        return trials[0], f"{trials[0]}; --full tries others first"
    speeds: dict[Steps, float] = {}
    failed: list[str] = []
    for steps in trials:
        try:
            speeds[steps] = run(replace(steps, steps=3, warm_up_steps=1))["tokens_per_second"]
        except Failed as error:
            failed.append(f"{steps} failed: {error}")
    best = max(speeds, key=speeds.__getitem__, default=trials[0])
    return best, "; ".join([*(f"{steps} {speed:.0f} tokens/s" for steps, speed in speeds.items()), *failed])


def _product_flops(dtype: str) -> float:
    """Operations per second of a product of two square matrices on all cores: the best of ten."""
    import torch

    torch.set_num_threads(CORES)
    a, b = (torch.full((PRODUCT_SIZE, PRODUCT_SIZE), 0.5, dtype=getattr(torch, dtype)) for _ in range(2))
    times_s = []
    for _ in range(10):
        started_s = time.perf_counter()
        a @ b
        times_s.append(time.perf_counter() - started_s)
    return 2 * PRODUCT_SIZE**3 / min(times_s)


# ---- Ray, and workers


def ray(place: Path, runs: int, full: bool) -> None:
    """`ulm train` against our own loop alone in a process, same recipe, by turns; and how long both wait for data."""
    pairs, warm_up_steps, steps = runs if runs < 3 else 5, 20, 20
    _library_corpus(place, 8_192)
    train = {"steps": warm_up_steps + steps, "batch_tokens": 8_192}
    recipe = _recipe(place, "nano", {"corpus": "library", "model": "nano", "train": train})
    with_ray, alone = [], []
    for pair in range(pairs):
        _json_of([*ULM, "train", recipe, *_set({"name": f"ray-{pair}"})], _environment(place))
        with_ray.append(_steps(place, f"ray-{pair}", warm_up_steps))
        options = ("--threads", CORES, "--warm-up-steps", warm_up_steps)
        alone.append(_json_of(_one_run(recipe, f"alone-{pair}", {}, *options), _environment(place)))
    speeds = ([line["tokens_per_second"] for line in lines] for lines in (with_ray, alone))
    _report("ray_vs_bare", *speeds, note=f"nano, {steps} steps of 8,192 tokens after {warm_up_steps}")
    _report("data_wait_share", [line["data_wait_share"] for line in with_ray], note="of the runs with Ray")


def _steps(home: Path, run: str, warm_up_steps: int) -> dict[str, float]:
    from pipelines.train.figures import read
    from tests.benchmarks._one_run import pace

    return pace(list(read(home / "runs" / run))[warm_up_steps:])


def workers(place: Path, runs: int, full: bool) -> None:
    """Two workers of one thread over gloo against one of two threads, by turns."""
    warm_up_steps, steps, rows, context_tokens = 3, 7, 16, 512
    _library_corpus(place, 8_192)
    train = {"steps": warm_up_steps + steps, "batch_tokens": rows * context_tokens}
    recipe = _recipe(place, "micro", {"corpus": "library", "model": "micro", "train": train})
    two, one = [], []
    for run in range(runs):
        two.append(_of_two(place, recipe, f"two-{run}", warm_up_steps)["tokens_per_second"])
        options = ("--threads", CORES, "--warm-up-steps", warm_up_steps)
        line = _json_of(_one_run(recipe, f"one-{run}", {}, *options), _environment(place))
        one.append(line["tokens_per_second"])
    note = f"micro, {rows} rows of {context_tokens} a step, {steps} steps after {warm_up_steps}, gloo"
    _report("two_workers_vs_one", two, one, note)


def _of_two(home: Path, recipe: Path, name: str, warm_up_steps: int) -> Values:
    """What rank 0 of two processes prints. Raises Failed."""
    meeting = f"file://{home / name}.meeting"
    options = ("--threads", 1, "--warm-up-steps", warm_up_steps, "--world-size", 2, "--rendezvous", meeting)
    environment = _environment(home)
    command = [str(word) for word in _one_run(recipe, name, {"train.workers": 2}, *options)]
    second = subprocess.Popen([*command, "--rank", "1"], env=environment, stderr=subprocess.DEVNULL)
    try:
        return _json_of([*command, "--rank", "0"], environment)
    finally:
        second.kill()
        second.wait()


# ---- quality


def _built(place: Path, name: str) -> str | None:
    """Build the corpus of a recipe from where ULM_CORPORA has its text; None when it is there, else why not."""
    corpora = runtime.variable("ULM_CORPORA")
    if corpora is None:
        return "ULM_CORPORA is not set: no folder with train/ to measure on"
    fields = yaml.safe_load((RECIPES / f"corpus-{name}.yaml").read_text(encoding="utf-8"))
    source = fields["sources"][0]
    source["path"] = str(Path(corpora).absolute() / source["path"].rpartition("corpora/")[2])
    _json_of([*ULM, "corpus", "build", _recipe(place, name, fields)], _environment(place))
    return None


def shakespeare(place: Path, runs: int, full: bool) -> None:
    """Nats per character of the whole validation text after plain training, and after other recipes in its time.

    Two runs go side by side, each on one core, so that both have the same machine; how many steps a recipe makes in the
    plain one's time is measured so beforehand. Windows of 64 characters do not
    overlap, every character is scored once, <|endoftext|> is not (as val_loss it would be one target of 111,541).
    """
    if (why_not := _built(place, "shakespeare")) is not None:
        for figure in FIGURES_OF["shakespeare"]:
            _report(figure, [], note=why_not)
        return
    recipes = {kind: RECIPES / f"train-shakespeare-{kind}.yaml" for kind in ("fast", "modern")}
    recipes = {"plain": RECIPES / "train-shakespeare.yaml", **recipes}
    plain_steps = yaml.safe_load(recipes["plain"].read_text(encoding="utf-8"))["train"]["steps"]
    options = ("--threads", 1, "--warm-up-steps", 20)
    trial = {"train.steps": 120, "train.eval_tokens": 64}
    losses: dict[str, list[float]] = {kind: [] for kind in recipes}
    seconds: dict[str, list[float]] = {kind: [] for kind in recipes}
    steps = {"plain": plain_steps}
    for seed in range(runs):
        for kind in ("fast", "modern"):
            two = [_one_run(recipes[k], f"trial-{kind}-{k}-{seed}", trial, *options) for k in ("plain", kind)]
            paces = [line["seconds_per_step"] for line in _side_by_side(two, place)]
            steps[kind] = round(plain_steps * paces[0] / paces[1])
        commands = [
            _one_run(recipes[k], f"{k}-{seed}", {"train.seed": seed, "train.steps": steps[k]}, *options)
            for k in recipes
        ]
        for kind, line in zip(recipes, _side_by_side(commands, place), strict=True):
            losses[kind].append(line["bits_per_byte"] * math.log(2))  # all characters are ASCII: a byte each
            seconds[kind].append(line["seconds"])
    note = f"{_mean(losses['plain'])}; {_mean(seconds['plain'], 0)} s on one core"
    _report("shakespeare_loss", losses["plain"], note=note)
    for kind in ("fast", "modern"):
        gains = [a - b for a, b in zip(losses["plain"], losses[kind], strict=True)]
        note = f"{kind} {_mean(losses[kind])} in {_mean(seconds[kind], 0)} s, {steps[kind]} steps; gain {_mean(gains)}"
        _report(f"shakespeare_{kind}_gain", gains, note=note)


def _side_by_side(commands: Sequence[Sequence[object]], home: Path) -> list[Values]:
    """What these processes print, as many at a time as there are cores. Raises Failed."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(lambda command: _json_of(command, _environment(home)), commands))


def _mean(values: Sequence[float], digits: int = 4) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"mean {statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def wikitext2(place: Path, runs: int, full: bool) -> None:
    """Bits per byte of the whole test split after one epoch, in windows of 512 tokens that do not overlap."""
    figure = "wikitext2_bits_per_byte"
    if (why_not := _built(place, "wikitext2")) is not None:
        _report(figure, [], note=why_not)
        return
    recipe, lines = RECIPES / "train-wikitext2.yaml", []
    for seed in range(runs):
        command = _one_run(recipe, f"wikitext2-{seed}", {"train.seed": seed}, "--held-out", "test")
        lines.append(_json_of(command, _environment(place)))
    found = [line["test"]["bits_per_byte"] for line in lines]
    val = _mean([line["bits_per_byte"] for line in lines])
    _report(figure, found, note=f"test split: {_mean(found)}; val: {val}; {lines[0]['parameters']:,} parameters")


# ---- a GPU


def gpu(place: Path, runs: int, full: bool) -> None:
    """Share of an H200's bfloat16 peak that `base` reaches, compiled, in batches of its preset."""
    import torch

    if not torch.cuda.is_available():
        _report("gpu_base_mfu", [], note="no CUDA device on this machine")
        return
    warm_up_steps, steps = 5, 10
    _library_corpus(place, 8_192)
    train = {"steps": warm_up_steps + steps, "compile": True}
    recipe = _recipe(place, "base", {"corpus": "library", "model": "base", "train": train})
    shares = []
    for run in range(runs):
        command = _one_run(recipe, f"base-{run}", {}, "--warm-up-steps", warm_up_steps)
        line = _json_of(command, _environment(place))
        shares.append(line["tokens_per_second"] * line["flops_per_token"] / H200_FLOPS)
    note = (
        f"{torch.cuda.get_device_name()}, {line['tokens_per_second']:,.0f} tokens/s, {line['parameters']:,} parameters"
    )
    _report("gpu_base_mfu", shares, note=note)


if __name__ == "__main__":
    main()
