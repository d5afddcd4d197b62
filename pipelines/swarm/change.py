"""A swarm with one expert more or one fewer; the other members stay as they are, to the byte.

A new expert begins with the swarm's seed and learns from a corpus of its own. The router gets its centroid: the mean
embedding of the new text, by the words that the router knew when it was fitted. Centroids say how much of a text is
the new expert's; the router's linear head, which was fitted without it, shares out the rest among the experts that it
knows. When one of those is dropped the head's other rows stay.

Shape letters: N documents, L lengths, M snippets, C experts, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.corpus.clustering import kmeans
from pipelines.corpus.clustering.assign import embed_texts, first_texts, located, project_texts
from pipelines.corpus.clustering.embedding import MAX_FIT_DOCUMENTS, in_training
from pipelines.corpus.clustering.passages import Passages, far_distances
from ulm import artefacts
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError, ConfigError, did_you_mean
from ulm.recipes.train import SwarmAddRecipe, TrainingRecipe, TrainRecipe
from ulm.swarm.manifest import SEED, Part, Swarm, write_swarm
from ulm.swarm.router import Head, Router

Run = Callable[[TrainRecipe], dict[str, Any]]  # trains what a recipe says; the last line of `ulm train`


def add(recipe: SwarmAddRecipe, *, root: Path, run: Run, near: Path | None = None) -> dict[str, Any]:
    """Train an expert from the swarm's seed on the recipe's corpus, and write the swarm anew with it.

    Returns {"swarm", "digest", "member", "domain", "checkpoint", "shares": {member: x}}; or the line of a training
    that was interrupted. A recipe whose expert is a member already answers at once.
    """
    swarm, name, router = _open(recipe.swarm, root, near)
    corpus = Corpus.open(recipe.corpus, root=root, near=near)
    if corpus.tokenizer.digest != swarm.manifest.tokenizer_digest:
        problem = f"{corpus.folder} has another tokenizer than the swarm {name}"
        raise ConfigError("corpus", problem, f"build it with tokenizer: {swarm.manifest.tokenizer_digest[:12]}")
    member = recipe.member or _next_id(swarm)
    known = swarm.members.get(member)
    if known is not None and read_manifest(swarm.checkpoint(member)).run != recipe.name:
        raise ConfigError(
            "member", f"the swarm {name} has a member {member}", f"another id, for example {_next_id(swarm)}"
        )
    line = run(_train_recipe(recipe, swarm))
    if "status" in line:
        return line
    checkpoint = Path(line["checkpoint"])
    digest = read_manifest(checkpoint).digest
    had = next((id for id, entry in swarm.members.items() if entry.digest == digest), None)
    if had is None:
        if known is not None:
            raise ConfigError("member", f"the swarm {name} has another expert {member}", "drop that one first")
        tokens = [*_tokens(swarm), corpus.num_tokens("train")]
        domain = _main_domain(corpus)
        members = {**_parts(swarm), member: Part(checkpoint, len(router.ids), domain)}
        swarm = _write(root, name, swarm, members, _with_one_more(router, member, corpus, tokens), tokens)
    return _told(swarm, had or member)


def drop(text: str, member: str, *, root: Path) -> dict[str, Any]:
    """Write the swarm of this name anew without one of its experts; the answer is as that of `add`."""
    swarm, name, router = _open(text, root, None)
    if member not in swarm.members:
        raise ConfigError("member", f"the swarm {name} has no member {member!r}", did_you_mean(member, swarm.members))
    if member not in router.ids:
        raise ConfigError("member", f"{member} is not an expert", "what experts begin with stays")
    if len(router.ids) == 1:
        raise ConfigError("member", f"{member} is the swarm's last expert", "a swarm has one at least")
    named = [key for key, value in swarm.manifest.strategy.items() if isinstance(value, list) and member in value]
    if named:
        raise ConfigError(
            "member", f"the swarm's strategy names {member} in {named[0]}", "write the swarm without that"
        )
    place, told = router.ids.index(member), _told(swarm, member)
    tokens = [count for index, count in enumerate(_tokens(swarm)) if index != place]
    parts = {key: part for key, part in _parts(swarm).items() if key != member}
    members = {
        key: part._replace(cluster=part.cluster - (part.cluster > place)) if part.cluster is not None else part
        for key, part in parts.items()
    }
    swarm = _write(root, name, swarm, members, _without(router, place, tokens), tokens)
    return _told(swarm, member) | {key: told[key] for key in ("domain", "checkpoint")}


def _open(text: str, root: Path, near: Path | None) -> tuple[Swarm, str, Router]:
    """The swarm, the name that will point to its next version, and its router."""
    swarm = Swarm.open(text, root=root, near=near, verify=False)
    names = artefacts.names(root / "swarms" / "names")
    found = [text] if text in names else [name for name, folder in names.items() if folder == swarm.folder.resolve()]
    if len(found) != 1:
        problem = f"{text!r} stands for {len(found)} names, and the new version needs one"
        raise ConfigError("swarm", problem, "give the swarm by its name")
    router = swarm.router()
    if router is None or SEED not in swarm.members:
        raise ConfigError("swarm", f"{found[0]} has no router or no member {SEED}", "a swarm of `ulm swarm train`")
    return swarm, found[0], router


def _train_recipe(recipe: SwarmAddRecipe, swarm: Swarm) -> TrainRecipe:
    """The expert's training: the swarm's seed as its beginning, the protocol's schedule."""
    given = (TrainingRecipe.model_fields.keys() & recipe.model_fields_set) - {"model"}
    schedule = {"kind": "wsd", "warmup_steps": recipe.warmup_steps, "decay_share": 1.0}
    fields = {field: getattr(recipe, field) for field in given}
    return TrainRecipe(**fields, init_from=str(swarm.checkpoint(SEED)), schedule=schedule)


