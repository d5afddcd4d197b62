"""`ulm demo`: the whole path on text that every machine has, in one command."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ulm import runtime
from ulm.cli import console, demo_text
from ulm.cli.cluster import session
from ulm.cli.options import Address
from ulm.cli.swarm import comparison
from ulm.recipes import CorpusRecipe, ServeRecipe, SwarmRecipe
from ulm.recipes.base import validate

NAME = "demo"
PROMPTS = {
    "code": "def read(self, size=-1):\n    ",
    "docstrings": "Return a list of the",
    "reference": "The following sections describe",
    "drama": "ROMEO. ",
    "scripture": "And the LORD said unto",
}
TIMEOUT_S = 120.0


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("demo")(demo)


def demo(
    tokens: Annotated[int, typer.Option(min=20_000, help="Training tokens of seed and experts together.")] = 1_000_000,
    port: Annotated[int | None, typer.Option(help="Of the endpoint; any free one by default.")] = None,
    address: Address = None,
) -> None:
    """Text in, a swarm answering at one endpoint: corpus, tokenizer, seed, experts, swarm, endpoint, answers.

    Takes a few minutes on two cores. Example: ulm demo --tokens 2000000
    """
    started_s = time.monotonic()
    root = runtime.root()
    from pipelines.corpus import job as corpus_job
    from pipelines.swarm import job as swarm_job
    from serve import app as serve_app
    from serve import door
    from serve.plan import make_plan

    files = demo_text.write(root / "demo-text")
    port = port or _free_port()
    door.check_port("127.0.0.1", port)
    out = sys.stdout
    with session(root, address) as joined:
        with console.bars() as bars:
            _say("1 corpus", "the running Python's own library, cleaned, deduplicated, tokenized with Ray Data")
            corpus = corpus_job.build(_corpus_recipe(files), root=root, near=None, progress=bars.update)
            _say("2 swarm", "a seed, one expert per cluster, and one dense model for comparison, with Ray Train")
            swarm = swarm_job.train_swarm(
                _swarm_recipe(tokens, len(files)), root=root, near=None, on_progress=bars.step, on_event=bars.event
            )
        if swarm.get("status") == "interrupted":
            console.finish_job(swarm, out)
        _say("3 endpoint", "every model of the swarm behind one OpenAI-compatible address, with Ray Serve")
        try:
            recipe = validate(ServeRecipe, {"name": NAME, "swarm": NAME, "port": port})
            served = serve_app.up(make_plan(recipe, root=root, near=None), recipe)
            console.err.print(f"{served['url']}  models: {', '.join(served['models'])}")
            answers = [_ask(served["url"], PROMPTS[domain]) for domain in files]
        finally:
            if not joined.is_own:  # a cluster of our own ends as a whole
                serve_app.down()
    _show(answers)
    console.err.print(comparison(swarm["bits_per_byte"]))
    _verdict(swarm)
    seconds = time.monotonic() - started_s
    console.err.print(f"{seconds:.0f} seconds in all; everything is under {root}")
    console.finish(
        {
            "corpus": corpus["corpus"],
            "swarm": swarm["swarm"],
            "endpoint": served["url"],
            "answers": answers,
            "bits_per_byte": swarm["bits_per_byte"],
            "seconds": round(seconds, 1),
        }
    )


def _say(step: str, text: str) -> None:
    console.err.print(f"[bold]{step}[/]  {text}")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _corpus_recipe(files: dict[str, Path]) -> CorpusRecipe:
    sources = [
        {"path": str(path), "name": domain, "domain": domain, "licence": _licence(domain)}
        for domain, path in files.items()
    ]
    return validate(CorpusRecipe, {"name": NAME, "sources": sources, "tokenizer": {"kind": "bpe", "vocab_size": 4096}})


def _licence(domain: str) -> str:
    return "public domain" if domain in ("drama", "scripture") else "PSF-2.0"


def _swarm_recipe(tokens: int, num_domains: int) -> SwarmRecipe:
    return validate(
        SwarmRecipe,
        {
            "name": NAME,
            "corpus": NAME,
            "model": {"preset": "nano"},
            "train": {"tokens": tokens, "batch_tokens": 4096, "context_tokens": 256},
            "experts": max(3, num_domains),
            "evaluation": {"tokens_per_domain": 10_000},
        },
    )


def _ask(url: str, prompt: str) -> dict[str, Any]:
    """One question over HTTP, to the mixture; the weight of each expert in the answer."""
    import httpx

    body = {"model": "swarm/mixture", "prompt": prompt, "max_tokens": 48, "temperature": 0.7, "seed": 1}
    response = httpx.post(f"{url}/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
    answer = response.raise_for_status().json()
    weights: dict[str, float] = {}
    for call in answer["ulm"]["calls"]:
        weights[call["member"]] = weights.get(call["member"], 0.0) + call["weight"] * call["tokens_out"]
    total = sum(weights.values()) or 1.0
    shares = {member: round(weight / total, 4) for member, weight in weights.items()}
    return {"prompt": prompt, "text": answer["choices"][0]["text"], "members": shares}


def _show(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        shares = ", ".join(f"{member} {share:.0%}" for member, share in answer["members"].items())
        console.err.print(f"\n[bold cyan]{shares}[/]")
        console.err.print(answer["prompt"], style="dim", end="", markup=False)
        console.err.print(answer["text"], markup=False)
    console.err.print()


def _verdict(swarm: dict[str, Any]) -> None:
    """One line on who won, and why a small budget decides it."""
    rows = swarm["bits_per_byte"].values()
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("dense", "route", "mixture")}
    best = min(mean, key=mean.__getitem__)
    per_parameter = swarm.get("tokens_per_parameter")
    spent = f"{per_parameter:.1f} tokens per parameter" if per_parameter else "this budget"
    if best == "dense":
        console.err.print(
            f"At {spent} the dense model wins: a swarm needs more tokens per parameter (about 10) to win."
        )
    else:
        console.err.print(
            f"At {spent} the swarm wins by {best}: {mean[best]:.3f} against {mean['dense']:.3f} bits per byte."
        )
