"""Text for the figures of `corpus`: the documents of the training corpora, and more text grown from them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

BLOCK_CHARS = 4_000  # of a corpus that is one text: a document of whole lines
SENTENCE_END = re.compile(r"(?<=[.!?\n])\s+")
SWAPPED = 0.2  # share of words: two copies of a text then share about (1 - 0.2)^5 = a third of their 5-grams


def training_texts(corpora: Path, megabytes: float | None) -> dict[str, list[str]]:
    """The documents of each training corpus; with `megabytes` the first of each, so many MB in all."""
    folders = sorted(path for path in (corpora / "train").iterdir() if path.is_dir())
    bound = 1e6 * megabytes / len(folders) if megabytes is not None else float("inf")
    return {folder.name: list(_first(_documents(folder), bound)) for folder in folders}


def _documents(folder: Path) -> Iterator[str]:
    for split in ("train", "val", "test"):
        if (rows := folder / f"{split}.jsonl").is_file():
            with rows.open(encoding="utf-8") as file:
                yield from (json.loads(line)["text"] for line in file)
        elif (whole := folder / f"{split}.txt").is_file():
            block: list[str] = []
            for line in whole.read_text(encoding="utf-8").splitlines(keepends=True):
                block.append(line)
                if sum(map(len, block)) >= BLOCK_CHARS:
                    yield "".join(block)
                    block = []
            yield "".join(block)


def _first(texts: Iterable[str], num_bytes: float) -> Iterator[str]:
    for text in texts:
        if num_bytes <= 0:
            return
        num_bytes -= len(text.encode())
        yield text


def num_bytes(texts: Iterable[str]) -> int:
    """Bytes of the texts as UTF-8."""
    return sum(len(text.encode()) for text in texts)


def write_texts(folder: Path, name: str, texts: Sequence[str]) -> int:
    """Write one .jsonl file of documents; returns the bytes of their text."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": f"{name}-{number}", "text": text}, ensure_ascii=False) + "\n")
    return num_bytes(texts)


def grown(texts: Sequence[str], seed: int) -> list[str]:
    """Another text for each: its sentences in another order, some of its words in each other's place."""
    return [_other(text, seed, number) for number, text in enumerate(texts)]


def _other(text: str, seed: int, number: int) -> str:
    sentences = SENTENCE_END.split(text)
    random.Random(f"{seed} {number}").shuffle(sentences)
    words = np.array(" ".join(sentences).split(" "), dtype=object)
    chance = np.random.default_rng((seed, number))
    places = chance.choice(len(words), int(SWAPPED * len(words)), replace=False)
    words[places] = words[np.roll(places, 1)]
    return " ".join(words.tolist())
