"""From a token back to its file, from a corpus to those it extends, from a document on to the models that saw it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ulm import artefacts
from ulm.checkpoints.manifest import CheckpointManifest, read_manifest
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError, ConfigError

AROUND_TOKENS = 24  # shown before and after a token
MIN_ID_CHARS = 8  # of a document's id that are given instead of all


def document_of_token(corpus: Corpus, split: str, token: int) -> dict[str, Any]:
    """The document that holds a token of a split: its row, the token's place in it, and the text around.

    `token` counts from 0 over the split's shards laid end to end; ConfigError beyond the end.
    """
    if not 0 <= token < corpus.num_tokens(split):
        remedy = ", ".join(f"{name}:0 to {name}:{corpus.num_tokens(name) - 1}" for name in corpus.splits)
        raise ConfigError("token", f"{corpus.name} has no token {split}:{token}", remedy)
    documents = corpus.documents
    rows = np.flatnonzero(pc.equal(documents["split"], split).to_numpy(zero_copy_only=False))
    firsts = documents["first_token"].to_numpy()[rows]
    row = int(rows[np.searchsorted(firsts, token, side="right") - 1])  # of equal ones the last: the others are empty
    document = documents.slice(row, 1).to_pylist()[0]
    within = token - document["first_token"]
    ids = corpus.tokens(split).read(document["first_token"], document["num_tokens"])

    def text(first: int, last: int) -> str:
        return corpus.tokenizer.decode(ids[max(0, first) : last].tolist())

    return {
        "row": row,
        "document": document,
        "token_in_document": within,
        "id": int(ids[within]),
        "text": text(within, within + 1),
        "before": text(within - AROUND_TOKENS, within),
        "after": text(within + 1, within + 1 + AROUND_TOKENS),
    }


def find_document(corpus: Corpus, text: str) -> int:
    """The row of the document with this id, or with the only id that begins so; ConfigError otherwise."""
    ids = corpus.documents["id"]
    if len(exact := _rows(pc.equal(ids, text))):
        return int(exact[0])
    if len(text) < MIN_ID_CHARS:
        raise ConfigError("document", f"{text!r} is too short", f"an id, or at least {MIN_ID_CHARS} of its characters")
    found = _rows(pc.starts_with(ids, text))
    if len(found) == 1:
        return int(found[0])
    if not len(found):
        remedy = "ids are in documents.parquet, and `ulm corpus show NAME --token train:0` shows one"
        raise ConfigError("document", f"{corpus.name} has none whose id begins with {text!r}", remedy)
    first = ", ".join(ids.take(found[:3]).to_pylist())
    raise ConfigError("document", f"{len(found)} documents begin with {text!r}", f"more characters: {first}")


def _rows(mask: Any) -> Any:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


def versions(corpus: Corpus) -> dict[str, int]:
    """The corpus and those that it extends, newest first: digest to number of documents, which are its first ones.

    They are looked for beside it; the first that is not there any more is the last that is known.
    """
    found = {corpus.digest: corpus.documents.num_rows}
    while base := corpus.manifest.get("base"):
        try:
            digest, num_documents = base["digest"], int(base["documents"])
        except (KeyError, TypeError, ValueError):
            digest, num_documents = None, 0
        if digest != corpus.manifest["content"].get("base") or not 0 <= num_documents <= found[corpus.digest]:
            raise ArtefactError(f"{corpus.folder / 'manifest.json'}: base: not what its content says; copy it again")
        found[digest] = num_documents
        if not (folder := corpus.folder.parent / digest).is_dir():
            break
        corpus = Corpus.read(folder, verify=False)
    return found


@dataclass(frozen=True)
class Trained:
    """A checkpoint of the root, and what its run says it was trained on."""

    folder: Path
    manifest: CheckpointManifest
    task: dict[str, Any] | None  # of the run's task.json; None for a checkpoint that is in no run


def models_that_saw(identity: str, root: Path) -> dict[str, Any]:
    """Corpora, models and swarms of the root that hold or were trained on the document with this id.

    A model saw the document when its corpus has it in the train split and, for an expert, in its cluster, or when
    the checkpoint that it began with saw it ("inherited"). Each model is named once, by its newest checkpoint.
    `passes` is how often the run has gone over its documents by then: below 1 it may not have come to this one.
    What could not be read is listed under "unreadable": its models may have seen the document too.
    """
    unreadable: list[str] = []
    corpora = _corpora_with(identity, root, unreadable)
    checkpoints = list(_checkpoints(root, unreadable))
    how: dict[str, dict[str, Any]] = {}  # by checkpoint digest
    for trained in checkpoints:
        try:
            found = _trained_on(trained, corpora, unreadable)
        except ArtefactError as error:
            unreadable.append(str(error))
            continue
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            unreadable.append(f"{trained.folder.parent}: what it was trained on is not readable: {error!r}")
            continue
        if found is not None:
            how[trained.manifest.digest] = found
    spread = True
    while spread:  # a child may be listed before its parent
        spread = False
        for trained in checkpoints:
            parent = trained.manifest.init_from
            if trained.manifest.digest not in how and parent in how:
                how[trained.manifest.digest] = {"how": "inherited", "from": parent, "corpus": how[parent]["corpus"]}
                spread = True
    models: dict[str, dict[str, Any]] = {}
    for trained in sorted(checkpoints, key=lambda t: (str(t.folder.parent), t.manifest.step)):
        if trained.manifest.digest in how:
            name = trained.manifest.run or _relative(trained.folder, root)
            place = {"model": name, "checkpoint": _relative(trained.folder, root), "step": trained.manifest.step}
            models[str(trained.folder.parent)] = {**place, **how[trained.manifest.digest]}
    return {
        "corpora": [
            {"name": corpus.name, "digest": corpus.digest, "split": corpus.documents["split"][row].as_py(), "row": row}
            for corpus, rows in corpora.values()
            for row in rows
        ],
        "models": list(models.values()),
        "swarms": _swarms(root, set(how), unreadable),
        "unreadable": unreadable,
    }


def _corpora_with(identity: str, root: Path, unreadable: list[str]) -> dict[str, tuple[Corpus, list[int]]]:
    """Corpora of the root that have a document of this text, with its rows, by digest."""
    text_id = re.sub(r"-\d+$", "", identity)  # the second of equal texts is ID-2, where duplicates are kept
    found = {}
    for path in sorted((root / "corpora").glob("*/manifest.json")):
        if path.parent.name.endswith(artefacts.PARTIAL):
            continue
        try:
            corpus = Corpus.read(path.parent, verify=False)
            ids = corpus.documents["id"]
            rows = _rows(pc.or_(pc.equal(ids, text_id), pc.starts_with(ids, text_id + "-")))
        except ArtefactError as error:
            unreadable.append(str(error))
            continue
        if len(rows):
            found[corpus.digest] = corpus, rows.tolist()
    return found


def _checkpoints(root: Path, unreadable: list[str]) -> Iterator[Trained]:
    """Every whole checkpoint of the runs, and those that names under models/ point to elsewhere."""
    folders = {path.parent.resolve() for path in (root / "runs").glob("*/step-*/manifest.json")}
    try:
        named = {target for target in artefacts.names(root / "models").values() if (target / "manifest.json").is_file()}
    except ArtefactError as error:
        named = set()
        unreadable.append(str(error))
    for folder in sorted(folders | named):
        if folder.name.endswith(artefacts.PARTIAL):
            continue
        task = folder.parent / "task.json"
        try:
            about = json.loads(task.read_text(encoding="utf-8")) if task.is_file() else None
            yield Trained(folder, read_manifest(folder), about)
        except (ArtefactError, ValueError) as error:
            unreadable.append(str(error) if isinstance(error, ArtefactError) else f"{task}: {error}")


def _trained_on(
    trained: Trained, corpora: dict[str, tuple[Corpus, list[int]]], unreadable: list[str]
) -> dict[str, Any] | None:
    """How the checkpoint's own run met the document; None if it did not."""
    digest = trained.manifest.corpus_digest
    if digest not in corpora:
        return None
    corpus, rows = corpora[digest]
    rows = [row for row in rows if corpus.documents["split"][row].as_py() == "train"]
    if not rows:
        return None
    if trained.task is None:
        return {"how": "trained on its corpus; which of its documents is not recorded", "corpus": digest}
    wanted = trained.task["documents"]
    chosen = _rows(pc.equal(corpus.documents["split"], "train"))
    how = "all documents"
    if wanted is not None:
        found = _cluster(corpus, wanted)
        if found is None:
            unreadable.append(
                f"{trained.folder.parent}: trained on documents with digest {wanted}, a clustering that is gone"
            )
            return None
        how, documents = found
        rows = np.intersect1d(rows, documents).tolist()
        if not rows:
            return None
        chosen = np.intersect1d(chosen, documents)
    sizes = corpus.documents["num_tokens"].to_numpy()[chosen] + 1  # and <|endoftext|>
    # A folder that does not say how the run's corpus grew has one leg, of the checkpoint's corpus.
    legs = trained.task.get("legs") or [{"cursor": 0, "documents": corpus.documents.num_rows}]
    epochs = [int(sizes[chosen < leg["documents"]].sum()) for leg in legs]
    passes = _passes(trained.task, trained.manifest.step, legs, epochs, min(rows))
    return None if passes is None else {"how": how, "corpus": digest, "passes": round(passes, 3)}


