"""What every component keeps to. Kinds are found by listing their folders: a new file is tested without a new test."""

from __future__ import annotations

import inspect
import json
import pickle
from importlib import import_module

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import cross_entropy

import ulm
from tests.variants import VARIANTS, VOCAB_SIZE, every_variant, is_causal, model_of, spec_of, tokens
from ulm import registry
from ulm.checkpoints.store import tensors
from ulm.errors import ConfigError, ContextLengthError
from ulm.registry import KindConfig
from ulm.spec import SLOTS

FLOAT32_ORDER = {"rtol": 0.0, "atol": 1e-4}  # the same float32 sums in blocks of other widths; logits reach 10
BFLOAT16 = 0.1  # of the logits' deviation, on average: weights, products and sums of 8 bits through two layers
OTHERS = ("mask", "optimizer", "schedule")
ALL = [(slot, kind) for slot in (*SLOTS, *OTHERS) for kind in ulm.kinds(slot)]
every_kind = pytest.mark.parametrize(("slot", "kind"), ALL, ids=lambda name: name)
learners = {name: overrides for name, overrides in VARIANTS.items() if name != "attention-sliding-window of 1"}
causal_variants = {name: overrides for name, overrides in VARIANTS.items() if is_causal(overrides)}
T = 17


def _is_placeless(overrides: dict) -> bool:
    """Whether a text's logits are the same wherever in a row it stands, under a document mask that it can have."""
    spec = spec_of(overrides)
    attentions = [layer.attention for layer in spec.blocks_of_weights]
    keeps = all("document" in registry.find("attention", config.kind).masks for config in attentions)
    absolute = spec.position.kind in ("learned", "sinusoidal", "none") or any(
        getattr(config, "keep_first_tokens", 0) or getattr(config, "num_sink_tokens", 0)
        for config in (spec.position, *attentions)
    )
    return keeps and not absolute and is_causal(overrides)


placeless_variants = {name: overrides for name, overrides in VARIANTS.items() if _is_placeless(overrides)}


def test_every_slot_has_a_kind():
    assert [slot for slot in (*SLOTS, *OTHERS, "model") if not ulm.kinds(slot)] == []


@every_kind
def test_a_kind_is_one_documented_class_with_a_documented_config_in_its_own_file(slot, kind):
    module = import_module(f"ulm.components.{slot}.{kind}")
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    registered = [cls for cls in own if getattr(cls, "slot", None) == slot]
    assert registered == [registry.find(slot, kind)]
    config = registered[0].Config
    assert issubclass(config, KindConfig)
    assert config.__module__ == module.__name__
    for documented in (module, registered[0], config):
        assert "__doc__" in vars(documented) and vars(documented)["__doc__"], f"{documented} has no docstring"
    assert config.model_config["frozen"] and config.model_config["extra"] == "forbid"


@every_kind
def test_a_kind_needs_nothing_but_its_name_and_refuses_an_unknown_key(slot, kind):
    assert registry.configure(slot, kind).kind == kind
    with pytest.raises(ConfigError, match=rf"^{slot}\.colour: unknown key \((did you mean|known: )"):
        registry.configure(slot, {"kind": kind, "colour": 3})


@every_variant
def test_a_spec_comes_back_from_json_and_a_pickle_and_builds_the_same_model(overrides):
    spec = spec_of(overrides)
    for again in (ulm.ModelSpec(**json.loads(spec.model_dump_json())), pickle.loads(pickle.dumps(spec))):
        assert again == spec
        assert [type(getattr(again, slot)) for slot in SLOTS] == [type(getattr(spec, slot)) for slot in SLOTS]
        shapes = ({name: p.shape for name, p in ulm.build(s, seed=0).named_parameters()} for s in (again, spec))
        assert next(shapes) == next(shapes)


