"""A linear layer of several members: one matrix in each slot, and one product for the tokens of all."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from serve.engines.local import kernels
from serve.engines.local.flat import MAX_SLOTS, Flat

HUGE_BYTES, LINE_BYTES = 2 << 20, 64


class Matrix:
    """Matrices of num_out x num_in, with or without biases, by slot.

    On a CPU the arithmetic is float32 whatever the dtype, which is then that of the memory. With kernels each matrix is
    packed for them and they find it by its address, in tensors that stay the same, so that a compiled graph sees new
    members. Without, torch multiplies segment by segment, and on a CPU keeps float32 of the rounded weights.
    """

    def __init__(self, num_out: int, num_in: int, *, dtype: torch.dtype, device: torch.device) -> None:
        assert dtype in (torch.float32, torch.bfloat16), dtype
        self.num_out, self.num_in, self.dtype, self.device = num_out, num_in, dtype, device
        self._is_bfloat16 = dtype == torch.bfloat16
        self._is_native = device.type == "cpu" and kernels.load() is None
        self._weights: dict[int, Tensor] = {}  # packed, or [F, D]
        self._biases: dict[int, Tensor] = {}
        self._weights_N, self._biases_N = (torch.zeros(MAX_SLOTS, dtype=torch.long) for _ in range(2))  # addresses

    @property
    def nbytes(self) -> int:
        """Memory of all matrices held."""
        # A list, for another thread may put a member's while this one counts.
        return sum(x.nbytes for held in (self._weights, self._biases) for x in list(held.values()))

    def put(self, slot: int, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        """Hold a copy of a matrix in a slot, in place of what was there."""
        assert weight_FD.shape == (self.num_out, self.num_in), weight_FD.shape
        is_cpu = self.device.type == "cpu"
        kept = torch.float32 if is_cpu else self.dtype  # biases too: few
        weight_FD = weight_FD.detach().to(self.device, self.dtype)
        if self._is_native:
            weight = torch.ops.ulm_engine.pack(weight_FD.float(), self._is_bfloat16)
        else:
            weight = weight_FD.to(kept, copy=True)
        bias = None if bias_F is None else bias_F.detach().to(self.device, self.dtype).to(kept, copy=True).contiguous()
        self._weights_N[slot] = weight.data_ptr()
        self._biases_N[slot] = 0 if bias is None else bias.data_ptr()
        self._weights[slot] = weight
        self._biases.pop(slot, None)
        if bias is not None:
            self._biases[slot] = bias

    def move(self, slot: int, memory: Tensor) -> None:
        """Let a slot's packed matrix stand in this memory, of as many bytes as `packed_bytes` says."""
        old = self._weights[slot]
        new = memory.view(old.dtype).view(old.shape).copy_(old)
        self._weights[slot], self._weights_N[slot] = new, new.data_ptr()

    def packed_bytes(self, slot: int) -> int:
        """Memory of a slot's matrix as the kernels read it; 0 without them."""
        return self._weights[slot].nbytes if self._is_native else 0

    def drop(self, slot: int) -> None:
        """Free a slot; no token may name it until it is filled again."""
        self._weights_N[slot] = self._biases_N[slot] = 0
        del self._weights[slot]
        self._biases.pop(slot, None)

    def linear(self, x_BD: Tensor, flat: Flat) -> Tensor:
        """Each token times its member's matrix, as out_BF; x may have more dimensions before the last, B in all.

        Float32 on a CPU, else the weights' dtype. What filling tokens get means nothing.
        """
        if x_BD.dim() > 2:
            return self.linear(x_BD.flatten(0, -2), flat).view(*x_BD.shape[:-1], self.num_out)
        if self._is_native:
            native_BF: Tensor = torch.ops.ulm_engine.linear.default(
                x_BD, self._weights_N, self._biases_N, flat.segments_N3, self.num_out, self._is_bfloat16
            )
            return native_BF
        if len(flat.segments) == 1:
            return self._product(x_BD, flat.segments[0][0])
        parts = [self._product(x_BD[first:end], slot) for slot, first, end in flat.segments]
        num_filling = len(x_BD) - sum(map(len, parts))
        return torch.cat([*parts, parts[0].new_zeros(num_filling, self.num_out)])

    def _product(self, x_BD: Tensor, slot: int) -> Tensor:
        weight_FD = self._weights[slot]
        return linear(x_BD.to(weight_FD.dtype), weight_FD, self._biases.get(slot))

    def embed(self, tokens_B: Tensor, flat: Flat) -> Tensor:
        """Each token's row of its member's matrix, as x_BD: of a table of embeddings, tied to the head or not."""
        if self._is_native:
            x_BD: Tensor = torch.ops.ulm_engine.embed.default(
                tokens_B, flat.slots_B, self._weights_N, self.num_out, self.num_in, self._is_bfloat16
            )
            return x_BD
        if len(flat.segments) == 1:
            return self._weights[flat.segments[0][0]][tokens_B]
        parts = [self._weights[slot][tokens_B[first:end]] for slot, first, end in flat.segments]
        num_filling = len(tokens_B) - sum(map(len, parts))
        return torch.cat([*parts, parts[0].new_zeros(num_filling, self.num_in)])


def settle(matrices: Sequence[Matrix], slot: int) -> None:
    """Put the packed matrices of a slot into one piece of memory of huge pages, where the system has them.

    Reading weights is most of a small step; with pages of 2 MiB it took an eighth less time (docs/experiments.md).
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    sizes = [-(-matrix.packed_bytes(slot) // LINE_BYTES) * LINE_BYTES for matrix in matrices]
    if sum(sizes) < HUGE_BYTES:
        return
    piece = mmap.mmap(-1, sum(sizes) + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        piece.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    memory = torch.frombuffer(piece, dtype=torch.uint8)  # which keeps the piece as long as any part of it is used
    place = -memory.data_ptr() % HUGE_BYTES
    for matrix, size in zip(matrices, sizes, strict=True):
        matrix.move(slot, memory[place : place + matrix.packed_bytes(slot)])
        place += size
