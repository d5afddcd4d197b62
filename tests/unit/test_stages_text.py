"""What the stages make of texts: characters, mojibake, HTML, languages, personal data."""

from __future__ import annotations

import json
import random
import re
import time
import unicodedata
from pathlib import Path

import ftfy
import pytest
from ftfy.badness import is_bad
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.corpus.stages import personal_data
from pipelines.corpus.stages.characters import JOINER, MAX_MARKS, unify
from pipelines.corpus.stages.encoding import _SUSPECT, repair
from pipelines.corpus.stages.html import MAX_ATTRIBUTES, MAX_UNCLOSED, html_to_text
from pipelines.corpus.stages.language import MAX_CHARS, keep_languages, known_languages
from pipelines.corpus.stages.language import check as check_languages
from pipelines.corpus.stages.personal_data import check as check_region
from pipelines.corpus.stages.personal_data import redact
from ulm import runtime
from ulm.errors import ConfigError
from ulm.recipes.corpus import Clean, Language, PersonalData

CORPORA = runtime.variable("ULM_CORPORA")
needs_corpora = pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA names no folder of corpora")


def val_texts(domain: str) -> list[str]:
    lines = (Path(str(CORPORA)) / "train" / domain / "val.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


# --- characters


@pytest.mark.parametrize(
    ("text", "unified"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("tab\tbell\x07nul\x00", "tab\tbellnul"),
        ("é\x85\x9f\x1b[0m", "é[0m"),
        ("e\u0301", "é"),
        ("a<|endoftext|>b", "a<|endoftext|>b"),
        (
            "zero\u200bwidth \u202ebidi\u202c soft\xadhyphen \ufeff \u2028",
            "zero\u200bwidth \u202ebidi\u202c soft\xadhyphen \ufeff \u2028",
        ),
    ],
)
def test_line_ends_and_characters_are_unified_and_what_is_text_stays(text: str, unified: str) -> None:
    assert unify([text], Clean()) == [(unified, None)]


def test_steps_of_unifying_can_be_left_out() -> None:
    assert unify(["e\u0301\x07"], Clean(nfc=False, control=False)) == [("e\u0301\x07", None)]


@given(st.text(alphabet=st.one_of(st.characters(max_codepoint=0xFF), st.characters(codec="utf-8"))))
def test_unifying_equals_the_definition_and_a_second_pass_changes_nothing(text: str) -> None:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(c for c in lines if c in "\t\n" or unicodedata.category(c) != "Cc")
    [(once, reason)] = unify([text], Clean())
    assert once == unicodedata.normalize("NFC", kept)
    assert reason == (None if once.strip() else "empty")
    assert unify([once], Clean()) == [(once, reason)]


@given(
    st.lists(st.sampled_from(["\u0301", "\u0323", "\u0344", "\u0301" * 30, "\u0f73" * 20, "a", "…", "🙂"])).map("".join)
)
@example("a" + "\u0344" * 30)
@example("…" * 31 + "\u0323\u0301" * 16)
def test_marks_are_parted_after_thirty_and_nothing_else_changes(text: str) -> None:
    [(once, _)] = unify([text], Clean())
    longest = max(map(len, re.findall("[\u0300-\u034e\u0f71-\u0f74]+", once)), default=0)
    assert longest <= MAX_MARKS
    assert unify([once], Clean())[0][0] == once == unicodedata.normalize("NFC", once)
    if JOINER not in once:
        assert once == unicodedata.normalize("NFC", text)
    assert sorted(unicodedata.normalize("NFD", text)) == sorted(unicodedata.normalize("NFD", once).replace(JOINER, ""))


def test_a_letter_with_a_million_marks_takes_linear_time() -> None:
    start = time.process_time()
    [(text, reason)] = unify(["a" + "\u0301" * 500_000 + "\u0323" * 500_000], Clean())
    assert (text[:3], text.count(JOINER), reason) == ("á\u0301\u0301", 1_000_000 // MAX_MARKS, None)
    assert time.process_time() - start < 5  # 0.5 s here; sorted at once, they take minutes


def test_texts_are_too_short_by_bytes_and_empty_by_white_space() -> None:
    texts = ["abc", "äb", "ab", " \n\t\u3000", "\x00\x07", ""]
    reasons = [reason for _, reason in unify(texts, Clean(min_document_bytes=3))]
    assert reasons == [None, None, "too_short", "empty", "empty", "empty"]


# --- encoding

GOOD = [
    "Müller fährt über die Straße – „schön“, sagte er.",
    "naïve café ½ § 7 ©2024 ¿qué? 5 € £10 «là» œuvre 東京 🙂",
    "ﬁ ligatures, “quotes” and ｗｉｄｅ letters",
]


def test_text_decoded_wrongly_once_or_twice_is_repaired_and_good_text_stays() -> None:
    once = [text.encode().decode("latin-1") for text in GOOD]
    twice = [text.encode().decode("latin-1") for text in once]
    windows = "It’s “fine” – Übergröße".encode().decode("windows-1252", errors="ignore")
    assert [text for text, _ in repair(GOOD)] == GOOD
    assert [text for text, _ in repair(once)] == GOOD
    assert [text for text, _ in repair(twice)] == GOOD
    assert repair([windows])[0][0].startswith("It’s “fine")


def test_each_line_is_repaired_by_itself() -> None:
    [(text, reason)] = repair(["Stra\xc3\x9fe\n東京 schön\nplain\n"])
    assert (text, reason) == ("Straße\n東京 schön\nplain\n", None)


_MOJIBAKE = st.text(st.sampled_from("aZ ,\n\x80\x9d\xa0ÃÂâ€™œŒ¡£§©ß×Øàáé–√≈‚вЂГў☺漢"), max_size=30)


@given(st.one_of(_MOJIBAKE, _MOJIBAKE.map(lambda text: text.encode().decode("latin-1")), st.text()))
@example("a Ã b")
@example(" Â b\nÂ b")
@example("s\u0153 \x85")
def test_repair_equals_ftfy_on_every_line_and_a_second_pass_changes_nothing(text: str) -> None:
    [(repaired, reason)] = repair([text])
    assert (repaired, reason) == ("\n".join(map(ftfy.fix_encoding, text.split("\n"))), None)
    assert repair([repaired]) == [(repaired, None)]
    assert _SUSPECT.search(text) or not any(map(is_bad, text.split("\n")))


@needs_corpora
def test_the_planted_mojibake_is_repaired_and_no_good_corpus_changes() -> None:
    bad = (Path(str(CORPORA)) / "dirty/encodings/mojibake_double_encoded.txt").read_text(encoding="utf-8")
    [(repaired, _)] = repair([bad])
    assert repaired.split("\n")[0] == "Übergröße – “quotes” — naïve café 東京 🙂👩\u200d👩\u200d👧\u200d👦 ﬁ ½"
    assert "Ã" not in repaired
    for domain in ("german_law", "law_dccode", "fiction_standardebooks", "news_wikinews", "science_acl"):
        texts = val_texts(domain)
        assert [text for text, _ in repair(texts)] == texts, domain


# --- HTML

PAGE = """<html><head><title>Title</title><style>p { color: red }</style><script>var no = "<p>no</p>";</script></head>
<body><nav><a href="/">Home</a></nav><h1>Cakes</h1><!-- no -->
<p>Take   two eggs<br>&amp; a caf&eacute; of <b>milk</b>; see <a href="https://a.example/x">the list</a>.</p>
<ul><li>flour</li><li>sugar</li></ul><p hidden>no</p><pre>def f():
    return 1 &lt; 2</pre><table><tr><td>a</td><td>b</td></tr></table>
<noscript>no</noscript><svg><text>no</text></svg><img alt="no" src="x.png"><footer>no</footer></body></html>"""


def test_a_page_becomes_its_visible_text_with_paragraphs_and_items_in_lines() -> None:
    [(text, reason)] = html_to_text([PAGE])
    assert reason is None
    assert text.startswith("Cakes\n\nTake two eggs\n& a café of milk; see the list.\n\n")
    assert "• flour\n" in text
    assert "def f():\n    return 1 < 2\n" in text
    assert re.search(r"a\s+b", text)
    assert not re.search(r"\bno\b|Home|color", text)


@pytest.mark.parametrize("page", ["", "<p", "<!-- a", "<script>a", "<html><body></body></html>", "<nav>a</nav>"])
def test_a_page_without_text_is_named_so(page: str) -> None:
    assert html_to_text([page]) == [("", "no_text")]


def test_cut_and_deep_pages_give_the_text_that_is_there() -> None:
    pages = [
        PAGE[: PAGE.index("of <b>milk") + 9],
        "<div>" * MAX_UNCLOSED + "deep",
        "<table><tr><td>x",
        "&#xD800;&bogus; a < b",
    ]
    texts = [text for text, _ in html_to_text(pages)]
    assert texts[0].endswith("& a café of mil")
    assert [text.strip() for text in texts[1:]] == ["deep", "x", "\ufffd&bogus; a < b"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("<p " + " ".join(f"a{n}=1" for n in range(MAX_ATTRIBUTES)) + ">x", None),
        ("<p " + " ".join(f"a{n}=1" for n in range(MAX_ATTRIBUTES + 1)) + ">x", "bad_html: too many attributes"),
        ("<p a='>' " + "/".join(f"a{n}='>'" for n in range(80_000)) + ">x", "bad_html: too many attributes"),
        ("<p title='" + "a=1 <b " * 9_999 + "'>x", None),
        ("<p>" + '<img src="data:' + "/a " * 9_999 + '">x', None),
        ("<a><div>" * 80_000 + "x", "bad_html: too deep"),
        ("<table><tr>x<div>y<td>" * 40_000, "bad_html: too deep"),
        ("<div>" * 20_000 + "</x>" * 20_000 + "<table>x" * 20_000, "bad_html: too deep"),
        ("<p>one<br><li>two<a name=x>" * 9_999, None),
        ("<div><b>x</b></div>" * 9_999, None),
        ("<div><!-- </div> -->" * 9_999 + "x", "bad_html: too deep"),
        ("<!--><div>" * 9_999 + "x", "bad_html: too deep"),
        ("<script " + " ".join(f"a{n}=1" for n in range(9_999)) + "></script>x", "bad_html: too many attributes"),
        ("x<script>" + "if (a<b && i<n.length) { '<div>' }\n" * 9_999 + "</script>", None),
    ],
    ids=range(14),
)
def test_pages_that_would_take_a_parser_more_than_linear_time_are_refused(page: str, reason: str | None) -> None:
    start = time.process_time()
    assert html_to_text([page])[0][1] == reason
    assert time.process_time() - start < 2  # 0.1 s here; the parser takes 3 to 25 s for those refused


@pytest.mark.parametrize(
    "piece",
    ["<a", "<a ", "<a b='", "<a b=\"<a b='", "<a =", "<a/", "< ", "<!--", "<a b='>", "</a ", "<script ", "<title>"],
)
def test_the_search_for_such_pages_takes_linear_time(piece: str) -> None:
    start = time.process_time()
    html_to_text([piece * 300_000])
    assert time.process_time() - start < 2  # 0.3 s at most here


@given(st.text(st.sampled_from("<>/!-=\"'& apbr\x00é#;"), max_size=60))
def test_no_page_is_too_broken(page: str) -> None:
    [(text, reason)] = html_to_text([page])
    assert reason == (None if text.strip() else "no_text")


@needs_corpora
def test_the_dirty_pages_keep_their_text_and_lose_their_scripts() -> None:
    folder = Path(str(CORPORA)) / "dirty/html"
    names = ["script_and_entities.html", "gutenberg_page.html"]
    [(small, _), (book, _)] = html_to_text([(folder / name).read_text(encoding="utf-8") for name in names])
    assert small.split() == ["Visible", "<text>", "ééé", "&unknown;", "unclosed", "bolditalic"]
    assert "\n\nIt is a truth universally acknowledged, that a single man in possession" in book
    assert not re.search(r"<\w+|&\w+;", book)


# --- language

ENGLISH = "The cat sat on the mat and looked out of the window at the rain, which had not stopped since the morning."
GERMAN = "Die Katze saß auf der Matte und sah aus dem Fenster in den Regen, der seit dem Morgen nicht aufgehört hatte."


def test_languages_are_kept_or_named_as_the_reason() -> None:
    texts = [ENGLISH, GERMAN, GERMAN.replace(" ", "\n"), "12 34 56"]
    reasons = [None, "language: de", "language: de", "language: unsure"]
    assert keep_languages(texts, Language()) == list(zip(texts, reasons, strict=True))
    both = [reason for _, reason in keep_languages(texts, Language(keep=["de", "en"]))]
    assert both == [None, None, None, "language: unsure"]


def test_only_the_beginning_of_a_document_tells_its_language() -> None:
    beginning = ENGLISH * (MAX_CHARS // len(ENGLISH) + 1)
    assert keep_languages([beginning + GERMAN * 1_000], Language())[0][1] is None


def test_a_document_below_the_confidence_is_unsure_and_none_is_at_zero() -> None:
    mixed = f"{ENGLISH} {GERMAN}"
    assert keep_languages([mixed], Language(min_confidence=0.99))[0][1] == "language: unsure"
    assert keep_languages([mixed], Language(keep=["de", "en"], min_confidence=0))[0][1] is None


def test_an_unknown_language_is_refused_with_its_place_and_the_nearest_one() -> None:
    assert len(known_languages()) == 176
    check_languages(Language(keep=["en", "de", "zh"]))
    with pytest.raises(
        ConfigError, match=r"clean\.language\.keep\.1: no language 'eng' in lid\.176 \(did you mean 'en'"
    ):
        check_languages(Language(keep=["de", "eng"]))


@needs_corpora
def test_the_languages_of_the_corpora_are_found() -> None:
    any_confidence = Language(min_confidence=0)
    for domain in ("dialogue_sgd", "law_dccode", "news_wikinews", "code_pystdlib"):
        assert {reason for _, reason in keep_languages(val_texts(domain)[:100], any_confidence)} == {None}, domain
    assert {reason for _, reason in keep_languages(val_texts("german_law"), Language())} == {"language: de"}
    folder = Path(str(CORPORA)) / "dirty/encodings"
    languages = {"Bulgarian_Balgarski": "bg", "Czech": "cs", "Farsi_Persian": "fa", "Greek_Ellinika": "el"}
    languages |= {"Hebrew_Ivrit": "he", "Hindi": "hi", "Japanese_Nihongo": "ja", "Korean_Hankuko": "ko"}
    languages |= {"Russian": "ru", "Turkish_Turkce": "tr", "Ukrainian": "uk", "Vietnamese": "vi"}
    for name, language in languages.items():
        text = (folder / f"udhr_{name}-UTF8.txt").read_text(encoding="utf-8")
        assert keep_languages([text], Language())[0][1] == f"language: {language}"


# --- personal data


def redacted(text: str, **config: object) -> str:
    [(result, reason)] = redact([text], PersonalData.model_validate(config))
    assert reason is None
    return result


def invented(generator: random.Random) -> dict[str, tuple[str, str]]:
    """One new thing of each kind, with its placeholder; no number is given out, no key opens anything."""

    def characters(alphabet: str, count: int) -> str:
        return "".join(generator.choices(alphabet, k=count))

    digits, lower = "0123456789", "abcdefghijklmnopqrstuvwxyz"
    mixed = lower + lower.upper() + digits
    area, line = generator.choice(["202", "415", "312"]), f"555-01{characters(digits, 2)}"
    secret = f"aB3{characters(mixed, 37)}"
    name = generator.choice(["api_key = ", 'SECRET_KEY: "', "'access-token': '", "CLIENT_SECRET="])
    return {
        "email": (f"{characters(lower, 5)}.{characters(lower, 6)}+x@{characters(lower, 8)}.example.org", "<email>"),
        "phone +1": (f"+1-{area}-{line}", "<phone>"),
        "phone +44": (f"+44 20 7946 0{characters(digits, 3)}", "<phone>"),
        "phone US": (generator.choice(["({}) {}", "{}-{}", "1-{}-{}", "{} {}"]).format(area, line), "<phone>"),
        "phone dots": (f"{area}.{line}".replace("-", "."), "<phone>"),
        "ip 4": (".".join(str(generator.randrange(11, 127)) for _ in range(4)), "<ip>"),
        "ip 6": (f"2001:db8:{characters('123456789abcdef', 4)}::{characters('123456789abcdef', 3)}", "<ip>"),
        "ip 6 long": ("2001:" + ":".join(characters("123456789abcdef", 4) for _ in range(7)), "<ip>"),
        "AWS id": (f"AKIA{characters(lower.upper(), 16)}", "<key>"),
        "AWS secret": (f"aws secret {secret}", "aws secret <key>"),
        "GitHub": (generator.choice(["ghp_", "gho_", "ghs_"]) + characters(mixed, 36), "<key>"),
        "GitHub fine": (f"github_pat_{characters(mixed, 22)}_{characters(mixed, 59)}", "<key>"),
        "Slack": (f"xoxb-{characters(digits, 12)}-{characters(mixed, 24)}", "<key>"),
        "Google": (f"AIza{characters(mixed + '-_', 34)}x", "<key>"),
        "OpenAI": (f"sk-{generator.choice(['', 'proj-', 'ant-api03-'])}{secret}", "<key>"),
        "JSON web token": (
            ".".join([f"eyJ{characters(mixed, 20)}"] * 2 + [characters(mixed + "-_", 42) + "x"]),
            "<key>",
        ),
        "named": (f"{name}{characters('0123456789abcdef', 30)}a1", f"{name}<key>"),
        "private key": (
            f"-----BEGIN RSA PRIVATE KEY-----\n{characters(mixed + '+/', 64)}\n{characters(mixed, 20)}==\n"
            "-----END RSA PRIVATE KEY-----",
            "<key>",
        ),
    }


def planted(text: str, generator: random.Random) -> list[tuple[str, str]]:
    """The text with one thing of each kind in its spaces, and the same with the placeholders, per kind."""
    pairs = []
    for thing, placeholder in invented(generator).values():
        spaces = [match.start() for match in re.finditer(" ", text)]
        at = generator.choice(spaces)
        pairs.append(tuple(f"{text[:at]} (see: {what}, please) {text[at:]}" for what in (thing, placeholder)))
    return pairs


def test_whatever_is_planted_in_a_text_is_replaced_and_nothing_else() -> None:
    generator = random.Random(0)
    prose = f"{ENGLISH} In 1999 the 2,500 cats of {GERMAN} (1990-1991) were 4.5 kg each."
    for _ in range(30):
        for with_thing, with_placeholder in planted(prose, generator):
            assert redacted(with_thing) == with_placeholder


@needs_corpora
def test_whatever_is_planted_in_the_corpora_is_replaced_and_nothing_else() -> None:
    generator = random.Random(1)
    count = 0
    for domain in ("dialogue_sgd", "law_dccode", "german_law", "techdocs_peps", "news_wikinews", "code_pystdlib"):
        for text in generator.sample(val_texts(domain), 3):
            for with_thing, with_placeholder in planted(text[:5_000], generator):
                assert redacted(with_thing) == redacted(with_placeholder), domain
                count += 1
    assert count == 6 * 3 * 18


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4, section 7.1.4.34, OID 1.3.6.1.4.1.311, 127.0.0.1, 0.0.0.0, 255.255.255.0, 300.10.10.10, ::1",
        "std::vector a::b dead::beef 12:34:56 00:1a:2b:3c:4d:5e 2001::",
        "on 2020-01-15 or 15.01.2020 or 01/15/2020, 1990-1991, 10:30-11:30, $1,000.00, 3.14159265",
        "ISBN 978-0-306-40615-7 and 0-306-40615-2; § 22-1234.01; 2147483647; 2025550100; 41 265 988 52, 412 659 88 52",
        "4111 1111 1111 1111, 078-05-1120, DE89 3704 0044 0532 0130 00",  # kinds that no recipe names
        "@property\ndef f(a, b): return a@b.mean() + x @ y; user@localhost @-@ a@b",
        "the secret's sha1 is 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12; class sk-toggleable__label-arrow",
        "api_key = os.environ_variable_of_mine; token: abcdefghijklmnopqrstuvwxyz; secret_key = None",
        "a -----BEGIN PRIVATE KEY----- line begins such a file, AKIA and ghp_ such a key, eyJ a token",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("Mail <alice@example.com>.", "Mail <<email>>."),
        ("...bob@example.co.uk,carol@example.com", "...<email>,<email>"),
        ("zoë@example.com", "<email>"),
        ("202-555-0100/202-555-0101 +1 202 555 0100 24", "<phone>/<phone> <phone> 24"),
        ("DC 20001 202-555-0100", "DC 20001 <phone>"),
        ("http://192.0.2.17:8080/x, 2001:db8::1.", "http://<ip>:8080/x, <ip>."),
        ("secret wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY.", "secret <key>."),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSj", "<key>"),  # the end is cut off
    ],
)
def test_neighbours_of_what_is_replaced_stay(text: str, result: str) -> None:
    assert redacted(text) == result


