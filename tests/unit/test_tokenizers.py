"""Tokenizers: text comes back, special tokens in text stay text, and what is stored is what was made."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ulm import artefacts
from ulm.errors import ArtefactError, ConfigError, RequestError, UnknownCharacterError
from ulm.models.text_stream import TextStream
from ulm.tokenizers import kinds
from ulm.tokenizers.bpe import default_vocab_size, train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer
from ulm.tokenizers.chat import CHAT_STOP, CHAT_TEMPLATE, check_template, render_chat
from ulm.tokenizers.tokenizer import END_OF_TEXT, FILES, Tokenizer

TEXTS = [
    "the cat sat on the mat, and the dog didn't\n",
    "def sat(cat):\n    return cat + 1\n",
    "Ünïcödé, naïve café 😀",
] * 9
BPE, BYTE = train_bpe(TEXTS, 290), byte_tokenizer()
BOTH = {"byte": BYTE, "bpe": BPE}
tokenizers_of_both_kinds = pytest.mark.parametrize("tokenizer", BOTH.values(), ids=BOTH)
NO_MERGES = train_bpe(["x"], 5000)  # as many tokens as byte has
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MADE = {
    "byte": byte_tokenizer(SPECIAL, TURNS),
    "char": char_tokenizer([*TEXTS, "Hi there! <|endoftext|> <|user|> []:"], SPECIAL, TURNS),
    "bpe": train_bpe(TEXTS, 300, SPECIAL, TURNS),
}
tokenizers_of_all_kinds = pytest.mark.parametrize("tokenizer", MADE.values(), ids=MADE)
# what GPT-2's pattern tells apart: contractions, letters, digits, marks, white space, in and outside of ASCII
SPLIT = list("abstrevlmdSTz019'\".,!_-<|> \n\t\r") + [
    *"'  \x00\x1c\x7f\x85\xa0\u180e\u200b\u2028\u3000é中ʼ²٣…“\u0301😀"
]


def test_the_same_texts_give_the_same_bpe():
    again = train_bpe(iter(TEXTS), 290)
    assert again.digest == BPE.digest
    assert train_bpe(TEXTS, 289).digest != BPE.digest
    assert BPE.vocab_size == 290
    assert BPE.kind == "bpe"


def test_a_text_too_short_for_the_merges_gives_a_smaller_vocabulary():
    assert train_bpe(["ab ab ab"], 5000).vocab_size == 256 + 1 + 2  # ab, and Ġab


def test_bpe_knows_every_byte_and_shortens_what_it_was_trained_on():
    assert sorted(b for b in BPE.token_bytes if len(b) == 1) == [bytes([b]) for b in range(256)]
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


@tokenizers_of_both_kinds
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
@example(text="")
@example(text="  leading, trailing \n\t ")
@example(text="\x00\x7f\u200b\u2028\ufeff\U0010ffff")
@example(text="e\u0301 ﬁ Å Å")
@example(text=f"{END_OF_TEXT}{END_OF_TEXT[:-1]} {END_OF_TEXT}")
def test_any_unicode_text_comes_back_and_its_tokens_bytes_are_its_utf8(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[t] for t in tokens) == text.encode()
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eot_id not in tokens
    assert tokenizer.encode_batch([text, "other"])[0] == tokens


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_a_byte_tokenizers_ids_are_the_bytes(text):
    assert BYTE.encode(text) == list(text.encode())


def test_the_end_of_a_text_has_its_own_id_and_no_bytes():
    assert (BYTE.eot_id, BYTE.vocab_size) == (256, 257)
    for tokenizer in BOTH.values():
        assert tokenizer.token_bytes[tokenizer.eot_id] == b""
        assert len(tokenizer.token_bytes) == tokenizer.vocab_size
        assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a")]) == "a"


def test_bytes_that_are_no_text_become_replacement_characters():
    assert BYTE.decode([0x61, 0xFF, 0xC3]) == "a\ufffd\ufffd"


@pytest.mark.parametrize(
    ("text_bytes", "size"),
    [(0, 2048), (1_999_999, 2048), (2_000_000, 4096), (16_000_000, 8192), (256_000_000, 16_384)],
)
def test_the_default_vocabulary_grows_with_the_text(text_bytes, size):
    assert default_vocab_size(text_bytes) == size


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(SPLIT), max_size=30))
@example(text="we'll 'll  'S 's, I'm\n\n  if x_1:\n\treturn  ")
def test_bpe_finds_the_ids_that_tokenizers_finds(text):
    assert BPE.encode(text) == BPE.inner.encode(text, add_special_tokens=False).ids


def test_ids_do_not_depend_on_how_many_pieces_are_kept(monkeypatch):
    expected = train_bpe(TEXTS, 290).encode_batch(TEXTS[:3])
    monkeypatch.setattr(kinds, "MAX_PIECES", 2)
    assert train_bpe(TEXTS, 290).encode_batch(TEXTS[:3]) == expected


def test_every_character_parts_words_where_tokenizers_parts_them():
    chars = [chr(code) for code in range(0x3100) if chr(code).isspace() or code < 0x300 or not code % 5]
    texts = [f"x{c}y {c}{c} {c}a'{c}s 1{c}2 \n{c}\n!{c} {c}" for c in chars]
    assert BPE.encode_batch(texts) == [e.ids for e in BPE.inner.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@tokenizers_of_all_kinds
def test_arrays_hold_the_ids_of_each_text(tokenizer, dtype):
    texts = [TEXTS[0], "", "café, naïve", "cat" * 100, " \n"]
    arrays = tokenizer.encode_arrays(iter(texts), dtype)
    assert [a.dtype for a in arrays] == [np.dtype(dtype)] * len(texts)
    expected = [e.ids for e in tokenizer.inner.encode_batch(texts, add_special_tokens=False)]
    assert [a.tolist() for a in arrays] == tokenizer.encode_batch(texts) == expected


def test_a_megabyte_without_a_word_border_is_learnt_and_encoded_in_seconds():
    noise = random.Random(0).choices("abcd", k=200_000)
    text = "a" * 1_000_000 + " " * 1_000_000 + "".join(noise)
    start = time.process_time()
    tokenizer = train_bpe([text], 600)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 60  # about 3; hours, were the trainer given such words whole
    assert tokenizer.max_token_bytes >= 512  # as long as doubling merges make them


def test_text_of_ordinary_words_is_learnt_whole():
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=plain.pre_tokenizer.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(TEXTS, trainer)
    assert BPE.inner.get_vocab() == plain.get_vocab()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_a_char_tokenizer_has_one_token_for_each_character_it_was_made_of(text):
    tokenizer = char_tokenizer([text, "\n"])
    tokens = tokenizer.encode(text)
    assert tokens == [sorted({*text, "\n"}).index(char) for char in text]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.inner.encode(text, add_special_tokens=False).ids == tokens
    assert tokenizer.inner.decode(tokens) == text
    assert [tokenizer.token_bytes[t] for t in tokens] == [char.encode() for char in text]
    assert tokenizer.vocab_size == len({*text, "\n"}) + 1
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, tokens), stream.finish()]) == text


def test_a_char_tokenizers_digest_does_not_depend_on_the_order_of_its_texts():
    assert char_tokenizer(["cab", "\U0001f600"]).digest == char_tokenizer(["\U0001f600", "c", "b", "a", "a"]).digest


@pytest.mark.parametrize(
    ("text", "named"),
    [("ab\u00e9\u00e8", "U+00E9 'é'"), ("\n", r"U+000A '\n'"), ("\U0001f600", "U+1F600"), ("a\ud800", "U+D800")],
)
def test_a_char_tokenizer_refuses_the_first_unknown_character_by_name(text, named):
    tokenizer = char_tokenizer("ab")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_arrays(["a", text], "<u2")):
        with pytest.raises(UnknownCharacterError) as caught:
            encode(text)
        assert str(caught.value).startswith(f"character {named}")
        assert str(caught.value).endswith("is not in the vocabulary of this tokenizer")
        assert caught.value.status == 400


def test_special_tokens_stand_where_no_other_id_moves():
    ids = {kind: tokenizer.special_ids for kind, tokenizer in MADE.items()}
    assert ids["byte"] == {END_OF_TEXT: 256, "<|user|>": 257, "<|assistant|>": 258, "<|end|>": 259}
    assert ids["bpe"] == {END_OF_TEXT: 0, "<|user|>": 1, "<|assistant|>": 2, "<|end|>": 3}
    num_chars = MADE["char"].vocab_size - 4
    assert list(ids["char"].values()) == [num_chars, num_chars + 1, num_chars + 2, num_chars + 3]
    assert (MADE["byte"].vocab_size, MADE["bpe"].vocab_size) == (260, 300)


@tokenizers_of_all_kinds
def test_special_tokens_have_no_bytes_and_no_text_makes_them(tokenizer):
    text = "".join([END_OF_TEXT, *SPECIAL])
    tokens = tokenizer.encode(text)
    assert not set(tokens) & set(tokenizer.special_ids.values())
    assert tokenizer.decode([tokenizer.special_ids["<|user|>"], *tokens]) == text
    assert tokenizer.max_token_bytes >= len("<|endoftext|>")


def test_a_bpe_learns_no_special_token_from_text_full_of_it():
    tokenizer = train_bpe(["<|user|>" * 50] * 50, 400, ["<|user|>"])
    assert tokenizer.special_ids["<|user|>"] not in tokenizer.encode("<|user|>")


@pytest.mark.parametrize("make", [byte_tokenizer, lambda *given: char_tokenizer("ab", *given)], ids=["byte", "char"])
@pytest.mark.parametrize(
    ("given", "place", "problem"),
    [
        (["<|a|>", "<|a|>"], "1", "<|a|> stands twice"),
        ([END_OF_TEXT], "0", "every tokenizer has <|endoftext|> (leave it out)"),
        (["<|a|>", ""], "1", "'' is not spelled as a special token"),
        (["<user>"], "0", "'<user>' is not spelled as a special token (like <|user|>"),
        (["<|_|>"], "0", "'<|_|>' is not"),
        (["<|a b|>"], "0", "'<|a b|>' is not"),
    ],
)
def test_a_special_token_that_cannot_be_is_refused_by_its_place(make, given, place, problem):
    with pytest.raises(ConfigError) as caught:
        make(given)
    assert str(caught.value).startswith(f"tokenizer.special_tokens.{place}: {problem}")


def test_a_vocabulary_too_small_for_bytes_and_special_tokens_is_refused():
    assert train_bpe(TEXTS, 258, ["<|a|>"]).vocab_size == 258
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size: 257 tokens .* 2 special tokens \(258 or more\)"):
        train_bpe(TEXTS, 257, ["<|a|>"])


def test_a_chat_is_rendered_as_named_turns_that_end_with_the_answers_name():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ 1 }} <|endoftext|>"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    text = BPE.render_chat(messages)
    assert text == "System: Be brief.\nUser: Hi {{ 1 }} <|endoftext|>\nAssistant: Hello.\nUser: Bye\nAssistant:"
    assert CHAT_STOP in text


def test_a_transcript_ends_with_the_last_messages_line():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = "User: Hi\nAssistant: Hello.\n"
    assert render_chat(CHAT_TEMPLATE, messages, add_generation_prompt=False) == text
    assert BYTE.render_chat(messages, add_generation_prompt=False) == text
    assert BYTE.encode_chat(messages, add_generation_prompt=False) == list(text.encode())


@settings(max_examples=100, deadline=None)
@given(said=st.lists(st.text(alphabet="<|user>endoftxt_\ue000\ue001 ", max_size=14), min_size=1, max_size=4))
@example(said=["<|user|>", "<", "|user|>", "<|endoftext|><"])
def test_of_a_chat_only_the_templates_own_special_tokens_are_ids(said):
    tokenizer, messages = MADE["byte"], [{"role": "user", "content": text} for text in said]
    user, assistant, end = (tokenizer.special_ids[token] for token in SPECIAL)
    expected = [token for text in said for token in (user, *text.encode(), end)]
    assert tokenizer.encode_chat(messages) == [*expected, assistant]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == expected
    assert BYTE.encode_chat(messages) == BYTE.encode(BYTE.render_chat(messages))  # its template writes none


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.no.such }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(200) %}{% for j in range(200) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 700000000 }}",
        "{{ 700000000 * ['a'] }}",
        "{{ 10 ** (10 ** 10) }}",
    ],
)
def test_a_template_that_fails_or_reaches_outside_its_sandbox_refuses_the_request(template):
    tokenizer = Tokenizer(BYTE.inner, "byte", chat_template=template)
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert (caught.value.param, caught.value.status) == ("messages", 400)


def test_bounds_of_templates_are_of_one_rendering_and_leave_arithmetic_alone():
    template = "{% for i in range(9, 0, -3) %}{{ i }}{% endfor %}{{ '-' * 9 }}{{ 12345 * 12345 }} {{ 2 ** 64 }}"
    for _ in range(5_000):
        text = render_chat(template, [], add_generation_prompt=False)
    assert text == "963---------152399025 18446744073709551616"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for %}", "the chat template refuses these messages: Expected an expression"),
        ("{{ 1 / 0 }}", "the chat template refuses these messages: division by zero"),
        ("{{ messages[0].content }}", "a message that says 'its answer' is not shown"),
        ("{% if add_generation_prompt %}{{ messages }}{% endif %}", "a message that says 'one question' is not shown"),
    ],
)
def test_a_template_that_cannot_show_a_chat_is_refused_before_a_tokenizer_is_made(template, problem):
    with pytest.raises(ConfigError) as caught:
        check_template(template)
    assert str(caught.value).startswith(f"tokenizer.chat_template: {problem}")
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template"):
        byte_tokenizer(chat_template=template)
    check_template(CHAT_TEMPLATE)
    check_template(TURNS)


@pytest.mark.parametrize("tokenizer", [*MADE.values(), NO_MERGES], ids=[*MADE, "no merges"])
def test_a_stored_tokenizer_is_read_back_the_same(tokenizer, tmp_path):
    place = tokenizer.save(tmp_path)
    assert place == tmp_path / "tokenizers" / tokenizer.digest
    assert {p.name for p in place.iterdir()} == {*FILES, "manifest.json"}
    manifest = artefacts.read_manifest(place, "tokenizer")
    artefacts.verify_files(place, manifest["files"])
    assert (manifest["kind"], manifest["vocab_size"]) == (tokenizer.kind, tokenizer.vocab_size)
    again = Tokenizer.read(place)
    assert (again.digest, again.kind, again.chat_template) == (
        tokenizer.digest,
        tokenizer.kind,
        tokenizer.chat_template,
    )
    assert NO_MERGES.vocab_size == BYTE.vocab_size
    assert again.special_ids == tokenizer.special_ids
    text = f"café {END_OF_TEXT} sat"
    assert again.encode(text) == tokenizer.encode(text)


def test_storing_twice_changes_nothing(tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in BPE.save(tmp_path).iterdir()}
    assert {p.name: p.stat().st_mtime_ns for p in BPE.save(tmp_path).iterdir()} == before
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_the_digest_covers_the_chat_template_and_the_special_tokens():
    made = [BYTE, byte_tokenizer(SPECIAL), byte_tokenizer(SPECIAL[::-1]), byte_tokenizer(SPECIAL, TURNS)]
    assert len({tokenizer.digest for tokenizer in made}) == 4


@pytest.mark.parametrize("damage", ["missing", "no json", "no template", "no end of text"])
def test_a_damaged_tokenizer_is_named(tmp_path, damage):
    place = BPE.save(tmp_path)
    path = place / "tokenizer.json"
    if damage == "missing":
        path.unlink()
    elif damage == "no json":
        path.write_text("{", encoding="utf-8")
    elif damage == "no template":
        (place / "chat_template.jinja").unlink()
    else:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["added_tokens"] = []
        del stored["model"]["vocab"][END_OF_TEXT]
        path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ArtefactError, match="tokenizer"):
        Tokenizer.read(place)


def test_a_tokenizer_that_codes_text_in_another_way_is_refused(tmp_path):
    place = BPE.save(tmp_path)
    changes = (
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", None),
    )
    for part, other in changes:
        stored = json.loads(BPE.inner.to_str())
        stored[part] = other
        (place / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
        with pytest.raises(ArtefactError, match="of no known kind, which are byte, char, bpe, foreign"):
            Tokenizer.read(place)
