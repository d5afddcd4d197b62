"""One row's next token: every setting against its own formula in NumPy, the draw, ties, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from typer.testing import CliRunner

import ulm
from ulm.checkpoints import store
from ulm.cli import console
from ulm.cli.main import app
from ulm.errors import RequestError
from ulm.models.generate import generate
from ulm.models.sampling import MAX_SEED, Sampling, choose, mass_bits, uniforms
from ulm.tokenizers.byte import byte_tokenizer

VOCAB_SIZE = 60
PROMPT, GENERATED = (3, 4, 4, 7), (9, 4, 9, 9)
# A right sampler fails this once in ten thousand tries; the seeds are fixed, so it fails always or never.
MIN_P_VALUE = 1e-4
# A draw may fall to another token only this near to the border between two: the grid's steps, summed.
MAX_BORDER = 1e-9

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.7, "temperature": 1.5},
    {"min_p": 0.05, "top_p": 0.8, "temperature": 2.0},
    {"min_p": 0.1, "top_k": 7, "top_p": 0.9},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    {"logit_bias": {5: 3.0, 9: -4.0}},
    {"logit_bias": {9: 2.5, 3: -1.0}, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logit_bias": {9: 2.5}, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "top_k": 9, "temperature": 0.7},
]


def logits(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def distribution(logits_V: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Probabilities by the formulas, token by token."""
    scores = [float(score) for score in logits_V]
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in {*PROMPT, *GENERATED}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in range(len(scores)):
        count = GENERATED.count(token)
        scores[token] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    weights = np.exp((np.array(scores) - max(scores)) / sampling.temperature)
    p = weights / weights.sum()
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    order = np.argsort(-p)
    if sampling.top_k is not None:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        num_kept = int(np.argmax(p[order].cumsum() >= sampling.top_p)) + 1
        p[order[num_kept:]] = 0
    return p / p.sum()


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_draw_inverts_the_distribution_that_the_settings_formulas_give(fields: dict[str, Any]) -> None:
    for seed in range(40):
        sampling = Sampling(**{"temperature": 1.0, "seed": seed, **fields})
        logits_V = logits(seed)
        below_V = distribution(logits_V, sampling).cumsum()
        drawn = float(np.random.Generator(np.random.Philox(key=seed, counter=4)).random())
        token = choose(logits_V, sampling, 4, PROMPT, GENERATED)
        assert np.abs(below_V - drawn).min() > MAX_BORDER
        assert token == int(np.searchsorted(below_V, drawn, side="right"))


