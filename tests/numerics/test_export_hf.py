"""An exported folder is a stock Llama: transformers gets our logits, greedy tokens and token ids from it."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import ulm
from tests.fuzzed import fuzzed
from tests.trained import equal_until_a_tie
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange.hf import export_hf
from ulm.models.account import num_parameters
from ulm.models.generate import prompt_tokens
from ulm.registry import KindConfig, register
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()

FLOAT32 = {"rtol": 0.0, "atol": 1e-4}  # the same float32 products, summed by other kernels; logits reach 10
BFLOAT16 = {"rtol": 0.0, "atol": 0.5}  # weights of 8 bits: 1/256 of logits that reach 10, through three layers
TRICKY = [
    "",
    " ",
    f"a {END_OF_TEXT} inside",
    END_OF_TEXT,
    "don't  stop,\n\n\tnow . !?",
    "e\u0301 é ﬁ Å 😀 \u200b\ufeff \x00",
    "<s> </s> <unk> <pad>",
    "x = [1, 2]  # 1234567",
]
BPE = train_bpe(["the cat sat on the mat and didn't stop\n", "def f(x):\n    return [x, 1]\n"] * 5, 290)
ALL = {"byte": byte_tokenizer(), "char": char_tokenizer(TRICKY), "bpe": BPE}
tokenizers_of_all_kinds = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
SHAPES = {
    "tied": {},
    "untied": {"embedding": {"tied": False}},
    "multi-head": {"attention": {"num_heads": 3, "num_kv_heads": 3}, "position": {"theta": 500.0}},
    "wide heads": {"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}, "norm": {"eps": 1e-3}},
}


def decided(nano, tokenizer: Tokenizer = BPE, **fields):
    """Ten times the usual start, so that attention looks somewhere and greedy choices have a margin."""
    model = nano(vocab_size=tokenizer.vocab_size, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() >= 2 else 1)
    return model


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_computes_our_logits_and_greedy_tokens(shape, nano, tmp_path):
    model = decided(nano, **SHAPES[shape])
    theirs = opened(export_hf(model, BPE, tmp_path / "llama"))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens_BT = torch.randint(290, (2, 64), generator=torch.Generator().manual_seed(0))
    logits_BTV = theirs(tokens_BT).logits
    assert logits_BTV.shape == (2, 64, 290)
    assert logits_BTV.std() > 1
    torch.testing.assert_close(logits_BTV, model(tokens_BT), **FLOAT32)
    ties = 0
    for prompt in ([0, 5, 9], [0, 250], [17] * 8):
        answer = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24)
        found = [t for t in answer[0, len(prompt) :].tolist() if t != BPE.eot_id]
        ours = ulm.generate(model, BPE, prompt, max_tokens=24)
        assert ours.tokens
        ties += not equal_until_a_tie(model, prompt, ours.tokens, found)
    assert ties <= 1


@tokenizers_of_all_kinds
def test_transformers_reads_the_same_token_ids(tokenizer, nano, tmp_path):
    folder = export_hf(nano(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id} == {tokenizer.eot_id}
    assert theirs.model_max_length == 64
    for text in [*TRICKY, *(fuzzed() if tokenizer.kind != "char" else [])]:  # char knows its alphabet alone
        tokens = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokens
        assert theirs(text)["input_ids"] == prompt_tokens(tokenizer, text) == [tokenizer.eot_id, *tokens]
        assert theirs.decode(tokens) == text
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_transformers_renders_the_same_chat(nano, tmp_path):
    tokenizer = Tokenizer(BPE.inner, "bpe", "{% for m in messages %}\n[{{ m.role }}] {{ m.content }}\n{% endfor %}\n>")
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Hello"}]
    for name, source in (("default", BPE), ("own", tokenizer)):
        folder = export_hf(nano(vocab_size=290), source, tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert text == source.render_chat(messages, add_generation_prompt=prompt)


def test_transformers_reads_the_special_tokens_of_a_chat_template(nano, tmp_path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(["<|user|>", "<|assistant|>"], template)
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf(nano(vocab_size=259), tokenizer, tmp_path / "llama"))
    assert len(theirs) == 259
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokens = tokenizer.encode_chat(messages)
    assert tokens == [257, *b"Hi", 258, *b"Hello"]
    assert theirs.apply_chat_template(messages, return_dict=False) == tokens
    assert theirs.decode(tokens, skip_special_tokens=True) == "HiHello"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_folder_says_what_it_holds(tied, nano, tmp_path):
    model = nano(vocab_size=290, embedding={"tied": tied})
    folder = export_hf(model, BPE, tmp_path / "llama")
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {
        "vocab_size": 290,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": BPE.eot_id,
        "eos_token_id": BPE.eot_id,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    weights = load_file(folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (290, 96)  # the model stores 320 rows
    assert ("lm_head.weight" in weights) is not tied
    assert sum(w.numel() for w in weights.values()) == num_parameters(model)


@torch.no_grad()
def test_a_bfloat16_export_is_half_the_size_and_close(nano, tmp_path):
    model = decided(nano)
    folder = export_hf(model, BPE, tmp_path / "half", dtype="bfloat16")
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    theirs = opened(folder)
    assert theirs.dtype == torch.bfloat16
    tokens_BT = torch.arange(20)[None]
    torch.testing.assert_close(theirs.float()(tokens_BT).logits, model(tokens_BT), **BFLOAT16)


def test_exporting_needs_no_transformers(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it now fails
    folder = export_hf(nano(vocab_size=290), BPE, tmp_path / "llama")
    assert (folder / "config.json").is_file()


def test_a_folder_that_is_taken_is_refused_and_kept(nano, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name in ("taken", "file"):
        with pytest.raises(ConfigError, match=rf"{name}: already exists and is not an empty folder \(name a new"):
            export_hf(nano(vocab_size=290), BPE, tmp_path / name)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (export_hf(nano(vocab_size=290), BPE, tmp_path / "empty") / "config.json").is_file()


def test_an_export_that_fails_midway_leaves_nothing(nano, tmp_path):
    broken = Tokenizer(BPE.inner, "bpe", chat_template="\ud800")  # can't be written as UTF-8; the weights come first
    with pytest.raises(UnicodeEncodeError):
        export_hf(nano(vocab_size=290), broken, tmp_path / "llama")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_size_and_an_unknown_dtype_are_refused(nano, tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer: has 257 tokens, the model 290 \(export a model with the"):
        export_hf(nano(vocab_size=290), byte_tokenizer(), tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"^dtype: no dtype 'int8' \(one of float32, bfloat16, float16\)$"):
        export_hf(nano(vocab_size=290), BPE, tmp_path / "llama", dtype="int8")


def test_a_model_that_is_no_llama_is_refused_with_the_part_that_differs(nano, tmp_path, monkeypatch):
    class Config(KindConfig):
        """Nothing to vary."""

    @register("norm", Config)
    class NoNorm(torch.nn.Module):
        def __init__(self, config, dims):
            super().__init__()

        def forward(self, x_BTD):
            return x_BTD

    module = ModuleType("no_norm")
    module.NoNorm = NoNorm
    monkeypatch.setitem(sys.modules, "no_norm", module)
    model = nano(vocab_size=290, norm={"kind": "no_norm:NoNorm"})
    with pytest.raises(UnsupportedError, match="norm.kind is no_norm:NoNorm, a LlamaForCausalLM's is rmsnorm"):
        export_hf(model, BPE, tmp_path / "llama")
    narrow = nano(vocab_size=290, d_model=80, attention={"num_heads": 3, "num_kv_heads": 1, "head_dim": 32})
    with pytest.raises(UnsupportedError, match="80 is no multiple of its 3 heads"):
        export_hf(narrow, BPE, tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
