"""Our decoder computes the logits of transformers' GPT-2, Llama, Qwen3, Gemma-2, Phi-3 and Bloom from their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.numerics._stock import VOCAB_SIZE, ours
from tests.numerics._stock_models import LONGER, ORIGINAL_TOKENS, STOCK, pair

RELATIVE = 1e-4  # of the largest logit: the bound asked for; sums in another order make 1e-6 to 5e-6 in float32
FLOOR = 0.5  # of the logits' standard deviation: below it models agree on anything
LOOKING = 2.0  # times the share of uniform attention that the favourite key has, on average
NO_TIE = 1e-3  # between the two best logits of every greedy choice, a hundred times what the sums' order moves
NUM_LEFT, NUM_NEW = 7, 24  # tokens of padding; tokens to decode
PROMPT_TOKENS = (20, 13)  # the longer one beyond longrope's first context, so that the long factors hold from the start

every_stock = pytest.mark.parametrize("name", STOCK)


def texts(num_tokens: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, num_tokens), generator=torch.Generator().manual_seed(6))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude; NaN where a logit is, and that is below no bound."""
    assert found.shape == expected.shape
    assert expected.std() > FLOOR
    return ((found - expected).abs().max() / expected.abs().max()).item()


@every_stock
@torch.no_grad()
def test_the_same_weights_give_the_logits_of_transformers(name):
    theirs, model = pair(name)
    tokens_BT = texts(STOCK[name].text_tokens)
    expected = theirs(tokens_BT, output_attentions=True)
    for shares_BHTS in expected.attentions:
        favourite = shares_BHTS[:, :, -1].amax(-1).mean() * (shares_BHTS[:, :, -1] > 0).sum(-1).float().mean()
        assert favourite > LOOKING
    assert relative_error(model(tokens_BT), expected.logits) < RELATIVE


@every_stock
@torch.no_grad()
def test_a_row_with_padding_on_the_left_has_the_logits_of_transformers(name):
    theirs, model = pair(name)
    tokens_BT = texts(STOCK[name].text_tokens)
    is_token_BT = torch.ones_like(tokens_BT)
    is_token_BT[1, :NUM_LEFT] = 0
    positions_BT = (is_token_BT.cumsum(-1) - 1).clamp_min(0)
    expected = theirs(tokens_BT, attention_mask=is_token_BT, position_ids=positions_BT).logits
    found = model(tokens_BT, is_token_BT - 1)  # the one text of each row is 0, padding -1
    assert relative_error(found[is_token_BT == 1], expected[is_token_BT == 1]) < RELATIVE
    assert relative_error(model(tokens_BT)[1, NUM_LEFT:], expected[1, NUM_LEFT:]) > RELATIVE  # padding is not read


