"""Which corpora a run takes rows of, and from where on: a corpus may be extended between two of its starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import torch.distributed as dist

from pipelines.train.task import TrainTask
from ulm.checkpoints import store
from ulm.corpus.lineage import versions
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.train import SwarmRecipe

TASK = "task.json"  # in a run's folder: the identity of its task, and its legs


@dataclass(frozen=True)
class Leg:
    """From global position `cursor` on, rows of this corpus are taken. Each leg's corpus extends the one before."""

    cursor: int
    corpus: str  # its digest
    documents: int  # that it has: the first ones of every corpus that extends it


def recorded(folder: Path) -> tuple[dict[str, Any], tuple[Leg, ...]] | None:
    """What task.json says of a run: its identity, and its legs by cursor; None where there is no such file."""
    path = folder / TASK
    if not path.is_file():
        return None
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        first, *more = (Leg(**leg) for leg in identity.pop("legs"))
        return identity, (first, *more)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "remove the folder, or give the recipe another name"
        raise ArtefactError(f"{path}: does not say what the run is: {error!r}; {remedy}") from None


def of(task: TrainTask) -> tuple[Leg, ...]:
    """The legs of a run: those that its folder records, and one from its newest checkpoint on if its corpus has grown.

    They are only ever added to, so that a run follows one order from whichever checkpoint it goes on.
    ConfigError where the task's corpus is no extension of that of the last leg.
    """
    corpus, held = Corpus.open(str(task.corpus), verify=False), recorded(task.folder)
    if held is None:
        return (Leg(task.start_cursor, corpus.digest, corpus.documents.num_rows),)
    legs = held[1]
    if corpus.digest == legs[-1].corpus:
        return legs
    _check_extends(task, corpus, legs[-1])
    newest = store.newest(task.folder)
    cursor = task.start_cursor + (store.step_of(newest) if newest else 0) * task.rows_per_batch
    # The newest checkpoint may have been lost since the last leg began: then the run comes to that first.
    return (*legs, Leg(max(cursor, legs[-1].cursor), corpus.digest, corpus.documents.num_rows))


def agreed(task: TrainTask, rank: int, world_size: int, device: torch.device) -> tuple[Leg, ...]:
    """The legs as rank 0 sees them, on every rank: it has written them, and others may not see that file yet."""
    shared = [of(task) if rank == 0 else ()]
    if world_size > 1:
        dist.broadcast_object_list(shared, src=0, device=device)
    return shared[0]


def dumped(legs: tuple[Leg, ...]) -> list[dict[str, Any]]:
    """The legs as task.json and a checkpoint's state have them."""
    return [asdict(leg) for leg in legs]


def has_grown(legs: tuple[Leg, ...], state: dict[str, Any], place: Path) -> bool:
    """Whether legs were added since this checkpoint; ArtefactError where it was trained on others than these."""
    before = state["legs"]
    if dumped(legs)[: len(before)] != before:
        remedy = "the folder's files are not of one run: put back those that belong together, or remove it"
        raise ArtefactError(f"{place}: was trained on other corpora than {TASK} beside it says; {remedy}")
    return len(before) < len(legs)


def _check_extends(task: TrainTask, corpus: Corpus, last: Leg) -> None:
    now = f"{corpus.name} ({corpus.digest[:12]})"
    known = f"run {task.run!r} is trained on {last.corpus[:12]}"
    if versions(corpus).get(last.corpus) != last.documents:
        problem = f"{known}, and {now} is no extension of that{_missing(corpus, last)}"
        remedy = f"name {last.corpus[:12]}, or what `ulm corpus extend` makes of it, or give this recipe another name"
        raise ConfigError("corpus", problem, remedy)
    if task.documents or task.start_cursor or isinstance(task.recipe, SwarmRecipe):
        problem = f"{known}, now {now}: the runs of a swarm share clusters and order of one corpus"
        raise ConfigError("corpus", problem, f"name {last.corpus[:12]} to go on, or give the swarm another name")


def _missing(corpus: Corpus, last: Leg) -> str:
    """How many of the last leg's documents the corpus lacks, as part of a message; nothing where that is not known."""
    try:
        before = Corpus.read(corpus.folder.parent / last.corpus, verify=False).documents["id"]
    except ArtefactError:
        return ""
    lacking = pc.sum(pc.invert(pc.is_in(before, value_set=corpus.documents["id"].combine_chunks()))).as_py()
    return f": it lacks {lacking} of its {last.documents} documents" if lacking else ""
