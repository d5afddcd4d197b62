"""What holds weights in a model, in a form that holds those of several members, each in a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from serve.engines.local import kernels
from serve.engines.local.flat import MAX_SLOTS, Flat
from serve.engines.local.matrix import Matrix
from ulm.components.attention._projected import HeadNorm, Projected
from ulm.components.embedding.value import ValueEmbedding
from ulm.components.feedforward.swiglu import SwiGLU
from ulm.components.norm.layernorm import LayerNorm
from ulm.components.norm.rmsnorm import RMSNorm
from ulm.components.position._rotary import Rotary
from ulm.components.position.learned import LearnedPosition


class Current:
    """The tokens that the pass under way is about."""

    flat: Flat


class StackedLinear(nn.Module):
    """One or several linear layers of the same input as one matrix for each slot; the outputs stand side by side."""

    def __init__(
        self, names: Sequence[str], layers: Sequence[Any], current: Current, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.names, self.current = tuple(names), current
        self.sizes = [layer.out_features for layer in layers]
        self.has_bias = layers[0].bias is not None
        self.matrix = Matrix(sum(self.sizes), layers[0].in_features, dtype=dtype, device=device)
        self.matrices = [self.matrix]

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's weights, by their names in a checkpoint."""
        biases = [tensors[f"{name}.bias"] for name in self.names] if self.has_bias else []
        weight_FD = torch.cat([tensors[f"{name}.weight"] for name in self.names])
        self.matrix.put(slot, weight_FD, torch.cat(biases) if biases else None)

    def drop(self, slot: int) -> None:
        """Forget a member's."""
        self.matrix.drop(slot)

    @property
    def nbytes(self) -> int:
        """Memory of all slots' weights."""
        return self.matrix.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Each token by its member's matrix."""
        return self.matrix.linear(x, self.current.flat)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same, each layer's outputs for themselves."""
        return self.forward(x).split_with_sizes(self.sizes, dim=-1)

    def gated(self, x: Tensor) -> Tensor:
        """silu of the first layer's outputs times the second's."""
        gate, up = self.parts(x)
        return silu(gate) * up

    def gated_natively(self, x_BTD: Tensor) -> Tensor:
        """The same by the kernel, T = 1."""
        hidden_BF: Tensor = torch.ops.ulm_engine.gate(self.forward(x_BTD)[:, 0])
        return hidden_BF[:, None]


