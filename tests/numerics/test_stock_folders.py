"""Stock architectures both ways: transformers' folders give its logits here, ours give our logits there."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ulm
from tests.numerics._stock import drawn
from tests.trained import equal_until_a_tie
from tests.variants import model_of
from ulm import artefacts
from ulm.checkpoints.manifest import read_manifest
from ulm.cli.main import app
from ulm.errors import ArtefactError, ConfigError, UnsupportedError
from ulm.exchange.hf import architectures, export_hf, stock
from ulm.exchange.hf_import import import_hf
from ulm.exchange.own import export_own
from ulm.exchange.plain import plain
from ulm.tokenizers.byte import byte_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()

RELATIVE = 1e-4  # of the largest logit: the bound asked for; sums in another order make 1e-6 to 5e-6 in float32
FLOOR = 0.5  # of the logits' standard deviation: below it models agree on anything
BYTES = byte_tokenizer()
CONTEXT_TOKENS, TEXT_TOKENS = 48, 40
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1 + pair / 16 for pair in range(12)],
    "long_factor": [1.0 + pair for pair in range(12)],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
}
GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 50, "sliding_window": 6}
TWO_TURNINGS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5_000.0},
}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", SIZES),
    "Llama 3, tied": ("Llama", {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {**SIZES, "head_dim": 64, "rms_norm_eps": 1e-3}),
    "Phi-3, a window": ("Phi3", {**SIZES, "sliding_window": 6}),
    "Phi-3, longrope in part": ("Phi3", {**SIZES, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "GPT-2": ("GPT2", {"n_positions": CONTEXT_TOKENS, "n_embd": 96, "n_layer": 3, "n_head": 3}),
    "Gemma-2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0}),
    "Gemma-3": (
        "Gemma3Text",
        {**GEMMA, "layer_types": [*TWO_TURNINGS, "sliding_attention"], "rope_parameters": TWO_TURNINGS},
    ),
    "OLMo-2": ("Olmo2", {**SIZES, "rms_norm_eps": 1e-3}),
    "Starcoder2": ("Starcoder2", {**SIZES, "sliding_window": 6}),
    "Bloom": ("Bloom", {"hidden_size": 96, "n_layer": 3, "n_head": 3, "seq_length": CONTEXT_TOKENS}),
    "Mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
every_folder = pytest.mark.parametrize("name", FOLDERS)


@cache
def theirs(name: str) -> Any:
    """A model of transformers with random weights and eager attention: the only one that knows soft caps."""
    kind, settings = FOLDERS[name]
    ends = {"bos_token_id": BYTES.eot_id, "eos_token_id": BYTES.eot_id, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": BYTES.vocab_size, **ends, **settings})
    return drawn(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def saved(name: str, folder: Path) -> Path:
    """What transformers saves, with a tokenizer of ours."""
    theirs(name).save_pretrained(folder)
    BYTES.write(folder)
    return folder


def opened(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def texts() -> torch.Tensor:
    return torch.randint(BYTES.eot_id, (2, TEXT_TOKENS), generator=torch.Generator().manual_seed(6))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.std() > FLOOR
    return float((found - expected).abs().max() / expected.abs().max())


@every_folder
@torch.no_grad()
def test_a_folder_of_transformers_and_its_export_have_the_same_logits_and_weights(name, tmp_path):
    taken = import_hf(saved(name, tmp_path / "theirs"), root=tmp_path, name="taken")
    assert taken.digest == read_manifest(taken.checkpoint).digest
    model, tokenizer = ulm.load(taken.checkpoint)
    expected = theirs(name)(texts()).logits
    assert relative_error(model(texts()), expected) < RELATIVE

    again = opened(export_hf(model, tokenizer, tmp_path / "ours"))
    assert type(again) is type(theirs(name))
    assert relative_error(again(texts()).logits, expected) < RELATIVE

    back, _ = ulm.load(import_hf(tmp_path / "ours", root=tmp_path, name="back").checkpoint)
    assert plain(back.spec) == plain(model.spec)
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(back.named_parameters()).keys()
    for parameter, weight in back.named_parameters():
        assert torch.equal(weight, weights[parameter]), parameter
    for prompt in ([5, 9], [250] * 3):
        answer = again.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12)
        ours = ulm.generate(back, tokenizer, prompt, max_tokens=12)
        found = [token for token in answer[0, len(prompt) :].tolist() if token != BYTES.eot_id]
        equal_until_a_tie(back, prompt, ours.tokens, found)


# Specs that an architecture has in other words, and the one that is found.
IN_OTHER_WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "YaRN": (
        "LlamaForCausalLM",
        {"position": {"scaling": {"kind": "yarn", "factor": 4.0, "original_context_tokens": 16, "fast_turns": 3.0}}},
    ),
    "YaRN of normed queries": (
        "Qwen3ForCausalLM",
        {
            "attention": {"qk_norm": True},
            "position": {"scaling": {"kind": "yarn", "factor": 4.0, "original_context_tokens": 16, "fast_turns": 3.0}},
        },
    ),
    "NTK": ("LlamaForCausalLM", {"position": {"scaling": {"kind": "ntk", "factor": 3.0}}}),
    "linear": ("LlamaForCausalLM", {"position": {"scaling": {"kind": "linear", "factor": 3.0}}}),
    "shared layers": ("LlamaForCausalLM", {"num_layers": 4, "layers_per_block": 2}),
    "a window longer than the context": ("LlamaForCausalLM", {"attention": {"kind": "sliding", "window_tokens": 64}}),
    "a mask of documents": ("LlamaForCausalLM", {"mask": ["document"]}),
    "a pattern that is none": ("LlamaForCausalLM", {"blocks": [{"repeat": 2}, {}]}),
    "a window": ("Phi3ForCausalLM", {"attention": {"kind": "sliding", "window_tokens": 8}}),
    "LongRoPE": (
        "Phi3ForCausalLM",
        {"position": {"kind": "longrope", "long_factors": [1 + n for n in range(16)], "original_context_tokens": 12}},
    ),
    "a part that turns": ("Phi3ForCausalLM", {"position": {"rotary_dim": 16}}),
    "norms of outputs": (
        "Olmo2ForCausalLM",
        {"attention": {"qk_norm": "whole", "num_kv_heads": 1}, "norm_placement": "output"},
    ),
    "sinusoidal, no biases, shared heads": (
        "GPT2LMHeadModel",
        {"position": "sinusoidal", "feedforward": "gelu", "norm": {"kind": "layernorm", "bias": False}},
    ),
    "squared ReLU": ("GPT2LMHeadModel", {"position": "learned", "feedforward": "relu2", "norm": "layernorm"}),
    "GELU and turns": ("Starcoder2ForCausalLM", {"feedforward": "gelu", "norm": "layernorm"}),
    "ALiBi": (
        "BloomForCausalLM",
        {
            "position": "alibi",
            "embedding_norm": True,
            "feedforward": {"kind": "gelu", "approximate": True, "d_hidden": None},
            "norm": "layernorm",
        },
    ),
    "experts": ("MixtralForCausalLM", {"feedforward": {"kind": "moe", "num_experts": 4}}),
}


@pytest.mark.parametrize("name", IN_OTHER_WORDS)
@torch.no_grad()
def test_what_an_architecture_has_in_other_words_becomes_its_own(name, nano, tmp_path):
    architecture, fields = IN_OTHER_WORDS[name]
    model = drawn(nano(vocab_size=BYTES.vocab_size, **fields))
    found = opened(export_hf(model, BYTES, tmp_path / "ours"))
    assert type(found).__name__ == architecture
    assert relative_error(found(texts()).logits, model(texts())) < RELATIVE


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": (
        {"attention": {"sinks": True}},
        "LlamaForCausalLM: attention.sinks is True, a LlamaForCausalLM's is False",
    ),
    "biases": ({"attention": {"bias": True}}, "attention.bias is True, a LlamaForCausalLM's is False"),
    "a soft cap": ({"attention": {"soft_cap": 5.0}}, "attention.soft_cap is 5.0, a LlamaForCausalLM's is none"),
    "scaled embeddings": ({"embedding": {"scaled": True}}, "embedding.scaled is True, a LlamaForCausalLM's is False"),
    "value embeddings": ({"embedding": "value"}, "embedding.kind is value, a LlamaForCausalLM's is token"),
    "linear attention": ({"attention": "linear"}, "attention.kind is linear, a LlamaForCausalLM's is gqa"),
    "first tokens kept": (
        {"attention": {"kind": "sliding", "window_tokens": 8, "num_sink_tokens": 2}},
        "attention.num_sink_tokens is 2, a Phi3ForCausalLM's is 0",
    ),
    "windows by layer": (
        {"blocks": [{}, {"attention": {"kind": "sliding", "window_tokens": 8}}]},
        "attention.window_tokens is by layer None, 8, None, a LlamaForCausalLM's is none",
    ),
    "one expert a token": (
        {"feedforward": {"kind": "moe", "experts_per_token": 1}},
        "feedforward.experts_per_token is 1, a MixtralForCausalLM's is 2",
    ),
    "a prefix": ({"mask": ["prefix"]}, "mask is prefix, a LlamaForCausalLM's is none"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_architecture_has_is_refused_with_what_differs_from_the_nearest(name, nano, tmp_path):
    fields, reason = FOREIGN[name]
    with pytest.raises(UnsupportedError) as refused:
        export_hf(nano(vocab_size=BYTES.vocab_size, **fields), BYTES, tmp_path / "ours")
    assert str(refused.value).startswith("no stock architecture for this model; the nearest is ")
    assert reason in str(refused.value)
    assert not (tmp_path / "ours").exists()


def test_each_architecture_says_all_that_transformers_class_has(tmp_path):
    for architecture in architectures():
        config = transformers.AutoConfig.for_model(architecture.model_type).to_dict()
        for key, value in architecture.defaults.items():
            if key in config:
                assert config[key] == value, (architecture.name, key)


def test_a_context_may_be_taken_shorter_where_other_factors_hold(tmp_path):
    source = saved("Phi-3, longrope in part", tmp_path / "theirs")
    whole = import_hf(source, root=tmp_path, name="whole")
    assert "--context 16" in whole.notes[0]
    short = import_hf(source, root=tmp_path, name="short", context_tokens=16)
    assert (short.notes, short.spec.context_tokens) == ((), 16)
    tokens_BT = texts()[:, :16]
    with torch.no_grad():
        model, _ = ulm.load(short.checkpoint)
        assert relative_error(model(tokens_BT), theirs("Phi-3, longrope in part")(tokens_BT).logits) < RELATIVE


def changed(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act: 'gelu' here, and a spec of ours can only have 'silu'"),
        ({"attention_bias": True}, "config.json: attention_bias: True here, and a spec of ours can only have False"),
        ({"architectures": ["LlamaForCausal"]}, "ours has no 'LlamaForCausal' (did you mean 'LlamaForCausalLM'?)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: ours has no 'yarn'"),
        ({"num_attention_heads": 0}, "config.json: not a LlamaForCausalLM's: ZeroDivisionError"),
        ({"hidden_size": "wide"}, "config.json: not a LlamaForCausalLM's: TypeError"),
        ({"tie_word_embeddings": None}, "embedding.tied"),
        ({"head_dim": 24}, "attention.head_dim: head_dim is 24"),
    ],
)
def test_a_config_that_means_no_spec_of_ours_is_refused_by_name(settings, message, tmp_path):
    source = changed(saved("Llama", tmp_path / "theirs"), **settings)
    with pytest.raises(ConfigError) as refused:
        import_hf(source, root=tmp_path, name="taken")
    assert message in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_settings_that_nobody_knows_are_told(tmp_path):
    source = changed(saved("Llama", tmp_path / "theirs"), logit_multiplier=2.0)
    assert import_hf(source, root=tmp_path, name="taken").notes == (
        "config.json: logit_multiplier: not known here, and passed over",
    )


def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path):
    source = saved("Llama", tmp_path / "theirs")
    path = source / "model.safetensors"
    weights = load_file(path)

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ArtefactError, match=message):
            import_hf(source, root=tmp_path, name="taken")
        assert not (tmp_path / "runs").exists() and not (tmp_path / "models").exists()

    norm = "model.norm.weight"
    refused({name: w for name, w in weights.items() if name != norm}, "no tensor model.norm.weight")
    refused({**weights, "model.more": weights[norm].clone()}, "1 tensors that the model has no place for: model.more")
    refused({**weights, norm: weights[norm][:5].clone()}, r"norm.weight is \[5\], where config.json means \[128\]")
    refused({**weights, norm: weights[norm] * torch.nan}, "norm.weight has numbers that are not finite")
    path.write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="not readable"):
        import_hf(source, root=tmp_path, name="taken")
    path.unlink()
    with pytest.raises(ArtefactError, match="pickled weights .* are not read"):
        import_hf(source, root=tmp_path, name="taken")


def test_weights_in_several_files_are_found_by_their_index_and_nowhere_else(tmp_path):
    source = saved("Llama", tmp_path / "theirs")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    half = len(weights) // 2
    parts = {"a.safetensors": dict(list(weights.items())[:half]), "b.safetensors": dict(list(weights.items())[half:])}
    for name, tensors in parts.items():
        save_file(tensors, source / name)
    of = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": of}), encoding="utf-8")
    model, _ = ulm.load(import_hf(source, root=tmp_path, name="taken").checkpoint)
    with torch.no_grad():
        assert relative_error(model(texts()), theirs("Llama")(texts()).logits) < RELATIVE
    index.write_text(json.dumps({"weight_map": {**of, "x": "../b.safetensors"}}), encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"'\.\./b\.safetensors' is no file of this folder"):
        import_hf(source, root=tmp_path, name="other")


def test_a_name_that_is_taken_or_none_is_refused(tmp_path):
    source = saved("Llama", tmp_path / "theirs")
    import_hf(source, root=tmp_path, name="taken")
    with pytest.raises(ConfigError, match="name: there is a run taken already"):
        import_hf(source, root=tmp_path, name="taken")
    with pytest.raises(ConfigError, match=r"name: '\.\./x' is no name"):
        import_hf(source, root=tmp_path, name="../x")


def test_the_plainest_architecture_is_taken_where_several_fit(nano):
    architecture, settings, _ = stock(nano(vocab_size=BYTES.vocab_size))
    assert architecture.name == "LlamaForCausalLM"
    assert settings["position.turning"].length == 1


@torch.no_grad()
def test_a_folder_with_its_own_code_comes_back_as_it_was(tmp_path):
    fields = {"embedding": {"kind": "value", "tied": False}, "attention": "performer", "layers_per_block": 2}
    model = model_of({**fields, "num_layers": 4, "vocab_size": BYTES.vocab_size})
    taken = import_hf(export_own(model, BYTES, tmp_path / "own"), root=tmp_path, name="taken")
    assert (taken.architecture, taken.spec, taken.notes) == ("UlmForCausalLM", model.spec, ())
    back, _ = ulm.load(taken.checkpoint)
    tokens_BT = texts()[:, : model.spec.context_tokens]
    assert torch.equal(back(tokens_BT), model(tokens_BT))


def test_a_folder_cannot_have_modules_imported(nano, tmp_path):
    source = export_own(nano(vocab_size=BYTES.vocab_size), BYTES, tmp_path / "own")
    spec = json.loads((source / "config.json").read_text(encoding="utf-8"))["spec"]
    hostile = {**spec, "blocks": [{"attention": {"kind": "this:Zen"}}]}
    with pytest.raises(ConfigError, match="config.json: spec: 'this:Zen' is no kind of ours"):
        import_hf(changed(source, spec=hostile), root=tmp_path, name="taken")
    assert "this" not in sys.modules


def test_the_command_line_exports_and_imports(nano, tmp_path, monkeypatch):
    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    ulm.save(nano(vocab_size=BYTES.vocab_size), BYTES, tmp_path / "runs" / "plain" / "step-00000003")
    ulm.save(nano(vocab_size=BYTES.vocab_size, head="soft_cap"), BYTES, tmp_path / "runs" / "odd" / "step-00000003")

    def run(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout.splitlines()[-1]))

    said = run("export", "plain", str(tmp_path / "a"), "--to", "hf", "--dtype", "bfloat16")
    assert (said["format"], said["architecture"], said["notes"]) == ("hf", "LlamaForCausalLM", [])
    assert "| architecture |" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    said = run("export", "odd", str(tmp_path / "b"))
    assert "head.kind is soft_cap, a LlamaForCausalLM's is logits" in said["notes"][0]
    assert run("export", "plain", str(tmp_path / "c.gguf"), "--to", "gguf")["path"] == str(tmp_path / "c.gguf")
    said = run("export", "plain", str(tmp_path / "d"), "--quantize", "w8a8")
    assert said["notes"] == ["what rounding costs was not measured: the corpus is not here, or holds no text back"]
    for folder, architecture in (("a", "LlamaForCausalLM"), ("b", "UlmForCausalLM")):
        said = run("import", str(tmp_path / folder))
        assert (said["name"], said["architecture"]) == (folder, architecture)
        assert run("generate", folder, "x", "--max-tokens", "3")["tokens"]
        assert artefacts.names(tmp_path / "tokenizers" / "names")[folder].name == BYTES.digest
