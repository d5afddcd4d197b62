"""Every kind in every slot equals its slow NumPy reference."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import ulm
from ulm import registry
from ulm.components.attend import _flex, attend, naive
from ulm.components.contracts import Mask, ModelDims, Places
from ulm.errors import UnknownKindError
from ulm.reference import attention as reference_attention
from ulm.reference.lookup import reference
from ulm.reference.mask import Place, causal_table, table
from ulm.reference.optimizer import State
from ulm.spec import SLOTS

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}  # the same sums in another order
ROPE_TABLE = {"rtol": 0.0, "atol": 1e-6}  # the component keeps its angles' cosines in float32 (6e-8 each)
EVERY_KIND = [(slot, kind) for slot in (*SLOTS, "mask", "optimizer", "schedule", "model") for kind in ulm.kinds(slot)]
CAUSAL = registry.find("mask", "causal")(registry.configure("mask", "causal"))
B, T = 2, 7


def spec_with(slot: str, kind: str) -> ulm.ModelSpec:
    return ulm.ModelSpec.preset("nano", vocab_size=97, num_layers=2, context_tokens=32, **{slot: {"kind": kind}})


def dims_of(spec: ulm.ModelSpec) -> ModelDims:
    sizes = (spec.d_model, spec.num_layers, spec.vocab_size, spec.context_tokens, spec.head_dim)
    return ModelDims(*sizes, spec.num_heads, spec.num_kv_heads)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def filled(component: torch.nn.Module) -> torch.nn.Module:
    """In float64, with every weight drawn: ones would hide a forgotten factor."""
    generator = torch.Generator().manual_seed(5)
    component = component.double()
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return component


def numbers(component: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in component.named_parameters()}


def settings(config: BaseModel) -> dict[str, object]:
    return config.model_dump()


@pytest.mark.parametrize(("slot", "kind"), EVERY_KIND, ids=lambda name: name)
def test_every_kind_has_a_reference(slot, kind):
    assert callable(reference(slot, kind))


def test_a_kind_without_a_reference_is_named_with_the_file_to_write():
    with pytest.raises(UnknownKindError, match=r"norm\.softnorm: has no reference .*ulm/reference/norm\.py"):
        reference("norm", "softnorm")


@pytest.mark.parametrize("kind", ulm.kinds("embedding"))
def test_embedding_equals_its_reference(kind):
    spec = spec_with("embedding", kind)
    component = filled(registry.find("embedding", kind)(spec.embedding, dims_of(spec)))
    tokens_BT = torch.arange(B * T).reshape(B, T) * 6 % spec.vocab_size
    expected = reference("embedding", kind)(tokens_BT.numpy(), numbers(component), settings(spec.embedding))
    np.testing.assert_allclose(component(tokens_BT).detach(), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ulm.kinds("position"))
def test_position_equals_its_reference(kind):
    spec = spec_with("position", kind)
    component = filled(registry.find("position", kind)(spec.position, dims_of(spec)))
    positions_BT = torch.tensor([[*range(T)], [*range(20, 20 + T)]])
    expected = reference("position", kind)(numbers(component), settings(spec))
    for method, x in (("rotate", drawn(B, T, 3, spec.head_dim)), ("embed", drawn(B, T, spec.d_model))):
        found = getattr(component, method)(x, positions_BT).detach()
        np.testing.assert_allclose(found, getattr(expected, method)(x.numpy(), positions_BT.numpy()), **ROPE_TABLE)


def test_rope_scores_depend_on_distance_alone():
    turn = reference("position", "rope")({}, settings(spec_with("position", "rope"))).rotate
    q, k = drawn(1, 1, 1, 32).numpy(), drawn(1, 1, 1, 32).numpy() + 1
    scores = [
        float((turn(q, np.array([[m]])) * turn(k, np.array([[n]]))).sum()) for m, n in ((3, 0), (103, 100), (4, 0))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert abs(scores[0] - scores[2]) > 1e-3


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "one"])
def test_attend_equals_its_reference_with_ragged_masks(num_heads, num_kv_heads):
    q, k, v = drawn(B, 3, num_heads, 8), drawn(B, T, num_kv_heads, 8) / 2, drawn(B, T, num_kv_heads, 8) + 1
    allowed_BTS = np.stack([causal_table(3, T), np.pad(causal_table(3, 4), ((0, 0), (0, T - 4)))])
    expected = reference_attention.attend(q.numpy(), k.numpy(), v.numpy(), allowed_BTS)
    positions_BT = torch.tensor([[*range(T - 3, T)], [1, 2, 3]])
    mask = Mask((CAUSAL,), Places(positions_BT, torch.arange(T)[None]))
    np.testing.assert_array_equal(mask.allowed_BTS(), allowed_BTS)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, **FLOAT64)


SCORES = {
    "plain": {},
    "soft cap": {"soft_cap": 0.5},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "both": {"soft_cap": 0.5, "sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("with_places", [False, True], ids=["plain causal", "a mask of segments"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_attend_its_naive_form_and_the_reference_are_one(scores, with_places, with_bias):
    q, k, v = drawn(B, T, 4, 8), drawn(B, T, 2, 8) / 2, drawn(B, T, 2, 8) + 1
    bias_BHTS = drawn(1, 4, T, T) if with_bias else None
    segments_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 1, 1]])
    document, padding = (
        registry.find("mask", kind)(registry.configure("mask", kind)) for kind in ("document", "padding")
    )
    positions_BT = torch.arange(T)[None].expand(B, T)
    places = Places(positions_BT, positions_BT, segments_BT, segments_BT)
    mask = Mask((CAUSAL, document, padding), places) if with_places else Mask()
    table = mask.allowed_BTS().numpy() if with_places else np.tile(causal_table(T, T), (B, 1, 1))
    given = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in scores.items()}
    bias = None if bias_BHTS is None else bias_BHTS.numpy()
    expected = reference_attention.attend(q.numpy(), k.numpy(), v.numpy(), table, bias, **given)
    for form in (attend, naive):
        np.testing.assert_allclose(form(q, k, v, mask, bias_BHTS, **scores), expected, **FLOAT64)


def test_attend_has_the_gradients_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in (drawn(1, 3, 2, 4), drawn(1, 5, 1, 4) / 2, drawn(1, 5, 1, 4) + 1))
    sinks_H = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    mask = Mask((CAUSAL,), Places(torch.tensor([[2, 3, 4]]), torch.arange(5)[None]))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], mask, sinks_H=x[3]), (q, k, v, sinks_H))


def test_flex_attention_sees_the_same_mask_pair_by_pair():
    q, k, v = (x.float() for x in (drawn(B, T, 4, 16), drawn(B, T, 2, 16) / 2, drawn(B, T, 2, 16) + 1))
    segments_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 1, 1]])
    document = registry.find("mask", "document")(registry.configure("mask", "document"))
    positions_BT = torch.arange(T)[None].expand(B, T)
    mask = Mask((CAUSAL, document), Places(positions_BT, positions_BT, segments_BT, segments_BT))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex_attention: that it is not compiled here
        found = _flex(q, k, v, mask, 2.0)
    torch.testing.assert_close(found, naive(q, k, v, mask, soft_cap=2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ulm.kinds("mask"))
def test_a_mask_allows_the_pairs_that_its_reference_allows(kind):
    rows = [
        [Place(p, segment, prefix) for p, segment in enumerate(row)]
        for row, prefix in (([0, 0, 1, 1, -1], 2), ([-1, 0, 0, 2, 2], 4))
    ]
    mask = registry.find("mask", kind)(registry.configure("mask", kind))
    positions_BT, segments_BT = (
        torch.tensor([[getattr(p, name) for p in row] for row in rows]) for name in ("position", "segment")
    )
    places = Places(positions_BT, positions_BT, segments_BT, segments_BT, torch.tensor([2, 4]))
    expected = np.stack([table([kind], row, row) for row in rows])
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(Mask((mask,), places).allowed_BTS(), expected)
    assert mask.is_causal == (not any(table([kind], [Place(p, 0, 4)], [Place(p + 1, 0, 4)])[0, 0] for p in range(3)))


@pytest.mark.parametrize("kind", ulm.kinds("feedforward"))
def test_feedforward_equals_its_reference(kind):
    spec = spec_with("feedforward", kind)
    component = filled(registry.find("feedforward", kind)(spec.feedforward, dims_of(spec), 0))
    x_BTD = drawn(B, T, spec.d_model)
    expected = reference("feedforward", kind)(x_BTD.numpy(), numbers(component), settings(spec.feedforward))
    np.testing.assert_allclose(component(x_BTD).detach(), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ulm.kinds("norm"))
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "near eps"])  # at 1e-3 the mean square equals eps
def test_norm_equals_its_reference(kind, scale):
    spec = spec_with("norm", kind)
    component = filled(registry.find("norm", kind)(spec.norm, dims_of(spec)))
    x_BTD = drawn(B, T, spec.d_model) * scale
    expected = reference("norm", kind)(x_BTD.numpy(), numbers(component), settings(spec.norm))
    np.testing.assert_allclose(component(x_BTD).detach(), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ulm.kinds("head"))
def test_head_equals_its_reference(kind):
    spec = spec_with("head", kind)
    component = filled(registry.find("head", kind)(spec.head, dims_of(spec), None))
    x_BTD = drawn(B, T, spec.d_model)
    expected = reference("head", kind)(
        x_BTD.numpy(), numbers(component), settings(spec.head), vocab_size=spec.vocab_size
    )
    assert expected.shape == (B, T, 97)
    np.testing.assert_allclose(component(x_BTD).detach(), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ulm.kinds("optimizer"))
def test_five_optimizer_steps_equal_the_reference(kind):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    config = registry.configure("optimizer", {"kind": kind})
    optimizer = registry.find("optimizer", kind).build(config, model, 0.05)
    expected, state = copy.deepcopy(numbers(model)), State()
    for step in range(5):
        optimizer.zero_grad()
        (model(drawn(6, 3) + step) ** 2).mean().backward()
        gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr = 0.05 / (1 + step)
        expected, state = reference("optimizer", kind)(expected, gradients, state, settings(config), lr)
        optimizer.step()
    for name, parameter in numbers(model).items():
        np.testing.assert_allclose(parameter, expected[name], err_msg=name, **FLOAT64)


@pytest.mark.parametrize("kind", ulm.kinds("schedule"))
@pytest.mark.parametrize("num_steps", [1, 5, 30, 1000, 80_000])
@pytest.mark.parametrize("given", [{}, {"warmup_steps": 0}, {"warmup_steps": 7, "final_share": 0.0}], ids=str)
def test_schedule_equals_its_reference_at_every_step(kind, num_steps, given):
    known = registry.find("schedule", kind).Config.model_fields
    config = registry.configure("schedule", {"kind": kind, **{k: v for k, v in given.items() if k in known}})
    share = registry.find("schedule", kind).share
    expected = reference("schedule", kind)(settings(config), num_steps)
    assert len(expected) == num_steps
    steps = np.unique(np.linspace(0, num_steps - 1, 2000).astype(int))
    np.testing.assert_allclose([share(config, int(s), num_steps) for s in steps], expected[steps], **FLOAT64)


@pytest.mark.parametrize("decay_share", [0.0, 0.001, 0.5, 1.0])
def test_hold_and_decay_end_where_they_should(decay_share):
    config = registry.configure("schedule", {"kind": "wsd", "warmup_steps": 10, "decay_share": decay_share})
    share = registry.find("schedule", "wsd").share
    shares = [share(config, step, 1000) for step in range(1000)]
    np.testing.assert_allclose(shares, reference("schedule", "wsd")(settings(config), 1000), **FLOAT64)
    assert shares[-1] == pytest.approx(0.1 if decay_share else 1.0)
    assert shares[9] == 1.0
