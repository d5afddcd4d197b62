"""The stages that texts go through, each a plain function over a batch: what the text becomes, or why it is dropped.

A new stage is a file here with its function, a section of the recipe's `Clean`, and its line in `stages_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ulm.recipes.corpus import Clean

Verdict = tuple[str, str | None]  # the text as it goes on, and the reason to drop it or None


@dataclass(frozen=True)
class Stage:
    """One step of cleaning, by its name in reports."""

    name: str
    apply: Callable[[Sequence[str]], list[Verdict]]  # one verdict per text, in order


def stages_of(clean: Clean, index: Path | None = None) -> list[Stage]:
    """The stages that a recipe turns on, in the order they run. `index`: the folder that decontamination looks up."""
    from pipelines.corpus.stages.c4 import c4_quality
    from pipelines.corpus.stages.characters import unify
    from pipelines.corpus.stages.decontamination import NgramIndex, decontaminate
    from pipelines.corpus.stages.encoding import repair
    from pipelines.corpus.stages.fineweb import fineweb_quality
    from pipelines.corpus.stages.gopher import gopher_quality, gopher_repetition
    from pipelines.corpus.stages.language import keep_languages
    from pipelines.corpus.stages.personal_data import redact

    stages = [Stage("encoding", repair)] if clean.encoding else []
    stages.append(Stage("characters", partial(unify, config=clean)))
    for name, function in (
        ("language", keep_languages),
        ("gopher_quality", gopher_quality),
        ("gopher_repetition", gopher_repetition),
        ("c4_quality", c4_quality),
        ("fineweb_quality", fineweb_quality),
    ):
        if (config := getattr(clean, name)) is not None:
            stages.append(Stage(name, partial(function, config=config)))
    if clean.decontamination is not None:
        assert index is not None
        stages.append(Stage("decontamination", partial(decontaminate, index=NgramIndex.open(index))))
    if clean.personal_data is not None:  # after decontamination: a placeholder would hide an evaluation set's text
        stages.append(Stage("personal_data", partial(redact, config=clean.personal_data)))
    return stages
