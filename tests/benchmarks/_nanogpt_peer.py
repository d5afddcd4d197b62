"""nanoGPT's way of stepping, written from its description, as one JSON line: tokens per second after the warm-up.

`python _nanogpt_peer.py SETTINGS`, in the project's own environment; SETTINGS as _trainer_peer.py's. The way: a GPT-2
(learned positions, LayerNorm before the sub-layers, keys and values for every head, GELU, tied head), compiled whole;
windows at random places of a file of tokens; logits of a whole micro-batch at once; gradients clipped; fused AdamW. The
hidden width is such that it has as many parameters as the model compared with.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Attention and feed-forward, each on a normed input, each added to it."""

    def __init__(self, d_model: int, num_heads: int, d_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.feedforward_norm = nn.LayerNorm(d_model, bias=False)
        self.feedforward = nn.Sequential(
            nn.Linear(d_model, d_hidden, bias=False), nn.GELU(), nn.Linear(d_hidden, d_model, bias=False)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output, as x_BTD."""
        split = self.qkv(self.attention_norm(x_BTD)).unflatten(-1, (3, self.num_heads, -1))
        q_BHTE, k_BHTE, v_BHTE = (x_BTHE.transpose(1, 2) for x_BTHE in split.unbind(2))
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTE.transpose(1, 2).flatten(2))
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))


class Gpt(nn.Module):
    """The model and its mean loss."""

    def __init__(self, given: dict[str, Any], d_hidden: int) -> None:
        super().__init__()
        d_model = given["d_model"]
        self.tokens = nn.Embedding(given["vocab_size"], d_model)
        self.positions = nn.Embedding(given["context_tokens"], d_model)
        self.layers = nn.Sequential(*(Layer(d_model, given["num_heads"], d_hidden) for _ in range(given["num_layers"])))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Nats per target."""
        places_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
        x_BTD = self.layers(self.tokens(inputs_BT) + self.positions(places_T))
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def hidden_width(given: dict[str, Any]) -> int:
    """Such that the model has the parameters asked for, to a multiple of 32."""
    d_model = given["d_model"]
    tables = (given["vocab_size"] + given["context_tokens"] + 1) * d_model
    of_layer = (given["parameters"] - tables) / given["num_layers"] - 4 * d_model**2 - 2 * d_model
    return 32 * round(of_layer / (2 * d_model) / 32)


def main() -> None:
    """Make as many steps as asked for and print their speed."""
    given = json.loads(sys.argv[1])
    device, rows, micro_rows, context_tokens = (
        given["device"], given["rows"], given["micro_rows"], given["context_tokens"]
    )  # fmt: skip
    if device == "cpu":
        torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    tokens = np.memmap(given["tokens"], np.uint16, mode="r")
    model = Gpt(given, hidden_width(given)).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.2e-3, betas=(0.9, 0.95), fused=True)
    objective = torch.compile(model) if given["compile"] else model
    mixed = contextlib.nullcontext()
    if given["dtype"] == "bfloat16":
        mixed = torch.autocast(device, torch.bfloat16)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - context_tokens, (micro_rows,)).tolist()
        rows_BT = torch.from_numpy(np.stack([tokens[s : s + context_tokens + 1] for s in starts]).astype(np.int64))
        if device == "cuda":
            rows_BT = rows_BT.pin_memory().to(device, non_blocking=True)
        return rows_BT[:, :-1], rows_BT[:, 1:]

    started_s, loss = 0.0, torch.zeros(())
    for step in range(given["steps"]):
        if step == given["warm_up_steps"]:
            _wait(device)
            started_s = time.perf_counter()
        for _ in range(rows // micro_rows):
            with mixed:
                loss = objective(*batch())
            (loss * (micro_rows / rows)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(device)
    timed_s = time.perf_counter() - started_s
    line = {
        "tokens_per_second": (given["steps"] - given["warm_up_steps"]) * rows * context_tokens / timed_s,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss.item(),
    }
    sys.stdout.write(json.dumps(line) + "\n")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
