"""The rules of Gopher, C4 and FineWeb: what each drops or takes out, and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.stages.c4 import c4_quality
from pipelines.corpus.stages.fineweb import fineweb_quality
from pipelines.corpus.stages.gopher import gopher_quality, gopher_repetition
from ulm import runtime
from ulm.recipes.corpus import C4Quality, FineWebQuality, GopherQuality, GopherRepetition

CORPORA = runtime.variable("ULM_CORPORA")
STAGES: dict[str, tuple[Callable[..., Any], type]] = {
    "gopher_quality": (gopher_quality, GopherQuality),
    "gopher_repetition": (gopher_repetition, GopherRepetition),
    "c4_quality": (c4_quality, C4Quality),
    "fineweb_quality": (fineweb_quality, FineWebQuality),
}
PROSE = (
    "The miller had three sons, and to the eldest of them he left the mill that stood by the river.\n"
    "To the second he gave a donkey with a good saddle. The youngest was to have nothing but the cat!\n\n"
    "“What shall I do with a cat?” he said to himself, sitting on the stone wall behind the empty barn.\n"
    "The cat looked up from the grass. It asked for a pair of boots, which he thought strange enough.\n"
    "Yet he had some coins left, so they walked into town that evening and went to see the cobbler.\n"
)


def reason(stage: str, text: str, **config: Any) -> str | None:
    function, section = STAGES[stage]
    [(after, why)] = function([text], section(**config))
    assert after == text or (stage == "c4_quality" and why is None)
    return None if why is None else why.removeprefix(f"{stage}: ")


def words(number: int, word: str = "word") -> str:
    return "the of " + " ".join([word] * (number - 2))


@pytest.mark.parametrize("stage", STAGES)
def test_plain_prose_is_kept(stage: str) -> None:
    assert reason(stage, PROSE) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (words(49), "too_few_words"),
        (words(50), None),
        (words(100_000), None),
        (words(100_001), "too_many_words"),
        ("to be " * 30, "mean_word_length"),
        (words(60, "elevenchars"), "mean_word_length"),
        (words(60) + " #" * 6, None),
        (words(60) + " #" * 7, "too_many_hashes"),
        (words(60) + "…" * 3 + "..." * 3 + "!", None),
        (words(60) + "…" * 3 + "..." * 4 + "!", "too_many_ellipses"),
        (words(50) + "\n • one\n\n - two" * 5, "too_many_bullet_lines"),
        (words(50) + "\n • one\n\n two" * 5, None),
        (
            words(30) + "\n" + "one two three four five six seven eight nine ten eleven…\n" * 3,
            "too_many_ellipsis_lines",
        ),
        (words(80) + " 1234" * 20, None),
        (words(80) + " 1234" * 21, "too_few_alphabetic_words"),
        ("the " + "word " * 60 + "the", "too_few_stop_words"),
        ("the " + "word " * 60 + "of", None),
    ],
)
def test_gopher_quality_drops_what_the_paper_lists(text: str, why: str | None) -> None:
    assert reason("gopher_quality", text) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("one\n\ntwo\n\nthree\n\none", None),
        ("one\n\ntwo\n\none\n\n\none", "duplicate_paragraphs"),
        ("a longer paragraph of text\n\nb\n\nc\n\na longer paragraph of text", "duplicate_paragraph_chars"),
        ("one\ntwo\nthree\none\n \n \n", None),
        ("one\ntwo\none\n\none", "duplicate_lines"),
        ("a longer line of the text\nb\nc\nd\ne\na longer line of the text", "duplicate_line_chars"),
        ("tell me tell me tell me more of all this", "top_2gram"),  # 3 * 7 of 40 characters
        ("a word of it stands once", None),  # the paper's top n-gram would be any of them
    ],
)
def test_gopher_repetition_drops_what_the_paper_lists(text: str, why: str | None) -> None:
    assert reason("gopher_repetition", text) == why


def test_a_duplicate_ngram_counts_from_its_second_time_and_each_of_its_words_once() -> None:
    seven = "one two three four five six seven"  # two 6-grams that overlap: 27 letters, not 2 * 22 or so
    text = f"{seven} and {seven}"  # of 71 characters
    for share, why in ((26.9 / 71, "duplicate_6grams"), (27.1 / 71, None)):
        assert reason("gopher_repetition", text, max_duplicate_ngram_chars={6: share}, max_top_ngram_chars={}) == why


def slow_repetition(text: str, n: int, kind: str) -> int:
    """Characters in repeated n-grams of words, with strings and sets."""
    words = text.split()
    ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if kind == "top":
        top, times = Counter(ngrams).most_common(1)[0] if ngrams else ("", 0)
        return len(top) * times if times > 1 else 0
    within = {i + k for i, ngram in enumerate(ngrams) if ngram in ngrams[:i] for k in range(n)}
    return sum(len(words[i]) for i in within)


@given(
    st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=30).map(" ".join), max_size=6),
    st.integers(1, 5),
    st.sampled_from(["top", "duplicate"]),
    st.floats(0, 1),
)
def test_repeated_ngrams_are_those_of_the_slow_way_whatever_else_is_in_the_batch(
    texts: list[str], n: int, kind: str, share: float
) -> None:
    bounds: dict[str, Any] = {"max_top_ngram_chars": {}, "max_duplicate_ngram_chars": {}}
    bounds[f"max_{kind}_ngram_chars"] = {n: share}
    lines = dict.fromkeys(("max_duplicate_lines", "max_duplicate_paragraphs"), 1.0)
    verdicts = gopher_repetition(texts, GopherRepetition(**bounds, **lines))
    why = f"gopher_repetition: {kind}_{n}gram" + ("s" if kind == "duplicate" else "")
    expected = [(text, why if slow_repetition(text, n, kind) > share * len(text) else None) for text in texts]
    assert verdicts == expected


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("  This line stays, but for its spaces.  ", "This line stays, but for its spaces."),
        ("“So does this one!”", "“So does this one!”"),
        ("A heading without an end", None),
        ("And so it goes on...", None),
        ("Two words.", None),
        ("Please turn JavaScript on to see this.", None),
        ("Read our Privacy Policy before you go.", None),
        (f"One {'w' * 1001} too long.", None),
        ("The moon is round[12][citation needed].[3]", "The moon is round."),
        ("It is round. [edit]", "It is round."),
    ],
)
def test_c4_takes_out_lines_that_are_not_prose(line: str, stays: str | None) -> None:
    kept = ["First of all, a sentence.", "Then there is another one.", "And a third to follow it."]
    more = "Now the fourth comes. Is there a fifth? There is a sixth!"
    [(text, why)] = c4_quality(["\n".join([*kept, line, "", more])], C4Quality())
    assert (text.split("\n"), why) == ([*kept, *([stays] if stays else []), more], None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("One two three. " * 4, "too_few_sentences"),
        ("One two three. " * 5, None),
        ("One two three.\n" * 4 + "No end here\n", "too_few_sentences"),
        ("One two “three.” (One two three.) One two three!\n" * 2, None),
        ("One two three.\n" * 5 + "Lorem Ipsum", "lorem_ipsum"),
        ("One two three.\n" * 5 + "if (x) {", "curly_bracket"),
    ],
)
def test_c4_drops_documents_that_are_not_prose(text: str, why: str | None) -> None:
    assert reason("c4_quality", text) == why


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("citations", "It is round [1]."),
        ("terminal_punctuation", "A heading without an end"),
        ("javascript", "It needs JavaScript here."),
        ("policy", "It uses cookies here."),
        ("lorem_ipsum", "It says lorem ipsum."),
        ("curly_bracket", "It is {this} one."),
    ],
)
def test_each_rule_of_c4_can_be_left_out(rule: str, text: str) -> None:
    off = {"citations": False, "terminal_punctuation": False, "javascript": False, "policy": False,
           "lorem_ipsum": False, "curly_bracket": False, "min_sentences": 0}  # fmt: skip
    assert c4_quality([text], C4Quality(**off)) == [(text, None)]
    assert c4_quality([text], C4Quality(**{**off, rule: True})) != [(text, None)]
    assert c4_quality(["\n"], C4Quality(**off)) == [("\n", "c4_quality: no_line_left")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Some line that ends in no mark whatever", "too_few_punctuated_lines"),
        ("Some line that ends in no mark whatever\n" + "This one ends, and is not short either.", None),
        ("Short.\n" * 7 + "This one is a line of more than thirty characters.\n" * 3, "too_many_short_lines"),
        ("A line that stands in here twice over.\n" * 2 + PROSE, None),
        ("A line that stands in here twice over.\n" * 3 + PROSE, "duplicate_line_chars"),
        ("\n\n\n\n\n".join(f"It has {n} words and a lot of room around." for n in range(9)), "too_many_newlines"),
    ],
)  # fmt: skip
def test_fineweb_drops_lists_menus_and_repeated_lines(text: str, why: str | None) -> None:
    assert reason("fineweb_quality", text) == why


HARD = {
    "one letter": "a" * 1_000_000,
    "one word": "a " * 500_000,
    "short lines": "".join(f"{n}\n" for n in range(100_000)),
    "one line": PROSE.replace("\n", " ") * 4_000,
    "brackets": "[" * 1_000_000,
    "marks": "." * 1_000_000,
    "newlines": "\n" * 1_000_000,
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_text_takes_more_than_linear_time(stage: str) -> None:
    function, section = STAGES[stage]
    for name, text in HARD.items():
        start = time.process_time()
        function([text], section())
        assert time.process_time() - start < 5, name  # about 1 s at most here; a quadratic way takes minutes


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_has_a_verdict_for_each_text_in_order(stage: str) -> None:
    function, section = STAGES[stage]
    texts = ["", PROSE, "a b " * 99, "\n", PROSE + PROSE, "", PROSE.upper()]
    assert function(texts, section()) == [function([text], section())[0] for text in texts]
    assert function([], section()) == []


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
def test_files_of_bad_quality_are_dropped_for_what_is_wrong_with_them() -> None:
    folder = Path(CORPORA or "") / "dirty" / "quality"
    texts = {path.stem: path.read_text() for path in folder.iterdir()}
    assert {name: reason("gopher_quality", text) for name, text in texts.items()} == {
        "gibberish": "too_few_stop_words", "repeated_paragraph": None, "numbers_table": "too_few_alphabetic_words",
        "base64_blob": "mean_word_length", "keyword_spam": "too_few_stop_words",
    }  # fmt: skip
    repeated = {name: why for name, text in texts.items() if (why := reason("gopher_repetition", text))}
    assert repeated == {"repeated_paragraph": "duplicate_paragraphs", "keyword_spam": "top_2gram"}