@pytest.mark.parametrize("fields", [SETTINGS[1], SETTINGS[6], SETTINGS[7], SETTINGS[15]], ids=str)
def test_frequencies_of_draws_follow_the_distribution(fields: dict[str, Any]) -> None:
    num_draws, logits_V = 4_000, logits(3)
    sampling = Sampling(**{"temperature": 1.0, "seed": 11, **fields})
    tokens = [choose(logits_V, sampling, index, PROMPT, GENERATED) for index in range(num_draws)]
    expected = num_draws * distribution(logits_V, sampling)
    found = np.bincount(tokens, minlength=VOCAB_SIZE)
    assert (found[expected == 0] == 0).all()
    common = expected >= 5  # the test's own condition; the rest counts as one
    observed = [*found[common], found[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
        wanted = list(np.array(wanted) * sum(observed) / sum(wanted))
    assert len(wanted) > 3
    assert chisquare(observed, wanted).pvalue > MIN_P_VALUE


def test_tokens_are_drawn_in_order_of_their_ids() -> None:
    sampling, logits_V = Sampling(temperature=1.0, seed=5), logits()
    pairs = sorted((uniforms(5, index)[0], choose(logits_V, sampling, index)) for index in range(300))
    tokens = [token for _, token in pairs]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > 10


def test_random_numbers_of_an_answer_are_the_same_from_wherever_one_begins() -> None:
    alone = [uniforms(7, index)[0] for index in range(40)]
    assert uniforms(7, 0, 40) == alone
    assert uniforms(7, 13, 20) == alone[13:33]
    assert alone[3] == float(np.random.Generator(np.random.Philox(key=7, counter=3)).random())


def chosen(scores: Sequence[float], num: int = 200, **fields: Any) -> set[int]:
    sampling = Sampling(**fields)
    return {choose(torch.tensor(scores), sampling, index, PROMPT, GENERATED) for index in range(num)}


def test_the_first_of_equal_scores_wins_greedily_and_all_of_them_stay_at_a_cuts_edge() -> None:
    scores = [0.0, 2.0, 1.0, 2.0, 2.0, 1.0]
    assert chosen(scores) == {1}
    assert chosen(scores, temperature=1.0, top_k=1) == {1, 3, 4}
    assert chosen(scores, temperature=1.0, top_k=4) == {1, 2, 3, 4, 5}
    assert chosen(scores, temperature=1.0, top_p=0.1) == {1, 3, 4}  # one of them has 0.26
    assert chosen(scores, temperature=1.0, top_p=0.9) == {1, 2, 3, 4, 5}  # three have 0.77, four 0.86
    assert chosen(scores, temperature=1.0, min_p=1.0) == {1, 3, 4}


def test_the_likeliest_tokens_are_kept_at_any_temperature() -> None:
    assert chosen([1e4, -1e4, 0.0], temperature=1e-300, top_p=1e-9) == {0}
    assert chosen([-math.inf, 5.0, -math.inf], temperature=100.0) == {1}
    assert len(chosen([3.0, 1.0, 2.0], temperature=100.0)) == 3


def test_top_p_looks_at_what_top_k_and_min_p_leave() -> None:
    scores = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert chosen(scores, temperature=1.0, top_p=0.65) == {0, 1}
    assert chosen(scores, temperature=1.0, top_k=2, top_p=0.55) == {0}  # 0.4 of 0.7 is 0.57
    assert chosen(scores, temperature=1.0, min_p=0.6, top_p=0.55) == {0}


def test_min_p_looks_at_the_distribution_after_the_temperature() -> None:
    scores = [math.log(p) for p in (0.8, 0.2)]
    assert chosen(scores, temperature=1.0, min_p=0.3) == {0}
    assert chosen(scores, temperature=3.0, min_p=0.3) == {0, 1}  # 0.25 ** (1 / 3) is 0.63


def test_a_bias_comes_before_the_repetition_penalty_which_pushes_scores_of_either_sign_down() -> None:
    def best(first: float, third: float, **fields: Any) -> set[int]:  # of tokens 0 and 3; only 3 is in the prompt
        return chosen([first, -50.0, -50.0, third, *[-50.0] * 6], num=1, **fields)

    assert best(1.6, 1.0, repetition_penalty=2.0, logit_bias={3: 2.0}) == {0}  # (1 + 2) / 2, not 1 / 2 + 2
    assert best(1.4, 1.0, repetition_penalty=2.0, logit_bias={3: 2.0}) == {3}
    assert best(-1.5, -1.0, repetition_penalty=1.4) == {3}
    assert best(-1.5, -1.0, repetition_penalty=1.6) == {0}
    assert best(1.5, 2.0, repetition_penalty=1.3) == {3}
    assert best(1.5, 2.0, repetition_penalty=1.4) == {0}


def test_presence_counts_a_token_of_the_answer_once_and_frequency_each_time() -> None:
    scores = [0.0] * 10  # of the answer, 9 is there three times, 4 once; of the prompt alone, 3
    scores[9], scores[4], scores[3] = 2.9, 2.0, 1.6
    assert chosen(scores, num=1, presence_penalty=0.8) == {9}
    assert chosen(scores, num=1, presence_penalty=1.4) == {3}
    assert chosen(scores, num=1, frequency_penalty=0.3) == {9}
    assert chosen(scores, num=1, frequency_penalty=0.44) == {3}


def test_a_bias_can_forbid_a_token_or_force_it() -> None:
    scores = logits().tolist()
    best = int(np.argmax(scores))
    assert best not in chosen(scores, temperature=1.0, logit_bias={best: -100})
    assert chosen(scores, temperature=1.0, logit_bias={17: 100}) == {17}


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 8_192, 262_144])
def test_masses_of_a_whole_vocabulary_add_up_exactly_in_any_order(vocab_size: int) -> None:
    assert vocab_size * 2 ** mass_bits(vocab_size) < 2**53
    scores_V = logits(vocab_size=vocab_size).double()
    mass_V = ((scores_V - scores_V.max()).exp() * 2.0 ** mass_bits(vocab_size)).round()
    exact = sum(int(mass) for mass in mass_V.tolist())
    assert float(mass_V.sum()) == float(mass_V.cumsum(-1)[-1]) == float(mass_V.flip(-1).cumsum(-1)[-1]) == exact


def test_a_bias_is_the_same_as_a_mapping_or_as_pairs_in_any_order() -> None:
    pairs = Sampling(logit_bias=((7, 1.0), (2, -3.0)))
    mapping = Sampling.model_validate({"logit_bias": {"2": -3, "7": 1}})  # JSON's keys are texts
    assert pairs == mapping and hash(pairs) == hash(mapping)
    assert Sampling.model_validate_json(pairs.model_dump_json()) == pairs


