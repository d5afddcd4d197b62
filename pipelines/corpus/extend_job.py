"""`ulm corpus extend` as a Ray job: `python -m pipelines.corpus.extend_job RECIPE`."""

from __future__ import annotations

import sys

from pipelines import job as submitted
from pipelines.corpus.job import build


def main(argv: list[str] | None = None) -> int:
    """`python -m pipelines.corpus.extend_job RECIPE [--set a.b=c]`: the exit code."""
    return submitted.run("corpus extend", build, argv)


if __name__ == "__main__":
    sys.exit(main())