def _next_id(swarm: Swarm) -> str:
    """The first of e00, e01, … that no member has."""
    return next(name for name in (f"e{n:02d}" for n in range(len(swarm.members) + 1)) if name not in swarm.members)


def _main_domain(corpus: Corpus) -> str:
    """The domain of most of a corpus's text."""
    sums = corpus.documents.group_by("domain").aggregate([("num_tokens", "sum")]).sort_by("domain").to_pylist()
    return str(max(sums, key=lambda row: row["num_tokens_sum"])["domain"])


def _tokens(swarm: Swarm) -> list[int]:
    """Training tokens of each expert's text, as the router's manifest has them."""
    folder = swarm.router_folder()
    assert folder is not None, "`_open` refuses a swarm without a router"
    try:
        rows = artefacts.read_manifest(folder, "clustering")["clusters"]
        return [int(row["tokens"]["train"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{folder / 'manifest.json'}: does not say how many tokens each cluster has") from None


def _parts(swarm: Swarm) -> dict[str, Part]:
    return {key: Part(swarm.path_of(entry), entry.cluster, entry.domain) for key, entry in swarm.members.items()}


def _with_one_more(router: Router, member: str, corpus: Corpus, tokens: Sequence[int]) -> Router:
    """The router with the centroid of a corpus's training text; see this file's beginning.

    `far` is raised where the new text's own passages lie farther out.
    """
    rows = np.flatnonzero(in_training(corpus))
    if len(rows) > MAX_FIT_DOCUMENTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, MAX_FIT_DOCUMENTS, replace=False))
    tokens_N = corpus.documents["num_tokens"].to_numpy()[rows]
    passages = Passages(tokens_N, seed=0)
    h_ND = embed_texts(router.embedder, passages.of(first_texts(corpus, located(corpus, rows))))
    known_N = h_ND.any(axis=1)
    if not known_N.any():
        problem = f"the swarm's router knows no word of {corpus.folder}"
        raise ConfigError("corpus", problem, "text in a language of the swarm's own; else train a swarm over both")
    nobody_CD = np.zeros((1, h_ND.shape[1]))
    own_CD = kmeans.means(h_ND[known_N], tokens_N[known_N], np.zeros(known_N.sum(), dtype=np.int64), nobody_CD)
    centroids_CD = np.concatenate([router.centroids_ND, own_CD]).astype(np.float32)
    far = router.far
    if far is not None:
        p_LMD = np.stack([project_texts(router.embedder, snippets) for snippets in passages.snippets])
        far = tuple(map(max, far, far_distances(p_LMD, centroids_CD.astype(np.float64))))
    ids = [*router.ids, member]
    return Router(ids, router.embedder, centroids_CD, _shares(tokens), router.temperature, far=far, head=router.head)


def _without(router: Router, place: int, tokens: Sequence[int]) -> Router:
    """The router without the expert of this place."""
    head = router.head
    if head is not None and place < len(head.bias_N):
        rows = np.arange(len(head.bias_N)) != place
        head = Head(head.matrix_ND[rows], head.bias_N[rows]) if rows.any() else None
    ids = [name for index, name in enumerate(router.ids) if index != place]
    centroids_CD = np.delete(router.centroids_ND, place, axis=0).astype(np.float32)
    shares_C = _shares(tokens)
    return Router(ids, router.embedder, centroids_CD, shares_C, router.temperature, far=router.far, head=head)


def _shares(tokens: Sequence[int]) -> Any:
    return np.array(tokens, dtype=np.float64) / sum(tokens)


def _write(
    root: Path, name: str, swarm: Swarm, members: dict[str, Part], router: Router, tokens: Sequence[int]
) -> Swarm:
    """The swarm's next version, its router kept in its own folder, its controls as they were."""
    manifest, controls = swarm.manifest, swarm.manifest.controls
    random = None
    if controls.random:
        entries = controls.random.members.items()
        parts = {key: Part(swarm.path_of(entry), entry.cluster, entry.domain) for key, entry in entries}
        random = (parts, (swarm.folder / controls.random.router.path).resolve())
    with TemporaryDirectory() as made:
        folder = Path(made)
        router.write(folder)
        clusters = [
            {"domain": members[id].domain, "tokens": {"train": n}} for id, n in zip(router.ids, tokens, strict=True)
        ]
        fields = {"format_version": artefacts.FORMAT_VERSION, "kind": "changed", "clusters": clusters}
        artefacts.write_json(folder / "manifest.json", {**fields, "files": artefacts.digest_files(folder)})
        return write_swarm(
            root,
            name,
            members=members,
            router=folder,
            keep_router=True,
            strategy=manifest.strategy,
            budget=manifest.budget,
            tokenizer_digest=manifest.tokenizer_digest,
            corpus_digest=manifest.corpus_digest,
            dense=swarm.path_of(controls.dense) if controls.dense else None,
            dense_flops=swarm.path_of(controls.dense_flops) if controls.dense_flops else None,
            random=random,
        )


def _told(swarm: Swarm, member: str) -> dict[str, Any]:
    """The last line of `ulm swarm add` and `drop`."""
    router, entry = swarm.router(), swarm.members.get(member)
    assert router is not None
    return {
        "swarm": str(swarm.folder),
        "digest": swarm.digest,
        "member": member,
        "domain": entry.domain if entry else None,
        "checkpoint": str(swarm.checkpoint(member)) if entry else None,
        "shares": dict(zip(router.ids, router.shares_N.tolist(), strict=True)),
    }
