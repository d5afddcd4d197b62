"""Parameters and FLOPs equal counts made by hand."""

from __future__ import annotations

import ulm
from ulm.models.account import num_parameters, train_flops_per_token

# nano: q and out 96 x 96, k and v 96 x 32, three matrices 96 x 256, two norms of 96
LAYER = 2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 256 + 2 * 96
FINAL_NORM = 96


def built(**fields):
    return ulm.build(ulm.ModelSpec.preset("nano", **fields))


def test_nano_has_the_parameters_of_a_hand_count():
    assert num_parameters(built()) == 3 * LAYER + 8192 * 96 + FINAL_NORM == 1_082_016


def test_padding_rows_are_not_counted_and_an_untied_head_is():
    assert num_parameters(built(vocab_size=97)) == 3 * LAYER + 97 * 96 + FINAL_NORM == 304_896
    untied = built(vocab_size=97, embedding={"tied": False})
    assert num_parameters(untied) == 3 * LAYER + 2 * 97 * 96 + FINAL_NORM == 314_208


def test_a_matrix_as_tall_as_the_padded_vocabulary_is_counted_whole():
    model = built(vocab_size=97, feedforward={"d_hidden": 128})  # 97 is padded to 128
    layer = 2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 128 + 2 * 96
    assert num_parameters(model) == 3 * layer + 97 * 96 + FINAL_NORM == 194_304


def test_flops_are_six_per_number_in_matrices_and_head_plus_causal_attention():
    matrices = 3 * (LAYER - 2 * 96) + 97 * 96
    attention = 12 * 3 * (3 * 32) * 256 / 2
    assert 6 * matrices + attention == 2_267_712
    assert train_flops_per_token(built(vocab_size=97), 256) == 2_267_712
    assert train_flops_per_token(built(vocab_size=97, embedding={"tied": False}), 256) == 2_267_712
