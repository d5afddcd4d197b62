"""A folder that carries its own code: transformers gets our logits from it, for every kind, without our packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ulm
from tests.trained import TIE
from tests.variants import VOCAB_SIZE, every_variant, is_causal, model_of, spec_of, tokens
from ulm import registry
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange.own import CARRIED, CODE, CODE_FILES, export_mixture, export_own, refusals, vllm_refusals
from ulm.spec import ModelSpec
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()

RELATIVE = 1e-4  # of the largest logit: the bound asked for; most kinds are equal to the bit, a cap's order costs 1e-6
BFLOAT16 = 0.05  # of the largest logit: weights and activations of 8 bits, through two layers
LETTERS = char_tokenizer([chr(code) for code in range(32, 32 + VOCAB_SIZE - 1)])
PROMPT_TOKENS, NEW_TOKENS, PADDING_TOKENS = 7, 20, 3
# The hardest one: windows, patterns and positions of several kinds.
MIXED = {
    "num_layers": 4,
    "position": {"kind": "rope", "theta": 500.0},
    "blocks": [
        {"repeat": 2, "attention": {"kind": "sliding", "window_tokens": 4}, "position": {"theta": 50.0}},
        {"position": "none", "attention": {"sinks": True, "qk_norm": True}},
        {"position": "alibi", "feedforward": "relu2"},
    ],
}
# What opens a folder where none of our packages can be imported.
ALONE = """
import json, sys
for name in ("ulm", "serve", "pipelines"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text, return_tensors="pt").input_ids
with torch.no_grad():
    print(json.dumps({"ids": ids[0].tolist(), "logits": model(ids).logits[0, -1].tolist()}))
