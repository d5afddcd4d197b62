"""`ulm corpus extend` as a Ray job: `python -m pipelines.corpus.extend_job RECIPE`."""

from __future__ import annotations

import sys

from pipelines.corpus.job import build, run
from ulm.recipes.corpus import ExtendRecipe


def main(argv: list[str] | None = None) -> int:
    """`python -m pipelines.corpus.extend_job RECIPE [--set a.b=c]`: the exit code."""
    return run("corpus extend", ExtendRecipe, build, argv)


if __name__ == "__main__":
    sys.exit(main())