def greedy(model: Any, prompts: list[Tensor]) -> Tensor:
    """The logits of NUM_NEW greedy choices of each row, each token read once and kept in the cache."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    model_cache = model.new_cache(batch=len(prompts))
    block_BT = pad_sequence(prompts, batch_first=True)
    last_BV = model.step(block_BT, model_cache, lengths_B)[torch.arange(len(prompts)), lengths_B - 1]
    found = [last_BV]
    for _ in range(NUM_NEW - 1):
        last_BV = model.step(last_BV.argmax(-1)[:, None], model_cache)[:, 0]
        found.append(last_BV)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", [name for name, stock in STOCK.items() if stock.decodes])
@torch.no_grad()
def test_greedy_decoding_with_both_caches_gives_the_same_tokens_and_logits(name):
    theirs, model = pair(name)
    prompts = [row[:length] for row, length in zip(texts(max(PROMPT_TOKENS)), PROMPT_TOKENS, strict=True)]
    expected = theirs.generate(
        pad_sequence(prompts, batch_first=True, padding_side="left"),
        attention_mask=pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert expected.past_key_values.get_seq_length() == max(PROMPT_TOKENS) + NUM_NEW - 1
    tokens_BT = expected.sequences[:, max(PROMPT_TOKENS) :]
    assert min(len(row.unique()) for row in tokens_BT) > NUM_NEW // 8  # no text of one token over and over
    logits_BTV = greedy(model, prompts)
    first, second = logits_BTV.topk(2).values.unbind(-1)
    assert (first - second).min() > NO_TIE
    assert logits_BTV.argmax(-1).tolist() == tokens_BT.tolist()
    assert relative_error(logits_BTV, torch.stack(expected.logits, dim=1)) < RELATIVE


# One setting of ours that is not theirs. The two forms of GELU part least, by 2 to 3e-4 of the largest logit.
DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "GELU exact": ("GPT-2", {"feedforward": {"approximate": False}}),
    "norm's eps": ("GPT-2", {"norm": {"eps": 1e-2}}),
    "theta": ("Llama", {"position": {"theta": 2_000.0}}),
    "no linear scaling": ("Llama, linear", {"position": {"scaling": None}}),
    "NTK of another factor": ("Llama, NTK", {"position": {"scaling": {"kind": "ntk", "factor": 3.0}}}),
    "linear for NTK": ("Llama, NTK", {"position": {"scaling": {"kind": "linear", "factor": 4.0}}}),
    "YaRN's slow pairs": (
        "Llama, YaRN",
        {
            "position": {
                "scaling": {
                    "kind": "yarn",
                    "factor": LONGER,
                    "original_context_tokens": ORIGINAL_TOKENS,
                    "slow_turns": 0.2,
                    "fast_turns": 0.201,
                }
            }
        },
    ),
    "Qwen3's theta": ("Qwen3", {"position": {"theta": 10_000.0}}),
    "window of 7": ("Gemma-2", {"blocks": [{"attention": {"kind": "sliding", "window_tokens": 7}}, {}]}),
    "no window": ("Gemma-2", {"blocks": []}),
    "full attention first": ("Gemma-2", {"blocks": [{}, {"attention": {"kind": "sliding", "window_tokens": 6}}]}),
    "no soft cap of scores": ("Gemma-2", {"attention": {"soft_cap": None}}),
    "higher cap of logits": ("Gemma-2", {"head": {"cap": 6.0}}),
    "embedding as it is": ("Gemma-2", {"embedding": {"scaled": False}}),
    "GEGLU exact": ("Gemma-2", {"feedforward": {"approximate": False}}),
    "SwiGLU": ("Gemma-2", {"feedforward": {"kind": "swiglu", "d_hidden": 160}}),
    "no factors": ("Phi-3, long", {"position": {"long_factors": None}}),
    "first tokens kept": ("Phi-3, long", {"position": {"keep_first_tokens": 4}}),
    "no attention factor": ("Phi-3, long", {"position": {"attention_factor": 1.0}}),
    "all dimensions turn": (
        "Phi-3, long in part",
        {"position": {"rotary_dim": None, "short_factors": None, "long_factors": [1.0 + n for n in range(16)]}},
    ),
    "long factors": ("Phi-3, short", {"position": {"original_context_tokens": ORIGINAL_TOKENS - 1}}),
    "no distances": ("Bloom", {"position": "none"}),
    "Bloom's GELU exact": ("Bloom", {"feedforward": {"approximate": False}}),
}


@pytest.mark.parametrize("change", DIFFERENT)
@torch.no_grad()
def test_one_setting_that_is_not_theirs_shows_in_the_logits(change):
    name, differing = DIFFERENT[change]
    (theirs, _), stock = pair(name), STOCK[name]
    spec = dict(stock.spec)
    for slot, fields in differing.items():
        below, is_same_kind = spec[slot], isinstance(fields, dict) and "kind" not in fields
        below = {"kind": below} if isinstance(below, str) else below
        spec[slot] = {**below, **fields} if is_same_kind else fields
    model = ours(stock, spec, theirs)
    tokens_BT = texts(stock.text_tokens)
    assert relative_error(model(tokens_BT), theirs(tokens_BT).logits) > RELATIVE
