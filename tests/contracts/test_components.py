"""What every component keeps to. Kinds are found by listing their folders: a new file is tested without a new test."""

from __future__ import annotations

import inspect
import json
from importlib import import_module

import pytest
import torch

import ulm
from ulm import registry
from ulm.errors import ConfigError
from ulm.registry import KindConfig
from ulm.spec import SLOTS

FLOAT32_ORDER = {"rtol": 0.0, "atol": 1e-4}  # the same float32 sums in blocks of other widths; logits reach 10
ALL = [(slot, kind) for slot in (*SLOTS, "optimizer", "schedule") for kind in ulm.kinds(slot)]
IN_MODELS = [(slot, kind) for slot, kind in ALL if slot in SLOTS]
every_kind = pytest.mark.parametrize(("slot", "kind"), ALL, ids=lambda name: name)
every_part_of_a_model = pytest.mark.parametrize(("slot", "kind"), IN_MODELS, ids=lambda name: name)
T = 17


def spec_with(slot: str, kind: str) -> ulm.ModelSpec:
    return ulm.ModelSpec.preset("nano", vocab_size=97, num_layers=2, context_tokens=T, **{slot: {"kind": kind}})


def model_with(slot: str, kind: str) -> torch.nn.Module:
    """Ten times the usual start: at the usual one attention is nearly uniform and hides mistakes."""
    model = ulm.build(spec_with(slot, kind), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() >= 2 else 1)
    return model


def drawn_tokens() -> torch.Tensor:
    return torch.randint(97, (2, T), generator=torch.Generator().manual_seed(1))


def test_every_slot_has_a_kind():
    assert [slot for slot in (*SLOTS, "optimizer", "schedule", "model") if not ulm.kinds(slot)] == []


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


@every_part_of_a_model
def test_a_spec_comes_back_from_json(slot, kind):
    spec = spec_with(slot, kind)
    again = ulm.ModelSpec(**json.loads(spec.model_dump_json()))
    assert again == spec
    assert type(getattr(again, slot)) is registry.find(slot, kind).Config


@every_part_of_a_model
def test_decoding_one_token_at_a_time_equals_one_pass(slot, kind):
    model, tokens_BT = model_with(slot, kind), drawn_tokens()
    cache = model.new_cache(batch=2)
    steps = [model.step(tokens_BT[:, t : t + 1], cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BT).detach(), **FLOAT32_ORDER)


@every_part_of_a_model
def test_a_later_token_never_changes_earlier_logits(slot, kind):
    model, tokens_BT = model_with(slot, kind), drawn_tokens()
    before = model(tokens_BT).detach()
    for t in (1, 8, T - 1):
        changed_BT = tokens_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 97
        after = model(changed_BT).detach()
        torch.testing.assert_close(after[:, :t], before[:, :t], **FLOAT32_ORDER)
        assert (after[:, t] - before[:, t]).abs().max() > 0.01


@every_part_of_a_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_and_gradients_have_the_dtype_of_the_weights(slot, kind, dtype):
    model = model_with(slot, kind).to(dtype)
    logits_BTV = model(drawn_tokens())
    assert logits_BTV.shape == (2, T, 97)
    assert logits_BTV.dtype == dtype
    logits_BTV.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()
    assert model.step(drawn_tokens(), model.new_cache(batch=2)).dtype == dtype


@every_part_of_a_model
def test_the_same_seed_builds_the_same_weights(slot, kind):
    first, second, other = (ulm.build(spec_with(slot, kind), seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


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