def test_only_the_kinds_of_the_recipe_are_replaced() -> None:
    text = "a.b@example.com +1-202-555-0100 192.0.2.17 AKIAIOSFODNN7EXAMPLE"
    whole = ["a.b@example.com", "+1-202-555-0100", "192.0.2.17", "AKIAIOSFODNN7EXAMPLE"]
    for index, kind in enumerate(["email", "phone", "ip", "key"]):
        expected = [*whole[:index], f"<{kind}>", *whole[index + 1 :]]
        assert redacted(text, redact=[kind]).split() == expected


@pytest.mark.parametrize(
    ("region", "number"),
    [
        ("DE", "030/90 18 20"),
        ("DE", "(030) 901820"),
        ("DE", "0171-1234567"),
        ("GB", "020 7946 0958"),
        ("FR", "01 84 82 49 09"),
    ],
)
def test_numbers_without_a_country_code_are_of_the_region(region: str, number: str) -> None:
    assert redacted(f"Tel. {number}, bitte", phone_region=region) == "Tel. <phone>, bitte"
    assert redacted("Nr. 1698/2005 vom 06.03.2007, BGBl. 34-2202", phone_region=region).count("<") == 0


def test_an_unknown_region_is_refused_with_its_place_and_the_nearest_one() -> None:
    check_region(PersonalData(phone_region="DE"))
    with pytest.raises(ConfigError, match=r"clean\.personal_data\.phone_region: no region 'USA' \(did you mean 'US'"):
        check_region(PersonalData(phone_region="USA"))


