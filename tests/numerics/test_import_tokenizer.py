"""A tokenizer of another make is taken as it is: the ids that transformers gives, and texts that come back."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import ulm
from tests.fuzzed import fuzzed
from ulm.errors import ArtefactError
from ulm.exchange.hf import export_hf
from ulm.exchange.hf_import import import_hf
from ulm.exchange.hf_tokenizer import read_tokenizer
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = ["the cat sat on the mat, didn't it? 1234\n", "def f(x):\n    return [x, 1]  # ok\n"] * 5
# Numbers in threes, and words that take one sign before them along: as newer models split text.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
TRICKY = ["", " ", "don't  stop,\n\n\tnow . !?", "x = [1, 2]  # 1234567", "<s> </s> <think> a", "e\u0301 é ﬁ 😀 \x00"]


def stored(folder: Path, *, end: str = "</s>", normalizer: Any = None, template: str | None = None) -> Path:
    """A folder with a byte-level BPE as another maker would save it."""
    inner = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([end])
    inner.add_tokens(["<think>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "in form C"])
def test_ids_are_those_of_transformers_and_texts_come_back(normalizer, tmp_path):
    ours, notes = read_tokenizer(stored(tmp_path, normalizer=normalizer), {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.kind, ours.vocab_size) == ("foreign", len(theirs))
    assert notes == (f"the end of text, </s> there, is {END_OF_TEXT} here",)
    assert ours.eot_id == theirs.eos_token_id
    for text in [*TRICKY, *fuzzed()]:
        tokens = ours.encode(text)
        # What spells a special token is text with us.
        assert (
            tokens == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] or "</s>" in text
        )
        assert ours.decode(tokens) == (unicodedata.normalize("NFC", text) if normalizer else text)
    assert ours.eot_id not in ours.encode("</s>") + ours.encode(END_OF_TEXT)
    assert Tokenizer.read(_written(ours, tmp_path / "again")).digest == ours.digest


def _written(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.write(folder)
    return folder


def test_a_chat_template_is_taken_with_the_new_name_of_the_end_or_left_out_with_a_reason(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    ours, _ = read_tokenizer(stored(tmp_path / "good", template=template), {})
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.render_chat(chat) == f"[user] Hi{END_OF_TEXT}"
    assert ours.encode_chat(chat)[-1] == ours.eot_id
    ours, notes = read_tokenizer(stored(tmp_path / "bad", template="{{ messages[0].tools }}"), {})
    assert notes[1].startswith("the folder's chat template is left out: a message that says")
    assert ours.render_chat(chat) == "User: Hi\nAssistant:"


def test_rows_that_no_token_has_are_left_out(nano, tmp_path):
    tokenizer = train_bpe(WORDS, 290)
    model = nano(vocab_size=320)
    source = tmp_path / "padded"
    bigger = train_bpe([*WORDS, *"abcdefghijklmnopqrstuvwxyz "], 290)
    assert bigger.vocab_size < 320
    folder = export_hf(nano(vocab_size=290), tokenizer, source)
    weights = {**_tensors(folder), "model.embed_tokens.weight": model.embedding.weight[:320].detach().clone()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 320}), encoding="utf-8")
    taken = import_hf(folder, root=tmp_path, name="taken")
    assert (taken.spec.vocab_size, taken.notes) == (290, ("30 rows of the tables that no token has are left out",))
    found, _ = ulm.load(taken.checkpoint)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens_BT).logits
        torch.testing.assert_close(found(tokens_BT), whole[..., :290], rtol=0.0, atol=1e-4)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "of another make; byte-level BPEs"),
        ("normalizer", {"type": "Lowercase"}, "of another make"),
        ("model", {"type": "nothing"}, "not a readable tokenizer"),
        ("added_tokens", [], "no end of text"),
    ],
)
def test_what_is_no_byte_level_bpe_or_has_no_end_of_text_is_refused(part, value, message, tmp_path):
    path = stored(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, part: value}), encoding="utf-8")
    if part == "added_tokens":
        (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtefactError, match=message):
        read_tokenizer(tmp_path, {})
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ArtefactError, match="no object of settings"):
        read_tokenizer(tmp_path, {})