"""


def opened(folder: Any, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@every_variant
@torch.no_grad()
def test_transformers_gets_our_logits_and_greedy_tokens_of_every_kind(overrides, tmp_path):
    if not is_causal(overrides):
        with pytest.raises(UnsupportedError, match="mask prefix: transformers does not say where a prompt ends"):
            export_own(model_of(overrides), LETTERS, tmp_path / "own")
        return
    model = model_of(overrides).eval()
    theirs = opened(export_own(model, LETTERS, tmp_path / "own"))
    tokens_BT = tokens(2, 20)
    ours_BTV = model(tokens_BT)
    assert ours_BTV.std() > 1, "logits so near each other that any model is right"
    assert relative(theirs(tokens_BT).logits, ours_BTV) < RELATIVE

    prompt_BT = tokens_BT[:1, :PROMPT_TOKENS]
    found_BT = theirs.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    assert found_BT.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    choices_TV = model(found_BT)[0, PROMPT_TOKENS - 1 : -1]
    choices_TV[:, LETTERS.eot_id] = -torch.inf  # as min_new_tokens does
    behind_T = choices_TV.max(-1).values - choices_TV.gather(1, found_BT[0, PROMPT_TOKENS:, None])[:, 0]
    assert behind_T.max() < TIE, f"a token that is {behind_T.max():.4f} behind our best one"


@pytest.mark.parametrize("overrides", [MIXED, {"attention": "linear"}, {"position": "learned"}, {"position": "t5"}])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(overrides, tmp_path):
    model = model_of(overrides).eval()
    theirs = opened(export_own(model, LETTERS, tmp_path / "own"))
    tokens_BT = tokens(2, 12)
    padded_BT = torch.cat([torch.full((2, PADDING_TOKENS), LETTERS.eot_id), tokens_BT], dim=1)
    is_token_BT = torch.ones_like(padded_BT)
    is_token_BT[0, :PADDING_TOKENS] = 0  # the other row is longer
    logits_BTV = theirs(padded_BT, attention_mask=is_token_BT).logits
    assert relative(logits_BTV[0, PADDING_TOKENS:], model(tokens_BT[:1])[0]) < RELATIVE
    assert relative(logits_BTV[1], model(padded_BT[1:])[0]) < RELATIVE
    found_BT = theirs.generate(
        padded_BT, attention_mask=is_token_BT, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    alone_BT = theirs.generate(
        tokens_BT[:1],
        attention_mask=torch.ones_like(tokens_BT[:1]),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    assert found_BT[0, PADDING_TOKENS:].tolist() == alone_BT[0].tolist()


def test_a_folder_opens_where_nothing_of_ours_is_installed(tmp_path):
    model = model_of(MIXED).eval()
    folder = export_own(model, LETTERS, tmp_path / "own")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), "hello there"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == [LETTERS.eot_id, *LETTERS.encode("hello there")]
    with torch.no_grad():
        assert relative(torch.tensor(found["logits"]), model(torch.tensor([found["ids"]]))[0, -1]) < RELATIVE


def test_the_folder_says_what_it_holds(tmp_path):
    model = model_of({**MIXED, "embedding": {"tied": False}})
    folder = export_own(model, LETTERS, tmp_path / "own", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert ModelSpec(**config["spec"]) == model.spec
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} == config["auto_map"].keys()
    assert (config["vocab_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (97, 4, 40)
    assert config["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert (config["sliding_window"], config["eos_token_id"], config["dtype"]) == (4, LETTERS.eot_id, "bfloat16")
    stored = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert stored["model.embedding.weight"].shape == stored["lm_head.weight"].shape == (97, 96)
    assert "model.blocks.2.attention.sinks" in stored
    opened_ = opened(folder)
    tokens_BT = tokens(1, 20)
    with torch.no_grad():
        assert 0 < relative(opened_(tokens_BT).logits.float(), model(tokens_BT)) < BFLOAT16


def test_layers_that_share_weights_share_them_in_the_file_and_in_memory(tmp_path):
    model = model_of({"num_layers": 4, "layers_per_block": 2})
    folder = export_own(model, LETTERS, tmp_path / "own")
    blocks = {name.split(".")[2] for name in load_file(folder / "model.safetensors") if "blocks" in name}
    assert blocks == {"0", "1"}
    theirs = opened(folder)
    kept = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert sum(parameter.numel() for parameter in theirs.model.blocks.parameters()) == kept


def test_a_fresh_model_from_the_configuration_trains(tmp_path):
    overrides = {"embedding": "value", "position": "learned", "feedforward": "moe"}
    folder = export_own(model_of(overrides), LETTERS, tmp_path / "own")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    theirs = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    tokens_BT = tokens(2, 20)
    found = theirs(tokens_BT, labels=tokens_BT)
    wanted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)
    found.loss.backward()
    idle = [name for name, weight in theirs.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in idle if "experts" not in name] == []


def test_wrong_use_is_refused_by_the_folders_code(tmp_path):
    theirs = opened(export_own(model_of({"embedding": "value"}), LETTERS, tmp_path / "own"))
    with pytest.raises(ValueError, match="the text is longer than the model's 40 tokens of context"):
        theirs(tokens(1, 41))
    with pytest.raises(ValueError, match="attention_mask must be 2D, one number a token"):
        theirs(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="this model adds embeddings of tokens to its values: it needs input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 5, 96))
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of them"):
        theirs()


def test_every_setting_of_a_kind_that_is_carried_is_read_by_the_folders_code():
    code = "".join((CODE / name).read_text() for name in CODE_FILES)
    elsewhere = {"kind", "head_dim", "tied", "balance", "seed"}  # other fields, training, and what is stored as weights
    for slot, kinds in CARRIED.items():
        for kind in kinds:
            settings = registry.find(slot, kind).Config.model_fields.keys() - elsewhere
            assert [name for name in settings if f'"{name}"' not in code] == [], f"{slot} {kind}"


def test_what_vllm_cannot_run_is_said_with_the_reason():
    reasons = {
        "t5": vllm_refusals(spec_of({"position": "t5"})),
        "linear": vllm_refusals(spec_of({"blocks": [{}, {"attention": "linear"}]})),
        "first": vllm_refusals(spec_of({"attention": {"kind": "sliding", "num_sink_tokens": 2}})),
        "prefix": vllm_refusals(spec_of({"mask": "prefix"})),
    }
    assert reasons["t5"] == ["position t5: vLLM's kernels take no bias of scores but ALiBi's"]
    assert reasons["linear"] == ["attention linear: vLLM has no kernel for it"]
    assert reasons["first"] == ["attention.num_sink_tokens: a window of vLLM forgets a text's first tokens"]
    assert [reason.partition(":")[0] for reason in reasons["prefix"]] == ["mask prefix"]
    assert refusals(spec_of({"position": "t5"})) == vllm_refusals(spec_of(MIXED)) == []


def test_a_mixture_names_its_experts_from_where_it_stands(tmp_path):
    wide = {"d_model": 128, "attention": {"num_heads": 4, "num_kv_heads": 2}}
    folders = {
        "a": export_own(model_of(MIXED), LETTERS, tmp_path / "experts" / "a"),
        "b": export_own(model_of(wide, context_tokens=24), LETTERS, tmp_path / "experts" / "b"),
    }
    folder = export_mixture(folders, tmp_path / "mixtures" / "ab")
    config = json.loads((folder / "config.json").read_text())
    assert config["experts"] == {"a": "../../experts/a", "b": "../../experts/b"}
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (128, 4, 24)
    assert load_file(folder / "model.safetensors")["weights"].tolist() == [0.5, 0.5]
    assert (folder / "tokenizer.json").read_bytes() == (folders["a"] / "tokenizer.json").read_bytes()


def test_experts_that_cannot_be_mixed_are_refused(tmp_path):
    letters = export_own(model_of({}), LETTERS, tmp_path / "letters")
    nano = ulm.build(ModelSpec.preset("nano", vocab_size=257, num_layers=1), seed=0)
    other = export_own(nano, byte_tokenizer(), tmp_path / "bytes")
    with pytest.raises(ConfigError, match=r"^experts.b: another tokenizer than that of a \(experts with one tokenizer"):
        export_mixture({"a": letters, "b": other}, tmp_path / "mixture")
    with pytest.raises(ConfigError, match="nowhere: no config.json in it"):
        export_mixture({"a": tmp_path / "nowhere"}, tmp_path / "mixture")
    with pytest.raises(ConfigError, match="experts: there are none"):
        export_mixture({}, tmp_path / "mixture")
    with pytest.raises(ConfigError, match="letters: already exists and is not an empty folder"):
        export_mixture({"a": letters}, letters)
    assert not (tmp_path / "mixture").exists()
