"""`ulm submit`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ulm.cli import console
from ulm.cli.options import Overrides, Recipe
from ulm.errors import ClusterError, ConfigError, did_you_mean
from ulm.recipes import load_recipe

MODULES = {
    "corpus build": "pipelines.corpus.job",
    "corpus extend": "pipelines.corpus.extend_job",
    "tokenizer train": "pipelines.tokenizer_job",
    "train": "pipelines.train.job",
    "swarm train": "pipelines.swarm.job",
    "swarm add": "pipelines.swarm.add_job",
}
AGENT_TIMEOUT_S = 60.0


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("submit")(submit)


def submit(
    verb: Annotated[str, typer.Argument(help=", ".join(MODULES))],
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer copies it
    address: Annotated[str | None, typer.Option(help="The cluster's dashboard, e.g. http://head:8265.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job's log to its end.")] = False,
) -> None:
    """Run a job on a cluster: the current folder travels as the working directory.

    Example: ulm submit train train.yaml --address http://192.168.1.10:8265
    """
    if verb not in MODULES:
        raise ConfigError("verb", f"no job {verb!r}", did_you_mean(verb, MODULES))
    load_recipe(verb, recipe, overrides)  # its mistakes are said here, not on the cluster
    if recipe.is_absolute() or not recipe.exists():
        raise ConfigError(str(recipe), "must lie under the current folder, which travels", "a relative path")
    from ray.job_submission import JobSubmissionClient

    command = ["python", "-m", MODULES[verb], str(recipe)]
    command += [part for override in overrides for part in ("--set", override)]
    try:
        client = JobSubmissionClient(address)
        job = _accepted(
            lambda: client.submit_job(
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": ".", "excludes": [".venv", ".venv-peers", ".git"]},
                metadata={"name": f"ulm {verb} {recipe.stem}"},
            )
        )
        if wait:
            _follow(client, job)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the job was not accepted: {error}") from None
    console.finish({"job": job, "status": client.get_job_status(job).value})


def _accepted(submit_job: Callable[[], str]) -> str:
    """The job's id. A cluster that has just started has no job agent yet, and says so for some seconds."""
    deadline_s = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return submit_job()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(1.0)


def _follow(client: Any, job: str) -> None:
    shown = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        console.err.print(log[shown:], end="", markup=False)
        shown = len(log)
        if status.is_terminal():
            if status.value != "SUCCEEDED":
                raise ClusterError(f"the job {job} ended as {status.value}: {client.get_job_info(job).message}")
            return
        time.sleep(0.5)
