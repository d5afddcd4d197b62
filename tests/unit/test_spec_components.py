"""Parts that do not fit are refused when a spec is made, by the name of the field and with what would do instead."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml

import ulm
from ulm.cli import console
from ulm.cli.main import app
from ulm.errors import ConfigError, ContextLengthError

# nano: 96 wide, 3 layers, 3 heads of 32 and one of keys and values, a context of 256 tokens
SLIDING, ONES = {"kind": "sliding", "window_tokens": 64}, [1.0] * 16
AT_LEAST_1 = "Input should be greater than or equal to 1"
YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 128}
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # what is laid over nano, the error, what mends it
    "heads that do not divide": (
        {"attention": {"num_heads": 5}},
        "attention.num_heads: 5 does not divide d_model, which is 96 (a divisor of 96, or attention.head_dim)",
        {"attention": {"num_heads": 5, "head_dim": 32}},
    ),
    "heads of a width that no kernel knows": (
        {"attention": {"num_heads": 4}},
        "attention.num_heads: head_dim is 24 (one of (32, 64, 80, 96, 112, 128, 160, 192, 224, 256))",
        {"attention": {"num_heads": 1}},
    ),
    "a width of heads that no kernel knows": (
        {"attention": {"head_dim": 48}},
        "attention.head_dim: head_dim is 48 (one of (32, 64, 80, 96, 112, 128, 160, 192, 224, 256))",
        {"attention": {"head_dim": 64}},
    ),
    "kv heads that do not divide": (
        {"attention": {"num_kv_heads": 2}},
        "attention.num_kv_heads: 2 does not divide num_heads, which is 3 (as many, or a divisor)",
        {"attention": {"num_kv_heads": 3}},
    ),
    "no heads": ({"attention": {"num_heads": 0}}, f"attention.num_heads: 0: {AT_LEAST_1}", {}),
    "a window of 0": (
        {"attention": {**SLIDING, "window_tokens": 0}},
        f"attention.window_tokens: 0: {AT_LEAST_1}",
        {"attention": {**SLIDING, "window_tokens": 1}},
    ),
    "no features": (
        {"attention": {"kind": "performer", "num_features": 0}},
        f"attention.num_features: 0: {AT_LEAST_1}",
        {"attention": {"kind": "performer", "num_features": 1}},
    ),
    "a seed beyond a generator's bits": (
        {"attention": {"kind": "performer", "seed": 2**40}},
        "attention.seed: 1099511627776: Input should be less than 1099511627776",
        {"attention": {"kind": "performer", "seed": 2**40 - 1}},
    ),
    "a soft cap of 0": (
        {"attention": {"soft_cap": 0}},
        "attention.soft_cap: 0: Input should be greater than 0",
        {"attention": {"soft_cap": 0.5}},
    ),
    "an odd rotary width": (
        {"position": {"rotary_dim": 15}},
        "position.rotary_dim: 15 is odd, and dimensions turn in pairs (an even number)",
        {"position": {"rotary_dim": 16}},
    ),
    "an odd rotary width of longrope": (
        {"position": {"kind": "longrope", "rotary_dim": 7}},
        "position.rotary_dim: 7 is odd, and dimensions turn in pairs (an even number)",
        {"position": {"kind": "longrope", "rotary_dim": 8}},
    ),
    "a rotary width above a head's": (
        {"position": {"rotary_dim": 34}},
        "position.rotary_dim: 34 dimensions, and a head has 32 (at most 32, or leave it out)",
        {"position": {"rotary_dim": 32}},
    ),
    "too few factors": (
        {"position": {"kind": "longrope", "long_factors": [1.0, 2.0]}},
        "position.long_factors: 2 factors, and 16 pairs of dimensions turn (one for each pair)",
        {"position": {"kind": "longrope", "long_factors": [1.0, 2.0], "rotary_dim": 4}},
    ),
    "too many factors": (
        {"position": {"kind": "longrope", "short_factors": [*ONES, 2.0]}},
        "position.short_factors: 17 factors, and 16 pairs of dimensions turn (one for each pair)",
        {"position": {"kind": "longrope", "short_factors": ONES}},
    ),
    "a factor of 0": (
        {"position": {"kind": "longrope", "short_factors": [0.0, *ONES[1:]]}},
        "position.short_factors: 0.0 to 1.0 (from 0.001 to 1000; 1 leaves a pair as it is)",
        {"position": {"kind": "longrope", "short_factors": [0.5, *ONES[1:]]}},
    ),
    "a factor that is no number": (
        {"position": {"kind": "longrope", "short_factors": [float("nan"), *ONES[1:]]}},
        "position.short_factors.0: nan: Input should be a finite number",
        {"position": {"kind": "longrope"}},
    ),
    "yarn without the context it stretches": (
        {"position": {"scaling": {"kind": "yarn", "factor": 4.0}}},
        "position.scaling.original_context_tokens: is missing (the context it was trained on)",
        {"position": {"scaling": YARN}},
    ),
    "yarn whose slow pairs are the fast ones": (
        {"position": {"scaling": {**YARN, "slow_turns": 32.0}}},
        "position.scaling.slow_turns: 32 is not below fast_turns, which is 32 (the paper's 1 and 32)",
        {"position": {"scaling": {**YARN, "slow_turns": 31.0}}},
    ),
    "a factor that shortens": (
        {"position": {"scaling": {"kind": "linear", "factor": 0.5}}},
        f"position.scaling.factor: 0.5: {AT_LEAST_1}",
        {"position": {"scaling": {"kind": "linear", "factor": 1}}},
    ),
    "a scaling that there is not": (
        {"position": {"scaling": {"kind": "cubic", "factor": 2}}},
        "position.scaling.kind: 'cubic': Input should be 'linear', 'ntk' or 'yarn'",
        {"position": {"scaling": {"kind": "ntk", "factor": 2}}},
    ),
    "an odd number of buckets": (
        {"position": {"kind": "t5", "num_buckets": 7}},
        "position.num_buckets: 7 is no multiple of 2 (for example 32)",
        {"position": {"kind": "t5", "num_buckets": 6}},
    ),
    "buckets of two directions that halve to an odd number": (
        {"position": {"kind": "t5", "num_buckets": 6, "bidirectional": True}},
        "position.num_buckets: 6 is no multiple of 4 (for example 32)",
        {"position": {"kind": "t5", "num_buckets": 8, "bidirectional": True}},
    ),
    "buckets that end before they begin to widen": (
        {"position": {"kind": "t5", "max_distance": 16}},
        "position.max_distance: 16 is not above the 16 distances with a bucket each"
        " (for example four times num_buckets)",
        {"position": {"kind": "t5", "max_distance": 17}},
    ),
    "a context past a table of positions": (
        {"position": {"kind": "learned", "max_tokens": 32}},
        "position.max_tokens: 32 positions, and a context of 256 tokens (as many as context_tokens, or leave it out)",
        {"position": {"kind": "learned"}},
    ),
    "more experts than there are": (
        {"feedforward": {"kind": "moe", "num_experts": 4, "experts_per_token": 5}},
        "feedforward.experts_per_token: 5, and there are 4 experts (at most num_experts)",
        {"feedforward": {"kind": "moe", "num_experts": 4, "experts_per_token": 4}},
    ),
    "a norm without an eps": (
        {"norm": {"eps": 0}},
        "norm.eps: 0: Input should be greater than 0",
        {"norm": {"eps": 1e-5}},
    ),
    "a kind that cannot be causal in a decoder": (
        {"attention": "cross"},
        "attention.kind: cross reads a source, and a decoder has none (gqa, or another kind that reads its own text)",
        {"attention": "gqa"},
    ),
    "a prefix beyond a window": (
        {"attention": SLIDING, "mask": "prefix"},
        "mask: attention sliding cannot keep the mask prefix (sliding keeps causal, document, padding)",
        {"attention": SLIDING, "mask": "document"},
    ),
    "documents in a sum": (
        {"attention": "linear", "mask": ["causal", "document"]},
        "mask: attention linear cannot keep the mask document (linear keeps causal, padding)",
        {"attention": "linear", "mask": "causal"},
    ),
    "a mask that one layer of a pattern cannot keep": (
        {"mask": "prefix", "blocks": [{"repeat": 2}, {"attention": SLIDING}]},
        "mask: blocks.1.attention sliding cannot keep the mask prefix (sliding keeps causal, document, padding)",
        {"mask": "document", "blocks": [{"repeat": 2}, {"attention": SLIDING}]},
    ),
    "distances without scores": (
        {"attention": "linear", "position": "alibi"},
        "position.kind: alibi is added to scores, and attention linear has none (rope, learned, sinusoidal or none)",
        {"attention": "linear", "position": "rope"},
    ),
    "distances without scores in one layer of a pattern": (
        {"position": "t5", "blocks": [{}, {"attention": "performer"}]},
        "position.kind: t5 is added to scores, and blocks.1.attention performer has none"
        " (rope, learned, sinusoidal or none)",
        {"position": "t5", "blocks": [{}, {"attention": SLIDING}]},
    ),
    "layers that do not divide into blocks": (
        {"layers_per_block": 2},
        "layers_per_block: 2 does not divide num_layers, which is 3 (a divisor of num_layers)",
        {"layers_per_block": 2, "num_layers": 4},
    ),
    "value embeddings of two widths": (
        {"embedding": "value", "blocks": [{}, {"attention": {"num_kv_heads": 3}}]},
        "embedding.kind: blocks.1.attention has other num_kv_heads, and the value embeddings of all layers are of one"
        " width (one num_kv_heads, or embedding: token)",
        {"embedding": "token", "blocks": [{}, {"attention": {"num_kv_heads": 3}}]},
    ),
    "more tables than layers have use for": (
        {"embedding": {"kind": "value", "num_tables": 3}},
        "embedding.num_tables: 3 tables, and 3 layers have use for 2 (at most 2)",
        {"embedding": {"kind": "value", "num_tables": 2}},
    ),
    "layers with other heads": (
        {"blocks": [{"attention": {"num_heads": 1}}]},
        "blocks.0.attention.num_heads: 1 heads of 96, where the spec's attention has 3 of 32"
        " (the same heads in all layers; num_kv_heads may differ)",
        {"blocks": [{"attention": {"num_kv_heads": 3}}]},
    ),
    "an unknown kind in a pattern": (
        {"blocks": [{}, {"attention": "slidding"}]},
        "blocks.1.attention.kind: no kind 'slidding' (did you mean 'sliding'?)",
        {"blocks": [{}, {"attention": "sliding"}]},
    ),
    "a window of 0 in a pattern": (
        {"blocks": [{"attention": {**SLIDING, "window_tokens": 0}}]},
        f"blocks.0.attention.window_tokens: 0: {AT_LEAST_1}",
        {"blocks": [{"attention": SLIDING}]},
    ),
    "an unknown setting in a pattern": (
        {"blocks": [{"norm": {"espilon": 1e-5}}]},
        "blocks.0.norm.espilon: unknown key (known: eps, kind)",
        {"blocks": [{"norm": {"eps": 1e-5}}]},
    ),
    "cross-attention in a pattern": (
        {"blocks": [{"repeat": 2}, {"attention": "cross"}]},
        "blocks.1.attention.kind: cross reads a source, and a decoder has none"
        " (gqa, or another kind that reads its own text)",
        {"blocks": [{"repeat": 2}, {"attention": "gqa"}]},
    ),
    "a head in a pattern": (
        {"blocks": [{"head": "logits"}]},
        "model.blocks.0.head: unknown key (known: attention, feedforward, norm, norm_placement, position, repeat)",
        {"head": "logits"},
    ),
    "learned positions in a pattern": (
        {"blocks": [{}, {"position": "learned"}]},
        "blocks.1.position.kind: learned is one for all layers"
        " (rope, longrope, alibi or none; or the same as the spec's)",
        {"position": "learned", "blocks": [{}, {"position": "none"}]},
    ),
    "a prefix that causality takes away": (
        {"mask": ["causal", "prefix"]},
        "mask: causal beside prefix, of which it leaves nothing (one of them: after the prefix, prefix is causal too)",
        {"mask": ["document", "prefix"]},
    ),
    "an unknown mask": (
        {"mask": ["casual"]},
        "mask.kind: no kind 'casual' (did you mean 'causal'?)",
        {"mask": ["causal"]},
    ),
    "a mask that is none": ({"mask": 3}, "mask: 3 names no kind (for example {kind: causal})", {"mask": []}),
    "an unknown placement of norms": (
        {"norm_placement": "between"},
        "model.norm_placement: 'between': Input should be 'before', 'after', 'around' or 'output'",
        {"norm_placement": "around"},
    ),
    "an unknown model": (
        {"model": "encoder"},
        "model.model: no kind 'encoder' (did you mean 'decoder'?)",
        {"model": "decoder"},
    ),
}
every_refusal = pytest.mark.parametrize(("fields", "told", "mended"), REFUSED.values(), ids=REFUSED.keys())


@every_refusal
def test_a_part_that_does_not_fit_is_refused_by_name_and_the_remedy_helps(fields, told, mended):
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.preset("nano", **fields)
    assert str(caught.value) == told
    with torch.device("meta"):
        ulm.build(ulm.ModelSpec.preset("nano", **mended))


@pytest.fixture
def on_the_command_line(monkeypatch, capsys, tmp_path):
    """Runs `ulm show` on a spec in this process; its exit code, stdout and stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(console.err, "width", 80)  # a narrow terminal does not break the line

    def show(fields: dict[str, Any]) -> tuple[int, str, str]:
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"preset": "nano", **fields}), encoding="utf-8")
        code = console.run(lambda: app(["show", str(path)]))
        return code, *capsys.readouterr()

    yield show
    signal.signal(signal.SIGTERM, handler)