def _passes(task: dict[str, Any], step: int, legs: list[dict[str, Any]], epochs: list[int], row: int) -> float | None:
    """How often a run has gone over this document after so many steps; None if it was to join only later.

    Counted in tokens, `epochs` of each leg, as if every source had weight 1. Where a corpus grew, what was left of the
    epoch and the new documents are gone over before the next epoch begins (ulm/corpus/order.py).
    """
    total = step * task["train"]["batch_tokens"]
    row_tokens = task["model"]["context_tokens"] if len(legs) > 1 else 0
    begins = [(leg["cursor"] - legs[0]["cursor"]) * row_tokens for leg in legs]
    joined = sum(leg["documents"] <= row for leg in legs)
    if joined == len(legs) or (joined and begins[joined] >= total):
        return None
    passes, share, left = 0, 0.0, 0  # whole epochs; the part of one that is taken, and the tokens that are not
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], total], strict=True)):
        size = max(1, epochs[number])
        left += size - (max(1, epochs[number - 1]) if number else 0)
        if number == joined:
            passes, share = 0, 0.0
        taken = max(0, min(end, total) - begin)
        if taken < left:
            share, left = share + (1 - share) * taken / left, left - taken
        else:
            more, beyond = divmod(taken - left, size)
            passes, share, left = passes + 1 + more, beyond / size, size - beyond
    return passes + share


