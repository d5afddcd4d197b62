"""Mixtures in probability space, exact."""

import math

import pytest
import torch

from ulm.swarm.mixture import mix_logprobs


def logprobs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=dtype) * 4).log_softmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_one_on_an_expert_gives_its_logprobs_bit_for_bit(dtype):
    logprobs_NV = logprobs(3, 997, dtype=dtype)
    mixed_V = mix_logprobs(logprobs_NV, torch.tensor([0.0, 1.0, 0.0]))
    assert mixed_V.dtype == dtype
    assert torch.equal(mixed_V, logprobs_NV[1])


def test_a_mixture_is_the_weighted_sum_of_probabilities():
    logprobs_NV = logprobs(2, 50, dtype=torch.float64)
    mixed_V = mix_logprobs(logprobs_NV, torch.tensor([0.3, 0.7], dtype=torch.float64))
    for v in range(50):
        naive = 0.3 * math.exp(logprobs_NV[0, v]) + 0.7 * math.exp(logprobs_NV[1, v])
        assert math.exp(mixed_V[v]) == pytest.approx(naive, rel=1e-12)  # float64 sums
    assert float(mixed_V.exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_weight_zero_counts_for_nothing_whatever_the_expert_says(broken):
    logprobs_NV = logprobs(3, 20)
    expected_V = mix_logprobs(logprobs_NV[:2], torch.tensor([0.25, 0.75]))
    logprobs_NV[2] = broken
    assert torch.equal(mix_logprobs(logprobs_NV, torch.tensor([0.25, 0.75, 0.0])), expected_V)


def test_a_token_that_one_expert_excludes_keeps_the_others_share():
    logprobs_NV = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    mixed_V = mix_logprobs(logprobs_NV, torch.tensor([0.25, 0.75]))
    assert mixed_V.exp().tolist() == pytest.approx([0.25, 0.75])


def test_a_batch_of_mixtures_equals_one_at_a_time():
    logprobs_BNV, weight_BN = logprobs(5, 3, 40), torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    mixed_BV = mix_logprobs(logprobs_BNV, weight_BN)
    for b in range(5):
        assert torch.equal(mixed_BV[b], mix_logprobs(logprobs_BNV[b], weight_BN[b]))


def test_half_precision_is_mixed_in_float32():
    assert mix_logprobs(logprobs(2, 8).bfloat16(), torch.tensor([0.5, 0.5])).dtype == torch.float32
