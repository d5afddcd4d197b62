"""A verb of the command line as a Ray job: `python -m pipelines.….job RECIPE [--set a.b=c]`, for `ray job submit`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from ulm import runtime
from ulm.errors import ConfigError, UlmError
from ulm.recipes import load_recipe

EXIT_FAILED, EXIT_WRONG_RECIPE, EXIT_INTERRUPTED = 1, 2, 143


def run(verb: str, work: Callable[..., dict[str, Any]], argv: Sequence[str] | None) -> int:
    """Do a verb's work by the recipe that the arguments name, write its line of JSON; the exit code.

    `work` takes the recipe, `root` (ULM_HOME) and `near` (the recipe's folder, absolute) once Ray is there; a
    "status" in its line says that it was stopped and has saved.
    """
    parser = argparse.ArgumentParser(description=f"ulm {verb}, as a Ray job")
    parser.add_argument("recipe", type=Path, help="a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        recipe = load_recipe(verb, options.recipe, options.set)
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        line = work(recipe, root=runtime.root(), near=options.recipe.absolute().parent)
    except UlmError as error:
        sys.stderr.write(f"ulm {verb}: {error}\n")
        return EXIT_WRONG_RECIPE if isinstance(error, ConfigError) else EXIT_FAILED
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    return EXIT_INTERRUPTED if "status" in line else 0
