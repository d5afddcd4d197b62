"""Group `corpus`: a build's speed against its parts and its peers, its memory, and what near duplicates it finds.

Run by `ulm bench corpus` in a checkout, with ULM_CORPORA set. About twenty minutes. Everything runs on two cores of the
machine; where Ray takes part it is running already, and its two workers have built a corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks import _near
from tests.benchmarks._figures import report
from tests.benchmarks._peak import Peak
from tests.benchmarks._texts import grown, num_bytes, training_texts, write_texts
from ulm import runtime

ULM = [sys.executable, "-m", "ulm.cli.main"]
PEERS = Path(".venv-peers/bin/python")
WORKERS = 2
RUNS = 3
DATATROVE_MEGABYTES = 10  # that datatrove is given, which takes 6 s for each on two cores; all with --full
RAW_BATCHES = (100, 1_000, 10_000)  # texts for encode_batch at once, of which the fastest counts
RAW_TRIAL_TEXTS = 4_000
WARM_BYTES = 9_000_000  # of text in a build that is not measured: parts for both workers
GROWN_MEGABYTES, GROWN_MEGABYTES_FULL, MAX_GROWTH = 300, 1_000, 4
NEAR_TEXTS = 1_000  # that copies are planted of, for each of three seeds
WHOLE_CPU = "sum of the stages' CPU seconds / 2 cores"
RAW = "tokenizers.encode_batch"
DATATROVE = "datatrove 0.10.1, LocalPipelineExecutor"

Texts = dict[str, list[str]]  # documents of each corpus
Values = dict[str, Any]
FIGURES: dict[str, Values] = {  # as report takes them
    "corpus_tokenize_rate": {"unit": "MB/s", "goal": ">= 0.8", "peer": RAW},
    "corpus_build_efficiency": {"unit": "s", "goal": "<= 1.25", "peer": WHOLE_CPU},
    "corpus_two_workers": {"unit": "MB/s", "goal": ">= 1.5", "peer": "one worker"},
    "corpus_against_datatrove": {"unit": "documents/s", "goal": ">= 1", "peer": DATATROVE},
    "corpus_peak_memory": {"unit": "GB", "goal": "<= 3"},
    "near_duplicate_recall": {"unit": "share", "goal": ">= 0.95"},
    "near_duplicate_precision": {"unit": "share", "goal": ">= 0.95"},
    "near_duplicates_found_5": {"unit": "share"},
    "near_duplicates_found_15": {"unit": "share"},
    "near_duplicates_found_30": {"unit": "share"},
}


def main() -> None:
    """All figures of the group."""
    measures = {"tokenize": tokenize, "build": build, "datatrove": datatrove, "memory": memory, "near": near}
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None)
    options.add_argument("--full", action="store_true", help="memory on 1 GB, datatrove on all texts")
    options.add_argument("--only", default=None, choices=measures)
    options.add_argument("--megabytes", type=float, default=None, help="of the texts, for a quick look")
    chosen = options.parse_args()
    if (corpora := runtime.variable("ULM_CORPORA")) is None:
        for figure in FIGURES:
            _report(figure, [], note="ULM_CORPORA is not set: no folder with train/ to measure on")
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])  # children inherit it
    texts = training_texts(Path(corpora), chosen.megabytes)
    with tempfile.TemporaryDirectory(prefix="ulm-bench-") as folder:
        for name, measure in measures.items():
            if chosen.only in (None, name):
                place = Path(folder) / name
                place.mkdir()
                measure(place, texts, chosen.full)
                shutil.rmtree(place)


def _report(figure: str, values: Sequence[float], peer_values: Sequence[float] = (), note: str | None = None) -> None:
    report(figure, values, peer_values=peer_values, note=note, **FIGURES[figure])


# ---- Ray


@contextlib.contextmanager
def _ray(place: Path, texts: Texts) -> Iterator[None]:
    """Ray in this process with workers that have built a corpus already."""
    import ray

    some: Texts = {}
    for name, documents in texts.items():
        if sum(map(num_bytes, some.values())) < WARM_BYTES:
            some[name] = documents
    _write(place / "warm", some)
    runtime.set_variable("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        _timed_build(place, place / "warm", WORKERS)
        yield
    finally:
        ray.shutdown()


def _timed_build(place: Path, texts: Path, workers: int, **more: Any) -> tuple[float, float, Values]:
    """Seconds of a build in a root of its own, CPU seconds of its stages, its manifest.

    CPU seconds: the workers' stages (from reading to signatures, near duplicates, tokenize), and this process's all
    through the build but for "read and clean" and "tokenize", where it only waits and what it spends is Ray Data's.
    """
    from pipelines.corpus import job

    with tempfile.TemporaryDirectory(dir=place) as root:
        start_s, start_cpu_s = time.monotonic(), time.process_time()
        built = job.build(_recipe(texts, workers=workers, **more), root=Path(root))
        wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
        manifest = json.loads((Path(built["corpus"]) / "manifest.json").read_text(encoding="utf-8"))
    stages_s = manifest["cpu_seconds"]
    cpu_s += sum(seconds for stage, seconds in stages_s.items() if stage.endswith("(workers)"))
    return wall_s, cpu_s - stages_s["read and clean"] - stages_s["tokenize"], manifest


def _recipe(texts: Path, **more: Any) -> Any:
    from ulm.recipes.base import validate
    from ulm.recipes.corpus import CorpusRecipe

    return validate(CorpusRecipe, {"name": "bench", "sources": [{"path": str(texts)}], **more})


def _write(folder: Path, texts: Texts) -> int:
    """Write the texts, a file for each corpus; returns their bytes."""
    return sum(write_texts(folder, name, documents) for name, documents in texts.items())


def _said(manifest: Values, text_bytes: int) -> str:
    documents = manifest["documents"]
    return f"{text_bytes / 1e6:.0f} MB of text, {documents['kept']:,} of {documents['in']:,} documents kept"


# ---- figures


def tokenize(place: Path, texts: Texts, full: bool) -> None:
    """Tokenizing all texts on two workers and writing the corpus, against the library's own batches on two threads.

    Each run begins with tokenizers that have seen no text yet.
    """
    import tokenizers

    from pipelines.corpus import job, steps, work
    from pipelines.corpus.part import read_texts
    from pipelines.corpus.publish import publish
    from pipelines.corpus.tokens import SHARD_BYTES

    _write(place / "texts", texts)
    stages = dict.fromkeys(("encoding", "nfc", "control", "duplicate_exact", "duplicate_near"), False)
    ours, raw = [], []
    with _ray(place, texts):
        recipe = _recipe(place / "texts", workers=WORKERS, clean=stages)
        made = steps.Build(recipe, root=place, near=None, over=job.over_ray(WORKERS), progress=None)
        with work.unfinished(place, recipe.name, made.identity()) as folder:
            made.read_and_clean(folder)
            made.judge()
            tokenizer = made.find_tokenizer()
            documents = [found.text for part in made.parts for found in read_texts(part)]
            megabytes = num_bytes(documents) / 1e6
            stored = str(tokenizer.save(place) / "tokenizer.json")
            trial = documents[:: max(1, len(documents) // RAW_TRIAL_TEXTS)]
            speeds = {size: _raw_s(tokenizers.Tokenizer.from_file(stored), trial, size) for size in RAW_BATCHES}
            best = min(speeds, key=speeds.__getitem__)
            for run in range(RUNS):
                made.root = place / f"root-{run}"  # a tokenizer at a new place: workers load it anew
                (made.root / "corpora").mkdir(parents=True)
                start_s = time.monotonic()
                publish(made, made.tokenize(tokenizer), SHARD_BYTES)
                ours.append(megabytes / (time.monotonic() - start_s))
                shutil.rmtree(folder / "tokens")
                raw.append(megabytes / _raw_s(tokenizers.Tokenizer.from_file(stored), documents, best))
    note = f"{megabytes:.0f} MB, {tokenizer.vocab_size} tokens; ours with shards, documents, report and manifest; "
    _report("corpus_tokenize_rate", ours, raw, f"{note}the peer with batches of {best:,} texts, the fastest tried")


def _raw_s(inner: Any, texts: list[str], batch: int) -> float:
    start_s = time.monotonic()
    for first in range(0, len(texts), batch):
        inner.encode_batch(texts[first : first + batch], add_special_tokens=False)
    return time.monotonic() - start_s


def build(place: Path, texts: Texts, full: bool) -> None:
    """Whole builds with two workers and with one, by turns: their times, and the CPU time of their stages."""
    text_bytes = _write(place / "texts", texts)
    seconds, least, one = [], [], []
    with _ray(place, texts):
        for _ in range(RUNS):
            wall_s, cpu_s, manifest = _timed_build(place, place / "texts", WORKERS)
            seconds.append(wall_s)
            least.append(cpu_s / WORKERS)
            one.append(_timed_build(place, place / "texts", 1)[0])
    note = _said(manifest, text_bytes)
    counted = "CPU of the workers' stages and of the driver, but for what it spends on Ray Data while it waits for them"
    _report("corpus_build_efficiency", seconds, least, f"{note}; {counted}")
    speeds = ([text_bytes / 1e6 / s for s in run] for run in (seconds, one))
    _report("corpus_two_workers", *speeds, note)


def datatrove(place: Path, texts: Texts, full: bool) -> None:
    """Gopher and C4 rules, exact and near duplicates, tokenizing to shards: ours against datatrove's, by turns."""
    figure = "corpus_against_datatrove"
    if not PEERS.is_file():
        _report(figure, [], note=f"no {PEERS}: `make peers` makes it")
        return
    share = 1.0 if full else min(1.0, DATATROVE_MEGABYTES * 1e6 / sum(map(num_bytes, texts.values())))
    some = {name: documents[: round(share * len(documents))] for name, documents in texts.items()}
    text_bytes = _write(place / "texts", some)
    dealt = [text for documents in some.values() for text in documents]
    for worker in range(WORKERS):  # documents of all kinds in each task's shard, so that both take as long
        write_texts(place / "shards", f"{worker}", dealt[worker::WORKERS])
    stages = dict.fromkeys(("encoding", "nfc", "control"), False)
    stages |= dict.fromkeys(("gopher_quality", "gopher_repetition", "c4_quality"), True)
    tokenizer = _tokenizer(place, dealt)
    ours, theirs = [], []
    with _ray(place, some):
        for run in range(1 if full else RUNS):
            options = {"clean": stages, "tokenizer": str(tokenizer), "split": {"val": 0, "test": 0}}
            wall_s, _, manifest = _timed_build(place, place / "texts", WORKERS, **options)
            ours.append(len(dealt) / wall_s)
            arguments = [place / "shards", place / f"datatrove-{run}", tokenizer / "tokenizer.json", WORKERS]
            command = [PEERS, Path(__file__).with_name("_datatrove_peer.py"), *arguments]
            found = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if found.returncode != 0:
                _report(figure, [], note=f"datatrove failed (`make peers` makes it anew): {found.stderr[-300:]}")
                return
            peer = json.loads(found.stdout.splitlines()[-1])
            theirs.append(len(dealt) / peer["seconds"])
    note = (
        f"{_said(manifest, text_bytes)} by us ({sum(manifest['tokens'].values()):,} tokens), {peer['documents']:,} by "
        f"datatrove ({peer['tokens']:,} tokens), whose spaCy takes punctuation for words; {WORKERS} tasks and shards, "
        "forked after imports, 18 buckets of 7 hashes, files not compressed; our time holds manifest and report"
    )
    _report(figure, ours, theirs, note)