@every_refusal
def test_on_the_command_line_it_is_one_line_and_exit_code_2(fields, told, mended, on_the_command_line):
    assert on_the_command_line(fields) == (2, "", f"error {told}\n")


def test_the_process_itself_ends_with_2_and_no_traceback(tmp_path):
    (tmp_path / "model.yaml").write_text("preset: nano\nattention: {kind: sliding, window_tokens: 0}\n")
    command = [sys.executable, "-m", "ulm.cli.main", "show", str(tmp_path / "model.yaml")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error attention.window_tokens: 0: {AT_LEAST_1}\n"


# ---- lengths, which are known at the call

CONTEXT = 40
LONG_ROWS = "41 tokens a row, and the model's context is 40: shorter rows, or a larger context_tokens in the spec"
LONG_STEP = "the cache holds 40 tokens a row, and a row would have 41: a larger max_tokens for new_cache, up to the"
WIDE_CACHE = (
    "a cache of 41 tokens a row, of a context of 40: a smaller max_tokens for new_cache, or a larger context_tokens"
)


@pytest.mark.parametrize("kind", ulm.kinds("position"))
def test_a_text_past_the_positions_is_refused_before_anything_is_looked_up(kind):
    model = ulm.build(ulm.ModelSpec.preset("nano", vocab_size=97, context_tokens=CONTEXT, position=kind), seed=0)
    tokens_BT = torch.zeros(1, CONTEXT + 1, dtype=torch.long)
    with pytest.raises(ContextLengthError) as caught:
        model(tokens_BT)
    assert str(caught.value) == LONG_ROWS
    cache = model.new_cache(1)
    model.step(tokens_BT[:, :CONTEXT], cache)
    with pytest.raises(ContextLengthError) as caught:
        model.step(tokens_BT[:, :1], cache)
    assert str(caught.value).startswith(LONG_STEP)
    with pytest.raises(ContextLengthError) as caught:
        model.step(tokens_BT[:, :1], model.new_cache(1, CONTEXT + 1))
    assert str(caught.value).startswith(WIDE_CACHE)
