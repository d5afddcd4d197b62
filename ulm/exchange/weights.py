"""How the weights of a stock architecture are stored: rules that make their tensors of ours, and ours of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ulm.errors import ArtefactError

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs, and the tensors of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    part: Callable[[Tensor], Sequence[Tensor]] = lambda whole: (whole,)

    def of_layer(self, layer: int) -> Rule:
        """The rule with the number of a layer in its names, for `{}`."""
        ours = tuple(name.format(layer) for name in self.ours)
        return Rule(self.theirs.format(layer), ours, self.join, self.part)


def same(theirs: str, ours: str) -> Rule:
    """The tensor under another name."""
    return Rule(theirs, (ours,))


def turned(theirs: str, ours: str) -> Rule:
    """A matrix that is stored as in x out."""
    return Rule(theirs, (ours,), lambda parts: parts[0].T, lambda whole: (whole.T,))


def less_one(theirs: str, ours: str) -> Rule:
    """A norm's scale that is stored as scale - 1."""
    return Rule(theirs, (ours,), lambda parts: parts[0] - 1, lambda whole: (whole + 1,))


def stacked(theirs: str, ours: Sequence[str], sizes: Sequence[int], *, is_turned: bool = False) -> Rule:
    """Matrices, or vectors, one below the other: `sizes` rows of each. Turned: side by side, as in x out."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts))
        return whole.T if is_turned and whole.dim() == 2 else whole

    def part(whole: Tensor) -> Sequence[Tensor]:
        return torch.split(whole.T if is_turned and whole.dim() == 2 else whole, list(sizes))

    return Rule(theirs, tuple(ours), join, part)


def woven(theirs: str, ours: Sequence[str], num_heads: int) -> Rule:
    """Matrices, or vectors, head by head: the rows of q, k and v of head 0, of head 1 and so on."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([by_heads(part, num_heads) for part in parts], dim=1).flatten(0, 2)

    def part(whole: Tensor) -> Sequence[Tensor]:
        rows = whole.reshape(num_heads, len(ours), -1, *whole.shape[1:])
        return [rows[:, number].flatten(0, 1) for number in range(len(ours))]

    return Rule(theirs, tuple(ours), join, part)


def by_heads(weight: Tensor, num_heads: int) -> Tensor:
    """A matrix, or a vector, with its rows parted by heads: [heads, rows of each, ...]."""
    return weight.reshape(num_heads, -1, *weight.shape[1:])


def exported(weights: Mapping[str, Tensor], rules: Iterable[Rule]) -> Weights:
    """Their tensors of ours, each of which one rule takes."""
    left = dict(weights)
    found = {rule.theirs: rule.join([left.pop(name) for name in rule.ours]) for rule in rules}
    assert not left, f"not exported: {sorted(left)}"
    return found


def imported(weights: Mapping[str, Tensor], rules: Iterable[Rule], unused: Callable[[str], bool]) -> Weights:
    """Our tensors of theirs. ArtefactError for a tensor that is missing, or that nothing takes and is not `unused`."""
    left = dict(weights)
    found: Weights = {}
    for rule in rules:
        if rule.theirs not in left:
            raise ArtefactError(f"model.safetensors: no tensor {rule.theirs}")
        whole = left.pop(rule.theirs)
        try:
            found |= dict(zip(rule.ours, rule.part(whole), strict=True))
        except RuntimeError:  # of torch: rows that cannot be parted so
            problem = f"{rule.theirs} is {list(whole.shape)}, and config.json means another shape"
            raise ArtefactError(f"model.safetensors: {problem}") from None
    foreign = [name for name in left if not unused(name)]
    if foreign:
        raise ArtefactError(f"model.safetensors: {len(foreign)} tensors that the model has no place for: {foreign[0]}")
    return found
