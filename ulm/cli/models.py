"""`ulm generate`, `ulm show`: one model at a time, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ulm import runtime
from ulm.cli import console, model_tables
from ulm.cli.options import Checkpoint
from ulm.errors import ConfigError, RequestError


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    for verb in (generate, show):
        app.command(verb.__name__)(verb)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Draw among the fewest tokens that have this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw no token below this share of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, max=100.0, help="Above 1: fewer tokens of the prompt and the answer again.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="Off the score of a token that the answer has.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="Off the score of a token, for each time that the answer has it.")
    ] = 0.0,
    logit_bias: Annotated[
        list[str], typer.Option(metavar="TOKEN=BIAS", help="Add to a token id's score, -100 … 100; may be repeated.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str], typer.Option(help="End before this text; may be repeated.")] = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
) -> None:
    """Continue a prompt with one model, by the plain generator that the engines are held to.

    Example: ulm generate demo-e00 "def main(" --max-tokens 40
    """
    from ulm.checkpoints import store
    from ulm.models.generate import generate as run
    from ulm.models.sampling import Sampling

    with _refusals_as_usage():  # before the model is loaded
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=tuple(_bias(text) for text in logit_bias),
            seed=seed,
        )
    path = store.resolve(checkpoint, root=runtime.root(), near=Path.cwd())
    model, tokenizer = store.load(path, runtime.device(device))
    with _refusals_as_usage():
        sampling.check(tokenizer.vocab_size)
    result = run(model.eval(), tokenizer, prompt, max_tokens=max_tokens, stop=stop, **dict(sampling))
    console.err.print(prompt, style="dim", end="", markup=False)
    console.err.print(result.text, markup=False)
    console.finish({"text": result.text, "tokens": result.tokens, "logprobs": result.logprobs})


@contextmanager
def _refusals_as_usage() -> Iterator[None]:
    """Settings that are refused are wrong usage here: ConfigError, so that the verb exits with 2."""
    try:
        yield
    except RequestError as error:
        option = "--" + (error.param or "").replace("_", "-")
        raise ConfigError(option, str(error).removeprefix(f"{error.param}: ")) from None


def _bias(text: str) -> tuple[int, float]:
    """A token and its bias from TOKEN=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError("--logit-bias", f"{text!r} is not TOKEN=BIAS", "for example 42=-100") from None


def show(
    spec: Annotated[
        str, typer.Argument(help="A size (nano … base, 25M), a preset/size, a YAML file, or a checkpoint.")
    ],
) -> None:
    """A model's parts from token to logits, and what they cost: parameters, FLOPs per token, bytes of cache.

    Example: ulm show nano
    """
    import torch

    from ulm import dial
    from ulm.checkpoints import store
    from ulm.models.account import cache_bytes, forward_flops_per_token, num_parameters, train_flops_per_token
    from ulm.models.decoder import build
    from ulm.spec import ModelSpec, preset_sizes

    preset, _, size = spec.partition("/")
    home, given = runtime.root(), None
    is_taken = any((place / spec).exists() for place in (Path.cwd(), home, home / "runs", home / "models"))
    if spec.endswith((".yaml", ".yml")):
        chosen = ModelSpec.from_yaml(spec)
    elif any(spec in p["sizes"] for p in preset_sizes().values()) or (not is_taken and dial.parsed(spec)):
        chosen = ModelSpec.parse(given := {"size": spec})
    elif size and preset in preset_sizes() and not is_taken:
        chosen = ModelSpec.parse(given := {"preset": preset, "size": size})
    else:
        chosen = store.read_spec(store.resolve(spec, root=home, near=Path.cwd(), place="spec"))
    with torch.device("meta"):
        model = build(chosen)
    parameters, cache = num_parameters(model), cache_bytes(chosen)
    costs = {
        "parameters": parameters,
        "forward_flops_per_token": forward_flops_per_token(model, chosen.context_tokens),
        "train_flops_per_token": train_flops_per_token(model, chosen.context_tokens),
        "cache_bytes_per_token": cache.per_token,
        "cache_bytes_fixed": cache.fixed,
    }
    console.err.print(model_tables.model(chosen, model, costs), soft_wrap=False)
    training = {**dial.training_defaults(parameters), **ModelSpec.training_defaults(given)} if given else None
    if training:
        batch, rate = training["batch_tokens"], training["lr"]
        console.err.print(
            f"trained in batches of {batch:,} tokens at a peak rate of {rate:.2g}, unless a recipe says more"
        )
    console.finish({"spec": chosen.model_dump(), **costs, "training": training})
