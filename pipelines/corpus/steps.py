"""The steps of a build; what they do per part goes through `over` (over.py)."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ulm
from pipelines.corpus import work
from pipelines.corpus.base import base_of, fingerprint
from pipelines.corpus.judge import Base, Judgement
from pipelines.corpus.near import NUM_HASHES, band_pairs, bands
from pipelines.corpus.over import Item, Over, Progress, Task, silent
from pipelines.corpus.part import clean_part, is_done, read_signatures, read_texts
from pipelines.corpus.reading.unit import Unit
from pipelines.corpus.sources import Listing, list_sources, share_out
from pipelines.corpus.stages import language, personal_data
from pipelines.corpus.stages.decontamination import NgramIndex
from pipelines.corpus.tokens import find_tokenizer, make_tokenizer, stored_tokenizer, tokenize_part
from ulm import artefacts
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, CorpusError, UlmError
from ulm.recipes.corpus import CorpusRecipe, ExtendRecipe, Source, TokenizerRecipe, TokenizerSection
from ulm.tokenizers.chat import CHAT_TEMPLATE
from ulm.tokenizers.tokenizer import Tokenizer, check_section

ALGORITHM = 3  # part of an unfinished build's identity: raise it when the same units would give other parts


class Build:
    """One build on its way: what is known so far, and the steps that add to it."""

    def __init__(
        self,
        recipe: CorpusRecipe | ExtendRecipe | TokenizerRecipe,
        *,
        root: Path,
        near: Path | None,
        over: Over,
        progress: Progress | None,
    ) -> None:
        self.recipe, self.root, self.near, self.over = recipe, root, near, over
        self.progress: Progress = progress or silent
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.base: Corpus | None = None
        self.tokenizer: Tokenizer | None = None
        if isinstance(recipe, ExtendRecipe):
            self.base = Corpus.open(recipe.extends, root=root, near=near, place="extends")
            self.tokenizer = self.base.tokenizer
        elif isinstance(recipe.tokenizer, str):
            self.tokenizer = find_tokenizer(recipe.tokenizer, root=root, near=near)  # before the work, not after it
        if recipe.clean is None or recipe.split is None:
            assert self.base is not None
            clean, split = self.base.settings()
            self.clean, self.split = recipe.clean or clean, recipe.split or split
        else:
            self.clean, self.split = recipe.clean, recipe.split
        self._check_settings()
        self.ngrams: NgramIndex | None = None
        if self.clean.decontamination is not None:
            with self.timed("evaluation sets"):
                place = "clean.decontamination"
                self.ngrams = NgramIndex.build(
                    self.clean.decontamination, near=near, root=root, place=place, clean=self.clean
                )
            theirs = self.base.manifest["content"].get("clean", {}).get("decontamination") if self.base else None
            if recipe.clean is None and theirs and theirs.get("ngrams") != self.ngrams.digest:
                problem = "its evaluation sets are not what they were when it was built"
                raise ConfigError("extends", problem, "put them back, or state clean in this recipe")
        with self.timed("list"):
            max_bytes = self.clean.max_document_bytes
            self.listing: Listing = list_sources(recipe.sources, near=near, root=root, max_bytes=max_bytes)
            if self.base:
                taken = {source["name"] for source in self.base.manifest["sources"]}
                self.listing = replace(self.listing, names=_unlike(self.listing.names, taken, recipe.sources))

    def _check_settings(self) -> None:
        """What only the libraries of stages and tokenizers know to be wrong is said before the work."""
        if self.clean.language is not None:
            language.check(self.clean.language)
        if self.clean.personal_data is not None:
            personal_data.check(self.clean.personal_data)
        section = getattr(self.recipe, "tokenizer", None)
        if isinstance(section, TokenizerSection):
            check_section(section.special_tokens, section.chat_template or CHAT_TEMPLATE)

    @contextmanager
    def timed(self, stage: str, done: int = 0, total: int | None = None) -> Iterator[None]:
        """The time of a stage, and its bar from beginning to end."""
        start, cpu = time.monotonic(), time.process_time()
        self.progress(stage, done, total, "")
        yield
        self.seconds[stage] = time.monotonic() - start
        self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + time.process_time() - cpu
        self.progress(stage, total or 1, total or 1, "")

    @property
    def chat_template(self) -> str:
        """How transcripts become text."""
        if self.tokenizer is not None:
            return self.tokenizer.chat_template
        section = getattr(self.recipe, "tokenizer", None)
        return getattr(section, "chat_template", None) or CHAT_TEMPLATE

    def identity(self) -> dict[str, Any]:
        """What decides the parts: another value of any of these begins anew."""
        return {
            "algorithm": ALGORITHM,
            "version": ulm.__version__,
            "name": self.recipe.name,
            "sources": [source.model_dump() for source in self.recipe.sources],
            "units": artefacts.digest_bytes(json.dumps([vars(unit) for unit in self.listing.units]).encode()),
            "clean": self.clean.model_dump(),
            "evaluation_ngrams": self.ngrams.digest if self.ngrams else None,
            "chat_template": self.chat_template,
            "base": self.base.digest if self.base else None,
        }

    def read_and_clean(self, folder: Path) -> None:
        """Make the parts that are not there yet."""
        self.work = folder
        index = None
        if self.ngrams is not None:
            index = folder / "evaluation_ngrams"
            self.ngrams.save(index)
        groups = share_out(self.listing.units)
        self.parts = [work.numbered(folder / "parts", number) for number in range(len(groups))]
        units, sources, clean, template = self.listing.units, self.recipe.sources, self.clean, self.chat_template

        def read_and_clean(item: Item) -> Item:
            numbered_units = [(number, Unit(**unit)) for number, unit in json.loads(item["units"])]
            place = Path(item["place"])
            account = clean_part(place, numbered_units, sources, clean, chat_template=template, index=index)
            return {"number": item["number"], "documents": account["documents"], "bytes": item["bytes"]}

        sizes = [sum(units[number].size for number in group) for group in groups]
        items: list[Item] = [
            {
                "number": number,
                "place": str(place),
                "units": json.dumps([(n, vars(units[n])) for n in group]),
                "bytes": size,
            }
            for number, (place, group, size) in enumerate(zip(self.parts, groups, sizes, strict=True))
            if not is_done(place)
        ]
        for item in items:
            work.finished(Path(item["place"]))  # one that must be read again
        done, total = sum(sizes) - sum(item["bytes"] for item in items), sum(sizes)
        with self.timed("read and clean", done, total):
            rate = _Rate("documents")
            for result in self.over(_said(read_and_clean), items):
                done += _checked(result)["bytes"]
                self.progress("read and clean", done, total, rate(result["documents"]))

    def judge(self) -> None:
        """Decide what becomes of each document."""
        with self.timed("judge"):
            accounts = [json.loads((p / "account.json").read_text(encoding="utf-8")) for p in self.parts]
            known = Base.none() if self.base is None else self._base()
            self.judged = Judgement(self.parts, accounts, self.listing.units, self.listing.names, known)
            self._documents_before = np.cumsum([0, *(account["documents"] for account in accounts)])
            if gone := self.judged.unreadable_sources():
                raise CorpusError(f"source {', '.join(gone)}: none of its files can be read any more")
            for account in accounts:
                for stage, tally in account["stages"].items():
                    self._count(stage, tally["cpu_seconds"])
            self.judged.exclude(self.recipe.exclude, self.inherited_exclude())
            if self.clean.duplicate_exact:
                self.judged.drop_exact_duplicates()
        if self.clean.duplicate_near is not None:
            with self.timed("near duplicates"):
                self.judged.drop_near_duplicates(self._near_pairs(), self.clean.duplicate_near)
        self.judged.assign_splits(self.split)
        if not self.judged.num_kept:
            work.finished(self.work)
            raise CorpusError(nothing_left(self.listing, self.judged))

    def inherited_exclude(self) -> list[str]:
        """What the corpus that is extended excludes; a document of its own can only be excluded by building it anew."""
        if self.base is None:
            return []
        theirs = self.base.documents["id"].to_pylist()
        for number, given in enumerate(self.recipe.exclude):
            if any(identity.startswith(given) for identity in theirs):
                remedy = "build that corpus without it"
                raise ConfigError(f"exclude.{number}", f"{given} is in the corpus that is extended", remedy)
        return list(self.base.manifest["content"].get("exclude", []))

    def _base(self) -> Base:
        """Fingerprints of the corpus that is extended: its shards hold its text."""
        assert self.base is not None
        corpus, config = self.base, self.clean.duplicate_near
        place = self.work / "base"
        ranges = base_of(corpus)

        def fingerprint_base(item: Item) -> Item:
            fingerprint(Path(item["place"]), str(corpus.folder), item["first"], item["end"], config)
            return {}

        items: list[Item] = [
            {"place": str(work.numbered(place, n)), "first": first, "end": end} for n, (first, end) in enumerate(ranges)
        ]
        for result in self.over(_said(fingerprint_base), [i for i in items if not Path(i["place"]).is_dir()]):
            _checked(result)
        self._base_parts = [Path(item["place"]) for item in items]
        return Base.read(self._base_parts, corpus)

    def _near_pairs(self) -> NDArray[np.int64]:
        """Pairs of near duplicates among what is alive, the base's documents before all others."""
        config, alive, folder = self.clean.duplicate_near, self.judged.alive, self.work / "near"
        assert config is not None
        num_base = len(self.judged.base.keys)
        total = num_base + int(alive.sum())
        if total < 2:
            return np.zeros((0, 2), np.int64)
        chosen = artefacts.digest_bytes(alive.tobytes())[:16]
        merged = folder / f"{chosen}.npy"
        folder.mkdir(exist_ok=True)
        all_signatures: NDArray[np.uint32] = work.new_array(merged, np.uint32, (total, NUM_HASHES))
        at = 0
        for place in self._base_parts if self.base else []:
            found = read_signatures(place)
            all_signatures[at : at + len(found)] = found
            at += len(found)
        for number, place in enumerate(self.parts):
            mine = alive[self._documents_before[number] : self._documents_before[number + 1]]
            found = read_signatures(place)[mine]
            all_signatures[at : at + len(found)] = found
            at += len(found)
        del all_signatures  # flushed

        def find_near_duplicates(item: Item) -> Item:
            start = time.process_time()
            found = band_pairs(np.load(merged, mmap_mode="r"), item["band"], config)
            work.write_array(Path(item["place"]), found)
            return {"pairs": len(found), "cpu_seconds": time.process_time() - start}

        num_bands = bands(config)[0]
        items: list[Item] = [{"band": b, "place": str(folder / f"{chosen}-{b:03d}.npy")} for b in range(num_bands)]
        todo = [item for item in items if not Path(item["place"]).is_file()]
        for done, result in enumerate(self.over(_said(find_near_duplicates), todo), num_bands - len(todo) + 1):
            self._count("near duplicates", _checked(result)["cpu_seconds"])
            self.progress("near duplicates", done, num_bands, "")
        return np.unique(np.concatenate([np.load(item["place"]) for item in items]), axis=0)

    def find_tokenizer(self) -> Tokenizer:
        """The tokenizer that the recipe names, or the one it describes, trained now or before the build was killed."""
        if self.tokenizer is not None:
            return self.tokenizer
        section = getattr(self.recipe, "tokenizer", None)
        assert isinstance(section, TokenizerSection)  # an extended corpus has one that is made
        alive = artefacts.digest_bytes(self.judged.split.tobytes())
        place = self.work / "tokenizers" / artefacts.digest_json({**section.model_dump(), "documents": alive})
        with self.timed("tokenizer"):
            if not place.is_dir():
                text_bytes = int(self.judged.num_bytes[self.judged.split == 0].sum())
                sample = self._texts(self.judged.choose_sample(section.sample_bytes)) if section.kind == "bpe" else ()
                alphabet = self._alphabet() if section.kind == "char" else ()
                made = make_tokenizer(section, text_bytes, sample, alphabet)
                with artefacts.new_folder(place) as folder:
                    made.write(folder)
            self.tokenizer = Tokenizer.read(place)
        return self.tokenizer

    def _texts(self, documents: NDArray[np.int64]) -> Iterator[str]:
        """Texts of these documents, in corpus order."""
        chosen = np.zeros(len(self.judged.alive), np.bool_)
        chosen[documents] = True
        for number, part in enumerate(self.parts):
            mine = chosen[self._documents_before[number] : self._documents_before[number + 1]]
            if mine.any():
                yield from (found.text for found, ok in zip(read_texts(part), mine, strict=True) if ok)

    def _alphabet(self) -> set[str]:
        """The characters of all documents that are left."""
        place, before = self._write_alive(), self._documents_before

        def collect_characters(item: Item) -> Item:
            mine = np.load(place, mmap_mode="r")[item["first"] : item["end"]]
            texts = (found.text for found, ok in zip(read_texts(Path(item["part"])), mine, strict=True) if ok)
            return {"characters": "".join(sorted(set().union(*texts)))}

        items: list[Item] = [
            {"part": str(part), "first": int(before[n]), "end": int(before[n + 1])} for n, part in enumerate(self.parts)
        ]
        return set().union(*(_checked(r)["characters"] for r in self.over(_said(collect_characters), items)))

    def _write_alive(self) -> Path:
        place = self.work / f"alive-{artefacts.digest_bytes(self.judged.alive.tobytes())[:16]}.npy"
        if not place.is_file():
            work.write_array(place, self.judged.alive)
        return place

    def tokenize(self, tokenizer: Tokenizer) -> list[Path]:
        """The tokens of each part's documents that are left."""
        alive, before = self._write_alive(), self._documents_before
        folder = self.work / "tokens" / f"{tokenizer.digest[:16]}-{alive.stem}"
        stored = str(tokenizer.save(self.root))
        places = [work.numbered(folder, number) for number in range(len(self.parts))]

        def tokenize_documents(item: Item) -> Item:
            mine = np.load(alive, mmap_mode="r")[item["first"] : item["end"]]
            texts = (found for found, ok in zip(read_texts(Path(item["part"])), mine, strict=True) if ok)
            return tokenize_part(Path(item["place"]), texts, stored_tokenizer(stored))

        items: list[Item] = [
            {"place": str(place), "part": str(part), "first": int(before[n]), "end": int(before[n + 1])}
            for n, (part, place) in enumerate(zip(self.parts, places, strict=True))
            if not place.is_dir()
        ]
        total = self.judged.num_kept
        done = total - sum(int(self.judged.alive[item["first"] : item["end"]].sum()) for item in items)
        with self.timed("tokenize", done, total):
            rate = _Rate("documents")
            for result in self.over(_said(tokenize_documents), items):
                done += _checked(result)["documents"]
                self._count("tokenize", result["cpu_seconds"])
                self.progress("tokenize", done, total, rate(result["documents"]))
        return places

    def _count(self, stage: str, cpu_seconds: float) -> None:
        """Add what a worker spent; where the worker is this process, `timed` must not count it again."""
        self.cpu_seconds[f"{stage} (workers)"] = self.cpu_seconds.get(f"{stage} (workers)", 0.0) + cpu_seconds