def _tokenizer(place: Path, texts: Sequence[str]) -> Path:
    from ulm.tokenizers.bpe import train_bpe

    return train_bpe(texts[::10], 8_192).save(place)


def memory(place: Path, texts: Texts, full: bool) -> None:
    """The most memory that `ulm corpus build` and its cluster have at a time, on text grown from the corpora."""
    bound = 1e6 * GROWN_MEGABYTES_FULL
    if not full:  # of fewer texts, for a quick look, as many copies
        bound = min(1e6 * GROWN_MEGABYTES, MAX_GROWTH * sum(map(num_bytes, texts.values())))
    written = copy = 0
    while written < bound:
        for name, documents in texts.items():
            if written < bound:
                more = grown(documents, seed=copy) if copy else documents
                written += write_texts(place / "texts", f"{name}-{copy}", more)
        copy += 1
    recipe = place / "bench.yaml"
    recipe.write_text(f"name: bench\nsources: [{{path: {place / 'texts'}}}]\nworkers: {WORKERS}\n")
    environment = {**runtime.environment(), "ULM_HOME": str(place / "home")}
    peak = Peak(environment["ULM_HOME"])
    found = subprocess.run([*ULM, "corpus", "build", str(recipe)], env=environment, capture_output=True, text=True)
    peak_bytes = peak.stop()
    if found.returncode != 0:
        _report("corpus_peak_memory", [], note=f"the build failed: {found.stderr[-300:]}")
        return
    corpus = Path(json.loads(found.stdout.splitlines()[-1])["corpus"])
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    _report("corpus_peak_memory", [peak_bytes / 1e9], note=_said(manifest, written))


def near(place: Path, texts: Texts, full: bool) -> None:
    """What is found of copies with 1 to 30 % of their words changed, against exact Jaccard similarity."""
    documents = [text for found in texts.values() for text in found]
    runs = [_near.quality(documents, NEAR_TEXTS, seed) for seed in range(RUNS)]
    values = {key: [run[key] for run in runs] for key in runs[0]}
    due, reported = (f"{sum(values[key]):,.0f} pairs {key} in all" for key in ("due", "reported"))
    _report("near_duplicate_recall", values["recall"], note=f"{due}, Jaccard 0.8 or more, words changed 1 to 30 %")
    _report("near_duplicate_precision", values["precision"], note=f"{reported}, of which Jaccard 0.6 or more")
    for percent in (5, 15, 30):
        _report(f"near_duplicates_found_{percent}", values[f"found {percent / 100}"], note="of the planted pairs")


if __name__ == "__main__":
    main()