@every_variant
def test_weights_come_back_from_safetensors_and_a_pickle_with_the_same_logits(overrides):
    model = model_of(overrides)
    expected = model(tokens(2, T))
    fresh = ulm.build(spec_of(overrides), seed=9)
    weights = load(save({name: w.detach().contiguous() for name, w in tensors(model).items()}))
    for name, tensor in tensors(fresh).items():
        tensor.detach().copy_(weights[name])
    torch.testing.assert_close(fresh(tokens(2, T)), expected, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens(2, T)), expected, rtol=0, atol=0)


@every_variant
def test_decoding_one_token_at_a_time_equals_one_pass(overrides):
    model, tokens_BT = model_of(overrides), tokens(2, T)
    cache = model.new_cache(batch=2)
    steps = [model.step(tokens_BT[:, t : t + 1], cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BT).detach(), **FLOAT32_ORDER)


@pytest.mark.parametrize("overrides", causal_variants.values(), ids=causal_variants.keys())
def test_a_later_token_never_changes_earlier_logits(overrides):
    model, tokens_BT = model_of(overrides), tokens(2, T)
    before = model(tokens_BT).detach()
    for t in (1, 8, T - 1):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % VOCAB_SIZE
        after = model(changed_BT).detach()
        torch.testing.assert_close(after[:, :t], before[:, :t], **FLOAT32_ORDER)
        assert (after[:, t] - before[:, t]).abs().max() > 0.01