def _cluster(corpus: Corpus, digest: str) -> tuple[str, Any] | None:
    """Name and documents of the cluster whose list of documents has this digest, as a run's task.json records it."""
    for path in sorted((corpus.folder / "domains").glob("*/manifest.json")):
        files = artefacts.read_manifest(path.parent, "clustering").get("files", {})
        for name, found in sorted(files.items()):
            if found == digest and re.fullmatch(r"documents-\d+\.npy", name):
                number = name.removeprefix("documents-").removesuffix(".npy")
                documents = np.load(path.parent / name, allow_pickle=False)
                return f"cluster {number} of {path.parent.name[:12]}", documents
    return None


def _swarms(root: Path, seen: set[str], unreadable: list[str]) -> list[dict[str, Any]]:
    """Swarms with members whose checkpoints are among those seen, with their names."""
    names: dict[Path, list[str]] = {}
    try:
        for name, target in artefacts.names(root / "swarms" / "names").items():
            names.setdefault(target, []).append(name)
    except ArtefactError as error:
        unreadable.append(str(error))
    found = []
    for path in sorted((root / "swarms").glob("*/swarm.json")):
        if path.parent.name.endswith(artefacts.PARTIAL):
            continue
        try:
            members = json.loads(path.read_text(encoding="utf-8"))["members"]
            mine = sorted(member for member, entry in members.items() if entry["digest"] in seen)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable.append(f"{path}: not a readable swarm: {error!r}")
            continue
        if mine:
            found.append({"swarm": path.parent.name, "names": names.get(path.parent.resolve(), []), "members": mine})
    return found


def _relative(path: Path, root: Path) -> str:
    resolved = root.resolve()
    return str(path.relative_to(resolved)) if path.is_relative_to(resolved) else str(path)