REFUSED = [
    ({"temperature": 0, "top_k": 40}, "top_k", "top_k: 40 has no effect at temperature 0.*(set a temperature above 0"),
    ({"min_p": 0.1}, "min_p", "min_p: 0.1 has no effect at temperature 0.*leave min_p out"),
    ({"temperature": -1}, "temperature", "temperature: -1: Input should be greater than or equal to 0"),
    ({"temperature": math.nan}, "temperature", "temperature: nan: Input should be a finite number"),
    ({"temperature": 1, "top_p": 0}, "top_p", "top_p: 0: .*greater than 0"),
    ({"temperature": 1, "min_p": 1.5}, "min_p", "min_p: 1.5: .*less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty: 0: .*greater than or equal to 0.01"),
    ({"repetition_penalty": math.inf}, "repetition_penalty", "repetition_penalty: inf: .*finite"),
    ({"presence_penalty": 2.1}, "presence_penalty", "presence_penalty: 2.1: .*less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty: -3: .*greater than or equal to -2"),
    ({"logit_bias": {5: 101}}, "logit_bias", "logit_bias.0.1: 101: .*less than or equal to 100"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "logit_bias.0.0: 'the': .*valid integer"),
    ({"logit_bias": {-1: 1}}, "logit_bias", "logit_bias.0.0: -1: .*greater than or equal to 0"),
    ({"logit_bias": [(4, 1), (5, 1), (4, 2)]}, "logit_bias", "logit_bias: token 4 has 2 biases (give it one)"),
    ({"seed": -1}, "seed", "seed: -1: .*greater than or equal to 0"),
    ({"topp": 0.5}, "topp", "topp: unknown key (did you mean 'top_p'?)"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_and_contradictory_settings_are_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    with pytest.raises(RequestError, match=f"^{pattern}") as refused:
        Sampling(**fields)
    assert refused.value.param == param


def test_temperature_0_takes_the_top_p_that_clients_send_beside_it() -> None:
    assert chosen([0.0, 2.0, 1.0], temperature=0, top_p=0.9, top_k=1) == {1}


def test_a_bias_of_a_token_that_the_vocabulary_lacks_is_refused() -> None:
    Sampling(logit_bias={299: 1}).check(300)
    with pytest.raises(RequestError, match=r"logit_bias: there is no token 300: the vocabulary has 300 \(.* 0 to 299"):
        Sampling(logit_bias={2: 1, 300: 1}).check(300)


def test_each_choice_has_the_next_seed_and_the_last_seed_is_followed_by_the_first() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.5, seed=4)
    assert sampling.choice(0) == sampling
    assert sampling.choice(3) == Sampling(temperature=1.0, top_p=0.5, seed=7)
    assert Sampling(seed=MAX_SEED).choice(2).seed == 1


@pytest.mark.parametrize("fields", [SETTINGS[8], SETTINGS[15], SETTINGS[16]], ids=str)
def test_generate_takes_every_setting_and_chooses_by_it(nano: Any, fields: dict[str, Any]) -> None:
    model, tokenizer = nano(vocab_size=257), byte_tokenizer()
    given = {"temperature": 1.0, "seed": 2, **fields}
    result = generate(model, tokenizer, "some", max_tokens=20, **given)
    prompt = [tokenizer.eot_id, *tokenizer.encode("some")]
    with torch.no_grad():
        for index, token in enumerate(result.tokens):
            logits_V = model(torch.tensor([[*prompt, *result.tokens[:index]]]))[0, -1]
            assert token == choose(logits_V, Sampling(**given), index, prompt, result.tokens[:index])
            assert result.logprobs[index] == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=1e-4)
    assert len(result.tokens) > 3
    assert result.tokens != generate(model, tokenizer, "some", max_tokens=20, temperature=1.0, seed=2).tokens


def test_generate_refuses_a_bias_outside_of_the_models_vocabulary(nano: Any) -> None:
    with pytest.raises(RequestError, match="there is no token 257"):
        generate(nano(vocab_size=257), byte_tokenizer(), "some", logit_bias={257: 1})


def test_the_verb_generate_takes_every_setting_and_refuses_contradictions_as_usage(
    nano: Any, root: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, path = nano(vocab_size=257), byte_tokenizer(), root / "models" / "small"
    store.save(model, tokenizer, path)
    words = [
        "generate",
        str(path),
        "some",
        "--max-tokens",
        "8",
        "--seed",
        "3",
        "--temperature",
        "0.9",
        "--min-p",
        "0.02",
    ]
    words += ["--repetition-penalty", "1.2", "--presence-penalty", "0.5", "--frequency-penalty=-0.25", "--top-k", "90"]
    words += ["--logit-bias", "32=-100", "--logit-bias", "101=2.5"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    given: dict[str, Any] = {"seed": 3, "temperature": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "top_k": 90}
    given |= {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {32: -100, 101: 2.5}}
    expected = ulm.generate(model, tokenizer, "some", max_tokens=8, **given)
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == expected.tokens
    for wrong, message in [
        (["--top-k", "5"], "--top-k: 5 has no effect at temperature 0"),
        (["--logit-bias", "the"], "--logit-bias: 'the' is not TOKEN=BIAS (for example 42=-100)"),
        (["--logit-bias", "257=1"], "--logit-bias: there is no token 257"),
    ]:
        assert console.run(lambda wrong=wrong: app(["generate", str(path), "some", *wrong])) == 2  # type: ignore[misc]
        assert message in capsys.readouterr().err