def test_a_prefix_sees_itself_whole_and_what_follows_is_causal():
    model, tokens_BT = model_of({"mask": "prefix"}), tokens(1, T)
    prefix_tokens_B = torch.tensor([6])
    before = model(tokens_BT, None, prefix_tokens_B).detach()
    for t, first in ((3, 0), (5, 0), (8, 8)):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % VOCAB_SIZE
        changed = (model(changed_BT, None, prefix_tokens_B).detach() - before).abs().amax(-1)[0]
        assert (changed[first:] > 1e-3).all() and (changed[:first] < 1e-4).all()
    cache = model.new_cache(1, prefix_tokens_B=prefix_tokens_B)
    with pytest.raises(ContextLengthError, match="a prefix must come whole in one call"):
        model.step(tokens_BT[:, :5], cache)
    parts = [model.step(part, cache) for part in tokens_BT.split([7, 9, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), before, **FLOAT32_ORDER)


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_other_rows_of_a_batch_change_nothing(overrides, side):
    model, tokens_BT = model_of(overrides), tokens(3, T)
    lengths = [T, 9, 4]
    segments_BT = torch.full((3, T), -1)
    for row, length in enumerate(lengths):
        part = slice(T - length, T) if side == "left" else slice(length)
        segments_BT[row, part] = 0
    together = model(tokens_BT, segments_BT).detach()
    for row, length in enumerate(lengths):
        part = slice(T - length, T) if side == "left" else slice(length)
        alone = model(tokens_BT[row : row + 1, part]).detach()
        torch.testing.assert_close(together[row : row + 1, part], alone, **FLOAT32_ORDER)


@pytest.mark.parametrize("overrides", placeless_variants.values(), ids=placeless_variants.keys())
def test_texts_that_share_a_row_under_a_document_mask_are_as_if_alone(overrides):
    model = model_of({**overrides, "mask": ["causal", "document"]})
    tokens_BT, segments_BT = tokens(1, T), torch.tensor([[0] * 7 + [1] * 10])
    together = model(tokens_BT, segments_BT).detach()
    for part in (slice(7), slice(7, T)):
        torch.testing.assert_close(together[:, part], model(tokens_BT[:, part]).detach(), **FLOAT32_ORDER)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_and_gradients_have_the_dtype_of_the_weights(overrides, dtype):
    model = model_of(overrides).to(dtype)
    logits_BTV = model(tokens(2, T))
    assert logits_BTV.shape == (2, T, VOCAB_SIZE)
    assert logits_BTV.dtype == dtype
    loss = logits_BTV.float().logsumexp(-1).mean()
    more = model.auxiliary_loss()
    (loss if more is None else loss + more).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, f"{name} takes no part"
    assert model.step(tokens(2, T), model.new_cache(batch=2)).dtype == dtype


@every_variant
def test_in_bfloat16_the_logits_stay_near_those_in_float32(overrides):
    model = ulm.build(spec_of(overrides), seed=0)  # weights of the usual size: others make chaos of small errors
    with torch.no_grad():
        expected, found = model(tokens(2, T)), model.to(torch.bfloat16)(tokens(2, T)).float()
    assert (found - expected).abs().mean() < BFLOAT16 * expected.std()


@every_variant
def test_the_same_seed_builds_the_same_weights(overrides):
    first, second, other = (ulm.build(spec_of(overrides), seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


COPY_VOCAB, COPY_T = 8, 8
MOST_STEPS = 200  # most kinds need 20 to 60
COPIED = 0.3  # nats per token; guessing has ln 8 = 2.08


def _copy_loss(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Rows of two random tokens by turns; the loss on what can be known: each is the one before the one before it."""
    first = torch.randint(COPY_VOCAB, (32, 2), generator=torch.Generator().manual_seed(seed))
    rows_BT = first.repeat(1, COPY_T // 2)
    logits_BTV = model(rows_BT[:, :-1])
    loss = cross_entropy(logits_BTV[:, 1:].flatten(0, 1), rows_BT[:, 2:].flatten())
    more = model.auxiliary_loss()
    return loss if more is None else loss + more


def _learned(overrides: dict) -> float:
    """The loss on new rows after a short training."""
    fields = {"vocab_size": COPY_VOCAB, "d_model": 96, **overrides}
    model = ulm.build(spec_of(fields, COPY_T), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(MOST_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 20)
        loss = _copy_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9 and loss < COPIED / 2:
            break
    with torch.no_grad():
        return float(_copy_loss(model, 10_000))


SEES_ITSELF_ALONE = {"attention": {"kind": "sliding", "window_tokens": 1}}


@pytest.mark.parametrize("overrides", learners.values(), ids=learners.keys())
def test_every_kind_learns_to_copy(overrides):
    assert _learned(overrides) < COPIED


def test_a_model_that_sees_no_other_token_does_not_learn_to_copy():
    assert _learned(SEES_ITSELF_ALONE) > 1.5


@pytest.mark.parametrize("kind", ulm.kinds("schedule"))
def test_a_schedule_warms_up_to_the_peak_and_stays_between_zero_and_one(kind):
    config, share = registry.configure("schedule", kind), registry.find("schedule", kind).share
    for num_steps in (1, 2, 30, 3000):
        shares = [share(config, step, num_steps) for step in range(num_steps)]
        assert all(0 < s <= 1 for s in shares)
        assert max(shares) == pytest.approx(1.0)
        assert shares[: len(shares) // 50] == sorted(shares[: len(shares) // 50])


@pytest.mark.parametrize("kind", ulm.kinds("optimizer"))
def test_an_optimizer_lowers_a_loss_and_resumes_from_its_state(kind):
    def run(steps: list[int], state: dict | None, weights: dict) -> tuple[list[float], dict, dict]:
        model = torch.nn.Linear(4, 4)
        model.load_state_dict(weights)
        optimizer = registry.find("optimizer", kind).build(registry.configure("optimizer", kind), model, 0.05)
        if state:
            optimizer.load_state_dict(state)
        losses = []
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = ((model(x) - x) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, optimizer.state_dict(), model.state_dict()

    start = {"weight": torch.zeros(4, 4), "bias": torch.ones(4)}
    losses, _, whole = run([*range(40)], None, start)
    assert losses[-1] < losses[0] / 4
    _, state, half = run([*range(20)], None, start)
    _, _, resumed = run([*range(20, 40)], state, half)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
