"""The whole decoder equals NumPy, and decoding with a cache equals one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.variants import every_variant, model_of, tokens
from ulm.errors import ContextLengthError
from ulm.reference.model import decoder

FLOAT64 = {"rtol": 0.0, "atol": 5e-6}  # cosines and sines of the positions are float32 also in a float64 model
FLOAT32 = {"rtol": 0.0, "atol": 1e-4}  # sums of 96 to 256 products in float32 over three layers, logits up to 10
FLOAT32_ORDER = {"rtol": 0.0, "atol": 1e-4}  # the same products, summed in blocks of other widths
SEGMENTS_BT = torch.tensor([[-1] * 3 + [0] * 9 + [1] * 7, [0] * 5 + [1] * 2 + [2] * 8 + [-1] * 4])


def by_the_book(model: torch.nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    weights = {name: w.numpy() for name, w in model.state_dict().items()}
    tokens_BT, *places = (x.numpy() for x in inputs)
    return decoder(tokens_BT, weights, model.spec.model_dump(mode="json"), *places)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_logits_of_the_whole_decoder_equal_the_reference(overrides, dtype):
    model = model_of(overrides).to(dtype)
    tokens_BT = tokens(2, 19)
    expected = by_the_book(model, tokens_BT)
    assert expected.std() > 0.5
    np.testing.assert_allclose(model(tokens_BT).detach(), expected, **(FLOAT64 if dtype is torch.float64 else FLOAT32))


@every_variant
def test_with_padding_on_both_sides_several_texts_and_a_prefix_the_logits_of_tokens_equal_the_reference(overrides):
    model = model_of(overrides).double()
    inputs = (tokens(2, 19), SEGMENTS_BT, torch.tensor([4, 2]))
    is_token_BT = SEGMENTS_BT.numpy() >= 0
    expected = by_the_book(model, *inputs)
    found = model(*inputs).detach().numpy()
    np.testing.assert_allclose(found[is_token_BT], expected[is_token_BT], **FLOAT64)


@every_variant
def test_ragged_rows_decoded_in_padded_blocks_equal_one_pass(overrides):
    model = model_of(overrides)
    tokens_BT = tokens(3, 21)
    blocks = [[9, 3, 1], [0, 5, 2], [4, 1, 0], [1, 1, 1], [1, 0, 1]]  # new tokens of each row, block by block
    cache, seen, got = model.new_cache(batch=3), [0, 0, 0], [[], [], []]
    for num_new in blocks:
        block = torch.full((3, max(num_new)), 96)  # padding is a token like any other: nothing may depend on it
        for row, num in enumerate(num_new):
            block[row, :num] = tokens_BT[row, seen[row] : seen[row] + num]
        logits_BTV = model.step(block, cache, torch.tensor(num_new))
        for row, num in enumerate(num_new):
            got[row].append(logits_BTV[row, :num])
            seen[row] += num
    assert cache.lengths_B.tolist() == seen == [15, 10, 5]
    one_pass = model(tokens_BT).detach()
    for row, length in enumerate(seen):
        np.testing.assert_allclose(torch.cat(got[row]), one_pass[row, :length], **FLOAT32_ORDER)


def test_a_row_copied_or_cut_back_continues_as_if_it_had_been_read_anew():
    model, tokens_BT = model_of({"num_layers": 3}), tokens(2, 12)
    cache = model.new_cache(batch=2)
    model.step(tokens_BT, cache)
    cache.copy_row(0, 1)
    cache.truncate(1, 7)
    assert cache.lengths_B.tolist() == [12, 7]
    following = tokens(2, 3)
    logits_BTV = model.step(following, cache)
    for row, known in enumerate((12, 7)):
        whole = torch.cat([tokens_BT[0, :known], following[row]])[None]
        np.testing.assert_allclose(logits_BTV[row], model(whole)[0, known:].detach(), **FLOAT32_ORDER)


def test_a_cache_holds_the_whole_context_and_its_size_is_what_it_says():
    model = model_of({"num_layers": 3})
    cache, tokens_BT = model.new_cache(batch=1), tokens(1, 40)
    assert cache.max_tokens == 40
    assert cache.nbytes == 3 * 2 * 41 * 1 * 32 * 4  # layers, keys and values, slots and the bin, heads, width, bytes
    model.step(tokens_BT[:, :39], cache)
    last = model.step(tokens_BT[:, 39:], cache)
    np.testing.assert_allclose(last[0, 0], model(tokens_BT)[0, 39].detach(), **FLOAT32_ORDER)
    with pytest.raises(ContextLengthError, match="holds 40 tokens a row, and a row would have 41"):
        model.step(tokens_BT[:, :1], cache)
    assert cache.lengths_B.tolist() == [40]
