"""`ulm tokenizer train` on Ray Data: a tokenizer from the train split of cleaned sources, without their corpus."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipelines import job as submitted
from pipelines.corpus import assemble
from pipelines.corpus.job import over_ray
from pipelines.corpus.over import Progress
from ulm import artefacts
from ulm.recipes.corpus import TokenizerRecipe


def train(
    recipe: TokenizerRecipe, *, root: Path, near: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train and store a tokenizer; returns the last line of `ulm tokenizer train`.

    It is the one that `ulm corpus build` makes of the same sources. Raises ConfigError for a source that does not
    exist, CorpusError if no document is left.
    """
    over = over_ray(recipe.workers)
    tokenizer = assemble.train_tokenizer(recipe, root=root, near=near, over=over, progress=progress)
    with artefacts.shared_lock(root):  # so that `ulm gc` never sees it without its name
        place = tokenizer.save(root)
        artefacts.point(root / "tokenizers" / "names" / recipe.name, place)
    return {"tokenizer": str(place), "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}


def main(argv: list[str] | None = None) -> int:
    """`python -m pipelines.tokenizer_job RECIPE [--set a.b=c]`: the exit code."""
    return submitted.run("tokenizer train", train, argv)


if __name__ == "__main__":
    sys.exit(main())
