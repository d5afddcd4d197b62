"""What attention by feature maps shares: sums over the past in place of scores, in blocks or one token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ulm.components.attention._projected import Projected
from ulm.components.contracts import PADDING, Mask, Places

BLOCK_TOKENS = 64  # pairs within a block are scored, what came before is one sum: widths near a head's are fastest


@dataclass
class Sums:
    """What a row's past amounts to, in float32 at least: the sum of feature x value, and of the features."""

    kv_BKFE: Tensor
    k_BKF: Tensor

    @classmethod
    def empty(cls, batch: int, num_kv_heads: int, num_features: int, head_dim: int, like: Tensor) -> Self:
        """On the device of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (batch, num_kv_heads, num_features)
        return cls(like.new_zeros((*shape, head_dim), dtype=dtype), like.new_zeros(shape, dtype=dtype))

    def can_forget(self, length: int) -> bool:
        """Never: a sum does not tell what went into it."""
        return length == 0

    def begin(self, is_empty_B: Tensor) -> None:
        """Forget what rows held whose length is 0: another text begins."""
        self.kv_BKFE.masked_fill_(is_empty_B[:, None, None, None], 0)
        self.k_BKF.masked_fill_(is_empty_B[:, None, None], 0)


class Kernelised(Projected):
    """phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k) over what came before: arXiv 2006.16236, equations 4 to 12.

    A kind gives `features`, positive and float32 at least, and may turn them by their positions in the numerator.
    """

    masks = frozenset({"causal", "padding"})
    takes_bias = False
    num_features: int
    turns_features: ClassVar[bool] = False  # else queries and keys are turned before their features are made

    def features(self, x_BTHE: Tensor, *, is_query: bool) -> Tensor:
        """phi, as x_BTHF, of queries or keys."""
        raise NotImplementedError

    def forward(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor,
        mask: Mask,
        cache: Sums | None = None,
        values_BTJ: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, as out_BTD. With a cache, adds the new tokens to its sums."""
        q_BTHE, k_BTKE, v_BTKE = self.project(x_BTD, positions_BT, values_BTJ, turned=not self.turns_features)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)  # sums of many terms
        with torch.autocast(x_BTD.device.type, enabled=False):
            q_BTHF = self.features(q_BTHE.to(dtype), is_query=True)
            k_BTKF = self.features(k_BTKE.to(dtype), is_query=False)
            if (is_token_BT := _is_token(mask.places, positions_BT)) is not None:
                k_BTKF = k_BTKF * is_token_BT[:, :, None, None]
            if cache is not None:
                assert mask.places is not None and mask.places.known_B is not None
                cache.begin(mask.places.known_B == 0)
            sums_BTKF = running(k_BTKF, None if cache is None else cache.k_BKF)
            q_BTKGF = q_BTHF.unflatten(2, (self.num_kv_heads, -1))
            norms_BTH = (q_BTKGF * sums_BTKF[:, :, :, None]).sum(-1).flatten(2)
            if self.turns_features:
                q_BTHF, k_BTKF = (self.position.rotate(x, positions_BT) for x in (q_BTHF, k_BTKF))
            start = None if cache is None else cache.kv_BKFE
            out_BTHE, end_BKFE = summed(q_BTHF, k_BTKF, v_BTKE.to(dtype), start)
            if cache is not None:
                cache.kv_BKFE.copy_(end_BKFE)
                cache.k_BKF.copy_(sums_BTKF[:, -1])
            # Padding before a row's first token has a sum of 0; so have keys so large that no feature holds them. Those
            # sums and their like would be infinite in the backward pass, where they are squared.
            is_sum_BTH = norms_BTH > torch.finfo(dtype).tiny ** 0.5
            out_BTHE = out_BTHE / torch.where(is_sum_BTH, norms_BTH, 1)[..., None]
        return self.out(out_BTHE.flatten(-2).to(x_BTD.dtype))

    def new_state(self, batch: int, max_tokens: int, like: Tensor) -> Sums:
        """An empty state of B rows for decoding, of one size however long they get."""
        return Sums.empty(batch, self.num_kv_heads, self.num_features, self.head_dim, like)

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices, of the recurrent form: a key into the sums, a query by them."""
        return 2.0 * (self.num_kv_heads + self.num_heads) * self.num_features * self.head_dim


def running(x_BTKF: Tensor, start_BKF: Tensor | None = None) -> Tensor:
    """The sum of x over the tokens up to each of them, as sums_BTKF.

    In blocks, by products with a triangle of ones: torch's cumsum over tokens takes up to four times as long on a CPU.
    """
    num_tokens = x_BTKF.shape[1]
    if num_tokens == 1:
        return x_BTKF if start_BKF is None else x_BTKF + start_BKF[:, None]
    width = min(BLOCK_TOKENS, num_tokens)
    x_BCWKF = _blocks(x_BTKF, width)
    of_block_BCKF = x_BCWKF.sum(2)
    before_BCKF = of_block_BCKF.cumsum(1) - of_block_BCKF
    if start_BKF is not None:
        before_BCKF = before_BCKF + start_BKF[:, None]
    within_BCWKF = (x_BTKF.new_ones(width, width).tril() @ x_BCWKF.flatten(3)).view_as(x_BCWKF)
    return (within_BCWKF + before_BCKF[:, :, None]).flatten(1, 2)[:, :num_tokens]


def summed(q_BTHF: Tensor, k_BTKF: Tensor, v_BTKE: Tensor, start_BKFE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sum_{s <= t} (q_t k_s) v_s as out_BTHE, and the sum of k v^T after the last token as end_BKFE.

    arXiv 2006.16236, equations 18 to 20 for one token; for more of them equations 9 and 10, in blocks: within one by
    scores, of earlier ones by their sums. Heads h*H/K … share key/value head h. O(T) time and memory.
    """
    num_tokens, num_kv_heads = k_BTKF.shape[1:3]
    width = min(BLOCK_TOKENS, num_tokens)
    # The query heads that share keys stand one below the other: a product of larger matrices, and no copies of keys.
    q_BKCGWF = _blocks(q_BTHF, width).unflatten(3, (num_kv_heads, -1)).permute(0, 3, 1, 4, 2, 5)
    # Contiguous, or each product would make and keep a copy of its own.
    k_BKCWF, v_BKCWE = (_blocks(x, width).permute(0, 3, 1, 2, 4).contiguous() for x in (k_BTKF, v_BTKE))
    q_BKCQF = q_BKCGWF.flatten(3, 4)
    of_block_BKCFE = k_BKCWF.transpose(-1, -2) @ v_BKCWE
    after_BKCFE = of_block_BKCFE.cumsum(2)
    if start_BKFE is not None:
        after_BKCFE = after_BKCFE + start_BKFE[:, :, None]
    if num_tokens == 1:
        out_BKCQE = q_BKCQF @ after_BKCFE
    else:
        scores_BKCGWW = (q_BKCQF @ k_BKCWF.transpose(-1, -2)).unflatten(3, (-1, width)).tril()
        out_BKCQE = scores_BKCGWW.flatten(3, 4) @ v_BKCWE + q_BKCQF @ (after_BKCFE - of_block_BKCFE)
    out_BCWKGE = out_BKCQE.unflatten(3, (-1, width)).permute(0, 2, 4, 1, 3, 5)
    out_BTHE = out_BCWKGE.flatten(3, 4).flatten(1, 2)[:, :num_tokens]
    return out_BTHE, after_BKCFE[:, :, -1]


def _blocks(x: Tensor, width: int) -> Tensor:
    """B T … as B C W …, the last block filled up with zeros."""
    if fill := -x.shape[1] % width:  # pad copies even where there is nothing to add
        x = pad(x, (0, 0, 0, 0, 0, fill))
    return x.unflatten(1, (-1, width))


def _is_token(places: Places | None, positions_BT: Tensor) -> Tensor | None:
    """Which of the T tokens are no padding; None: all."""
    if places is None:
        return None
    if places.num_new_B is not None:
        return torch.arange(positions_BT.shape[1], device=positions_BT.device) < places.num_new_B[:, None]
    return None if places.k_segments_BS is None else places.k_segments_BS != PADDING