def _unlike(names: list[str], taken: set[str], sources: Sequence[Source]) -> list[str]:
    """The names of new sources, none of them one that a source of the extended corpus has."""
    found: list[str] = []
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source.name in taken:
            raise ConfigError(f"sources.{number}.name", f"{name!r} is a source of the corpus already", "another name")
        free = (f"{name}-{count}" if count > 1 else name for count in itertools.count(1))
        found.append(next(n for n in free if n not in taken and n not in found))
    return found


def nothing_left(listing: Listing, judged: Judgement) -> str:
    """Why no document is left: each reason with its count, and the first few by name."""
    reasons = [f"{reason} {count}" for reason, count in judged.dropped().items()]
    if listing.ignored:
        reasons.append(f"not read {len(listing.ignored)}")
    examples = [f"{row['path']} ({row['reason']})" for row in judged.listed()[:3]]
    examples += [f"{file.path} ({file.reason})" for file in listing.ignored[: 3 - len(examples)]]
    return "no document is left of the sources: " + ", ".join([*reasons, *examples] or ["they hold no files"])


def fault(error: OSError, root: Path | str = "") -> str:
    """What is said of a disk that is full, or a folder that cannot be written to."""
    place = error.filename or root
    return f"{place}: {error.strerror or error}; what is done stays: the same command goes on once that is mended"


def _said(task: Task) -> Task:
    """The task, its faults as a value: an error that crosses a cluster arrives wrapped in the cluster's own."""

    @wraps(task)
    def run(item: Item) -> Item:
        try:
            return task(item)
        except OSError as error:
            return {"error": fault(error, item.get("place", ""))}
        except UlmError as error:
            return {"error": str(error)}

    return run


def _checked(result: Item) -> Item:
    if "error" in result:
        raise CorpusError(result["error"])
    return result


class _Rate:
    """How many there were, and how many a second."""

    def __init__(self, what: str) -> None:
        self.what, self.count, self.start = what, 0, time.monotonic()

    def __call__(self, more: int) -> str:
        self.count += more
        return f"{self.count:,} {self.what}, {self.count / max(1e-3, time.monotonic() - self.start):,.0f}/s"
