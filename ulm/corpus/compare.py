"""What differs between two corpora: sources, documents, splits, domains, licences, vocabulary, stages, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ulm.corpus.manifest import SPLITS, Corpus

MAX_EXAMPLES = 20  # tokens, document ids
ABSENT = None  # of a setting that one side does not have


def diff(a: Corpus, b: Corpus) -> dict[str, Any]:
    """How corpus `b` differs from corpus `a`; where a figure has two values they are {"a", "b"}."""
    return {
        "a": {"name": a.name, "digest": a.digest},
        "b": {"name": b.name, "digest": b.digest},
        "same": a.digest == b.digest,
        "sources": _sources(a, b),
        "documents": _documents(a.documents, b.documents),
        "splits": _by("split", a, b, order=SPLITS),
        "domains": _by("domain", a, b),
        "licences": _by("licence", a, b),
        "tokenizer": _tokenizer(a, b),
        "stages": _stages(a, b),
        "settings": [
            {"setting": place, "a": before, "b": after}
            for part in ("clean", "split")
            for place, before, after in differences(
                a.manifest["content"].get(part), b.manifest["content"].get(part), part
            )
        ],
    }


def differences(a: Any, b: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, value in a, value in b) of every leaf in which two trees of dicts differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys(), key=str):
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{place}.{key}")
    elif a != b:
        yield place, a, b


def _sources(a: Corpus, b: Corpus) -> dict[str, list[str]]:
    """Names of sources by what became of them. Content and settings are compared, paths are not.

    A corpus that extends another states the content only of what it added; the others are compared by their documents.
    """
    of_a, of_b = _stated(a), _stated(b)
    changed, settings = [], []
    for name in (name for name in of_a if name in of_b):
        before, after = of_a[name], of_b[name]
        if before is None or after is None:
            changed += [name] if _ids(a, name) != _ids(b, name) else []
        elif before.get("content") != after.get("content"):
            changed.append(name)
        elif before != after:
            settings.append(name)
    return {
        "added": [name for name in of_b if name not in of_a],
        "removed": [name for name in of_a if name not in of_b],
        "changed": changed,
        "same_content_other_settings": settings,
    }


def _stated(corpus: Corpus) -> dict[str, dict[str, Any] | None]:
    """Each source's content digest and settings; None for those of the corpus that this one extends."""
    names, stated = [source["name"] for source in corpus.manifest["sources"]], corpus.manifest["content"]["sources"]
    return dict(zip(names, [*[None] * (len(names) - len(stated)), *stated], strict=True))


def _ids(corpus: Corpus, source: str) -> Counter[str]:
    return Counter(corpus.documents.filter(pc.equal(corpus.documents["source"], source))["id"].to_pylist())


def _documents(a: pa.Table, b: pa.Table) -> dict[str, Any]:
    """Documents by id, and those that changed their split. An id that stands twice is two documents."""
    ids_a, ids_b = _each_its_own(a["id"].combine_chunks()), _each_its_own(b["id"].combine_chunks())
    place = pc.index_in(ids_b, value_set=ids_a)  # of b's documents in a, null where a has none
    common = pc.is_valid(place)
    of_a, of_b = a["split"].take(place.drop_null()), b["split"].filter(common)
    differ = pc.not_equal(of_a, of_b)
    ways: dict[str, int] = {}
    for before, after in zip(of_a.filter(differ).to_pylist(), of_b.filter(differ).to_pylist(), strict=True):
        ways[f"{before} to {after}"] = ways.get(f"{before} to {after}", 0) + 1
    added = b["id"].filter(pc.invert(common))
    removed = a["id"].filter(pc.invert(pc.is_in(ids_a, value_set=ids_b)))
    return {
        "a": len(ids_a),
        "b": len(ids_b),
        "common": len(ids_b) - len(added),
        "added": len(added),
        "removed": len(removed),
        "added_examples": added[:MAX_EXAMPLES].to_pylist(),
        "removed_examples": removed[:MAX_EXAMPLES].to_pylist(),
        "moved": dict(sorted(ways.items())),
    }


def _each_its_own(ids: pa.Array) -> pa.Array:
    """The ids, with a number after those that stood before."""
    if len(ids.unique()) == len(ids):
        return ids
    seen = Counter[str]()
    found = []
    for identity in ids.to_pylist():
        seen[identity] += 1
        found.append(identity if seen[identity] == 1 else f"{identity}\n{seen[identity]}")  # no id has a line end
    return pa.array(found, pa.string())


def _by(column: str, a: Corpus, b: Corpus, order: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Documents, tokens, bytes and share of tokens of each value of a column, in both."""
    sums = [_sums(corpus.documents, column) for corpus in (a, b)]
    names = sorted(sums[0].keys() | sums[1].keys(), key=lambda name: (order.index(name) if name in order else 0, name))
    none = {"documents": 0, "tokens": 0, "bytes": 0, "share": 0.0}
    return {name: {"a": sums[0].get(name, none), "b": sums[1].get(name, none)} for name in names}


def _sums(documents: pa.Table, column: str) -> dict[str, dict[str, Any]]:
    total = max(1, int(np.sum(documents["num_tokens"].to_numpy())))
    found = documents.group_by(column, use_threads=False).aggregate(
        [("num_tokens", "count"), ("num_tokens", "sum"), ("num_bytes", "sum")]
    )
    return {
        row[column]: {
            "documents": row["num_tokens_count"],
            "tokens": row["num_tokens_sum"],
            "bytes": row["num_bytes_sum"],
            "share": row["num_tokens_sum"] / total,
        }
        for row in found.to_pylist()
    }


def _tokenizer(a: Corpus, b: Corpus) -> dict[str, Any]:
    """Whether both use one tokenizer; if not, the tokens (as text) that each has alone, examples in order of id."""
    of_a, of_b = (corpus.tokenizer.inner.get_vocab(with_added_tokens=True) for corpus in (a, b))

    def alone(mine: dict[str, int], other: dict[str, int], corpus: Corpus) -> tuple[int, list[str]]:
        ids = sorted(index for token, index in mine.items() if token not in other)
        return len(ids), [corpus.tokenizer.decode([index]) for index in ids[:MAX_EXAMPLES]]

    (removed, removed_examples), (added, added_examples) = alone(of_a, of_b, a), alone(of_b, of_a, b)
    return {
        "same": a.tokenizer.digest == b.tokenizer.digest,
        "vocab_size": {"a": len(of_a), "b": len(of_b)},
        "common": len(of_a.keys() & of_b.keys()),
        "added": added,
        "removed": removed,
        "added_examples": added_examples,
        "removed_examples": removed_examples,
    }


def _stages(a: Corpus, b: Corpus) -> list[dict[str, Any]]:
    """Documents in and out, and dropped by reason, of each stage that either has, in the order of b."""
    of_a, of_b = ({s["stage"]: s for s in corpus.manifest.get("stages", [])} for corpus in (a, b))

    def counts(stage: dict[str, Any] | None) -> dict[str, Any] | None:
        return stage and {key: stage[key] for key in ("in", "out", "dropped")}

    return [
        {"stage": name, "a": counts(of_a.get(name)), "b": counts(of_b.get(name))}
        for name in dict.fromkeys([*of_b, *of_a])
    ]