_PIECES = st.sampled_from(
    [
        "a@b.com",
        "@",
        ".",
        "+",
        "-",
        " ",
        "1",
        "+1-202-555-0100",
        "202-555-0100",
        "192.0.2.10",
        "2001:db8::1",
        ":",
        "/",
        "(",
    ]
    + ["AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "secret ", "api_key=", "\n", "x", "<email>"]
    + ["-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "eyJhbGciOiJI.eyJzdWIiOiIx.x", "0", "é"]
)


@given(st.lists(_PIECES, max_size=12).map("".join))
def test_a_second_redaction_changes_nothing(text: str) -> None:
    once = redacted(text)
    assert redacted(once) == once


@pytest.mark.parametrize(
    ("thing", "count", "result"),
    [
        ("+49/ 34- 1555", 8_000, "<phone>"),
        ("202-555-0100,", 2_000, "<phone>,"),
        ("+4930901820,", 2_000, "<phone>,"),
        ("+c@d.com", 20_000, "<email>"),
        ("192.0.2.17,", 10_000, "<ip>,"),
        ("AIza" + "x1Y" * 11 + "zz ", 5_000, "<key> "),
    ],
)
def test_a_long_list_with_nothing_or_a_comma_between_is_replaced_in_linear_time(
    thing: str, count: int, result: str
) -> None:
    start = time.process_time()
    assert redacted(thing * count) == result * count
    assert time.process_time() - start < 5  # about 0.5 s here; a pass for each thing takes a minute or more


def test_google_keys_with_nothing_between_are_replaced_together() -> None:
    assert redacted(("AIza" + "x1Y" * 11 + "zz") * 5_000) == "<key>"


@given(st.lists(_PIECES | st.sampled_from(["word " * 99, "1 " * 140, "x" * 650]), max_size=30).map("".join))
def test_what_is_replaced_does_not_depend_on_the_windows_of_the_search(text: str) -> None:
    whole = redacted(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal_data, "_WINDOW_CHARS", 800)
        assert redacted(text) == whole


@needs_corpora
def test_the_planted_personal_data_is_found() -> None:
    lines = (Path(str(CORPORA)) / "dirty/pii/pii.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [redacted(json.loads(line)["text"]) for line in lines]
    for text in texts[:5]:
        assert re.fullmatch(r"Contact \w+ at <email> or <phone>; card [\d ]+; SSN [\d-]+; IP <ip>\.", text)
    assert texts[5:] == ["AWS key <key> secret <key>", "<key>", "IBAN DE89 3704 0044 0532 0130 00"]


@needs_corpora
def test_the_corpora_hold_no_keys_and_law_no_phones_or_addresses() -> None:
    for domain in ("law_dccode", "german_law", "fiction_standardebooks", "scripture_kjv", "science_acl"):
        texts = val_texts(domain)
        assert redact(texts, PersonalData()) == [(text, None) for text in texts], domain
    for domain in ("code_pystdlib", "techdocs_peps"):
        texts = val_texts(domain)
        assert redact(texts, PersonalData(redact=["key", "phone", "ip"])) == [(text, None) for text in texts], domain