class StackedTable:
    """A table with a row for each token of the vocabulary, for each slot: of embeddings, or the head's matrix."""

    def __init__(
        self, name: str, shape: tuple[int, int], current: Current, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.current = name, current
        self.matrix = Matrix(*shape, dtype=dtype, device=device)
        self.matrices = [self.matrix]

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's table; rows beyond the vocabulary are left out."""
        self.matrix.put(slot, tensors[f"{self.name}.weight"][: self.matrix.num_out])

    def drop(self, slot: int) -> None:
        """Forget a member's."""
        self.matrix.drop(slot)

    @property
    def nbytes(self) -> int:
        """Memory of all slots' tables."""
        return self.matrix.nbytes

    def look_up(self, tokens_BT: Tensor) -> Tensor:
        """Rows of tokens, T = 1, as x_BTD."""
        return self.matrix.embed(tokens_BT[:, 0], self.current.flat)[:, None]

    def project(self, x: Tensor) -> Tensor:
        """The product with the table."""
        return self.matrix.linear(x, self.current.flat)


class StackedPositions(StackedTable):
    """A learned vector for each position, for each slot."""

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x with the vectors of its positions added; those beyond the table take the last. T = 1."""
        positions_B = positions_BT[:, 0].clamp_max(self.matrix.num_out - 1)
        return x_BTD + self.matrix.embed(positions_B, self.current.flat)[:, None]


class StackedValues(nn.Module):
    """Tables of values by token with a scale for each layer that uses one, for each slot."""

    scales_NL: Tensor

    def __init__(self, like: ValueEmbedding, current: Current, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        num_rows, width = like.tables[0].shape
        self.current, self.table_of, self.places = current, like.table_of, like.places
        self.matrices = [Matrix(num_rows, width, dtype=dtype, device=device) for _ in like.tables]
        active_dtype = torch.float32 if device.type == "cpu" else dtype
        scales_NL = torch.zeros(MAX_SLOTS, len(like.places), dtype=active_dtype, device=device)
        self.register_buffer("scales_NL", scales_NL)

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's tables and scales."""
        for number, matrix in enumerate(self.matrices):
            matrix.put(slot, tensors[f"embedding.tables.{number}"])
        self.scales_NL[slot] = tensors["embedding.scales"]

    def drop(self, slot: int) -> None:
        """Forget a member's."""
        for matrix in self.matrices:
            matrix.drop(slot)

    @property
    def nbytes(self) -> int:
        """Memory of all slots' tables."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def values(self, tokens_BT: Tensor, layer: int) -> Tensor | None:
        """What is added to a layer's values, T = 1, as x_BTJ; None for the layers between."""
        table = self.table_of(layer)
        if table is None:
            return None
        flat = self.current.flat
        scale_B = self.scales_NL[flat.slots_B, self.places[layer]]
        return (self.matrices[table].embed(tokens_BT[:, 0], flat) * scale_B[:, None])[:, None]


class StackedNorm(nn.Module):
    """A norm over the last dimension with a scale, and perhaps a shift, for each slot."""

    weight_ND: Tensor
    bias_ND: Tensor | None

    def __init__(self, name: str, like: Any, current: Current, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.current, self.eps, self.width = name, current, like.eps, like.weight.shape[-1]
        self.is_centred = isinstance(like, nn.LayerNorm)
        self.is_native = has_kernels(device)
        shape = (MAX_SLOTS, self.width)
        self.register_buffer("weight_ND", torch.zeros(shape, dtype=dtype, device=device))
        has_bias = getattr(like, "bias", None) is not None
        self.register_buffer("bias_ND", torch.zeros(shape, dtype=dtype, device=device) if has_bias else None)

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's scale and shift."""
        self.weight_ND[slot] = tensors[f"{self.name}.weight"]
        if self.bias_ND is not None:
            self.bias_ND[slot] = tensors[f"{self.name}.bias"]

    def drop(self, slot: int) -> None:
        """Nothing: the slot's numbers are overwritten by the next member's."""

    @property
    def nbytes(self) -> int:
        """Left out of account: a thousandth of the matrices."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """Normed, scaled by each token's member."""
        slots_B, shape = self.current.flat.slots_B, (self.width,)
        if self.is_native:
            rows = x.reshape(x.shape[0], -1, self.width)
            out: Tensor = torch.ops.ulm_engine.norm(
                rows, slots_B, self.weight_ND, self.bias_ND, self.eps, self.is_centred
            )
            return out.view(x.shape)
        around = (x.shape[0], *[1] * (x.dim() - 2), self.width)
        weight = self.weight_ND[slots_B].view(around)
        if not self.is_centred:
            return nn.functional.rms_norm(x, shape, None, self.eps) * weight
        normed = nn.functional.layer_norm(x, shape, None, None, self.eps) * weight
        return normed if self.bias_ND is None else normed + self.bias_ND[slots_B].view(around)


NORMS = (RMSNorm, HeadNorm, LayerNorm)


def exchange(model: Any, current: Current, dtype: torch.dtype, active_dtype: torch.dtype, device: torch.device) -> Any:
    """Puts stacked forms in place of all that has one; returns them. What they held is gone from the model.

    Activations are in `active_dtype`. A layer that puts tokens into another order keeps what it has.
    """
    leaves: list[Any] = []
    for name, module in _token_wise(model, ""):
        owner, _, attribute = name.rpartition(".")
        if isinstance(module, Projected):
            leaves.append(_joined(name, module, ("q", "k", "v"), current, dtype, device))
            module.products = leaves[-1].parts  # type: ignore[method-assign]
        elif isinstance(module, SwiGLU):
            joined = _joined(name, module, ("gate", "up"), current, dtype, device)
            gated: Any = joined.gated_natively if has_kernels(device) else joined.gated
            module.gated = gated  # type: ignore[method-assign]
            leaves.append(joined)
        elif type(module) is nn.Linear and hasattr(model.get_submodule(owner), attribute):
            leaves.append(StackedLinear([name], [module], current, dtype, device))
            setattr(model.get_submodule(owner), attribute, leaves[-1])
        elif isinstance(module, NORMS):
            leaves.append(StackedNorm(name, module, current, active_dtype, device))
            setattr(model.get_submodule(owner), attribute, leaves[-1])
    if type(model.embedding) is ValueEmbedding:
        model.embedding.stacked_values = StackedValues(model.embedding, current, dtype, device)
        leaves.append(model.embedding.stacked_values)
        model.embedding.values = leaves[-1].values  # type: ignore[method-assign]
        del model.embedding.tables, model.embedding.scales
    if type(model.position) is LearnedPosition:
        num_positions, width = model.position.weight.shape
        leaves.append(StackedPositions("position", (num_positions, width), current, dtype, device))
        model.position.embed = leaves[-1].add  # type: ignore[method-assign]
        del model.position.weight
    shape = (model.vocab_size, model.dims.d_model)
    table = StackedTable("embedding", shape, current, dtype, device)
    head = table
    if model.head.weight is not model.embedding.weight:
        head = StackedTable("head", shape, current, dtype, device)
        leaves.append(head)
    model.embedding.look_up, model.head.project = table.look_up, head.project
    del model.embedding.weight, model.head.weight
    return [*leaves, table]


def turn_natively(position: Any) -> None:
    """Let rotary positions turn by the kernel."""
    if not isinstance(position, Rotary):
        return
    cos_SE, sin_SE = position.cos_SE, position.sin_SE

    def rotate(x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        turned: Tensor = torch.ops.ulm_engine.rotate(x_BTHE[:, 0], positions_BT[:, 0], cos_SE, sin_SE)
        return turned[:, None]

    position.rotate = rotate  # type: ignore[method-assign]


def call_directly(model: nn.Module) -> None:
    """Let each module's call be its forward, without nn.Module.__call__ and the hooks that nobody here has.

    While another thread compiles, torch.fx has that method exchanged for all threads, and fails at modules that it does
    not know (torch 2.13, torch/fx/_symbolic_trace.py).
    """
    kinds: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = type(kind.__name__, (kind,), {"__call__": kind.forward})
        module.__class__ = kinds[kind]


def has_kernels(device: torch.device) -> bool:
    """Whether the engine's own kernels run here."""
    return device.type == "cpu" and kernels.load() is None


def _token_wise(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Modules by name, but those within one that puts tokens into another order."""
    found = []
    for name, child in list(module.named_children()):
        if not getattr(child, "rearranges_tokens", False):
            found += [(prefix + name, child), *_token_wise(child, f"{prefix}{name}.")]
    return found


def _joined(
    name: str, module: Any, layers: Sequence[str], current: Current, dtype: torch.dtype, device: torch.device
) -> StackedLinear:
    """Some layers of a module as one, and no longer the module's."""
    names = [f"{name}.{layer}" for layer in layers]
    joined = StackedLinear(names, [getattr(module, layer) for layer in layers], current, dtype, device)
    for layer in layers:
        delattr(module, layer)
    return joined
