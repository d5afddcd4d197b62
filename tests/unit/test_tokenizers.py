"""Tokenizers: text comes back, special tokens in text stay text, and what is stored is what was made."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ulm import artefacts
from ulm.errors import ArtefactError, RequestError
from ulm.tokenizers.bpe import default_vocab_size, train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import CHAT_STOP, END_OF_TEXT, FILES, Tokenizer

TEXTS = [
    "the cat sat on the mat, and the dog didn't\n",
    "def sat(cat):\n    return cat + 1\n",
    "Ünïcödé, naïve café 😀",
] * 9
BPE, BYTE = train_bpe(TEXTS, 290), byte_tokenizer()
BOTH = {"byte": BYTE, "bpe": BPE}
tokenizers_of_both_kinds = pytest.mark.parametrize("tokenizer", BOTH.values(), ids=BOTH)


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


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages.no.such }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_or_reaches_outside_its_sandbox_refuses_the_request(template):
    tokenizer = Tokenizer(BYTE.inner, "byte", chat_template=template)
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert (caught.value.param, caught.value.status) == ("messages", 400)


@tokenizers_of_both_kinds
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
    text = f"café {END_OF_TEXT} sat"
    assert again.encode(text) == tokenizer.encode(text)


def test_storing_twice_changes_nothing(tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in BPE.save(tmp_path).iterdir()}
    assert {p.name: p.stat().st_mtime_ns for p in BPE.save(tmp_path).iterdir()} == before
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_the_digest_covers_the_chat_template():
    assert Tokenizer(BPE.inner, "bpe", chat_template="{{ messages }}").digest != BPE.digest


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
