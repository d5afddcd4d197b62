"""A small model that has learned a little English, and the comparison of greedy answers: `from tests.trained import …`.

Fresh weights answer at random, with top logits so close that two right engines may differ; trained ones are decided.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ulm
from ulm import registry
from ulm.tokenizers.bpe import train_bpe

TIE = 1e-3  # top logits closer than this may swap by the order of float32 sums
VOCAB_SIZE, CONTEXT_TOKENS = 512, 128
NUM_STEPS, BATCH_ROWS, ROW_TOKENS, PEAK_LR = 300, 8, 64, 3e-3
PROMPTS = ("The statement", "A class is", "If the object", "Changed in version", "for each of the")


def trained_nano(folder: Path) -> Path:
    """A checkpoint at `folder`: nano after 300 small steps on Python's own reference prose (8 s on one core).

    One that stands there already is taken as it is, so that a session trains once.
    """
    if (folder / "manifest.json").is_file():
        return folder
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    tokenizer = train_bpe(texts, VOCAB_SIZE)
    tokens_N = torch.tensor([t for text in tokenizer.encode_batch(texts) for t in (tokenizer.eot_id, *text)])
    spec = ulm.ModelSpec.preset("nano", vocab_size=tokenizer.vocab_size, context_tokens=CONTEXT_TOKENS)
    model = ulm.build(spec, seed=0)
    optimizer = registry.find("optimizer", "adamw").build(registry.configure("optimizer", "adamw"), model, lr=PEAK_LR)
    generator = torch.Generator().manual_seed(0)
    schedule = registry.configure("schedule", "cosine")
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * registry.find("schedule", "cosine").share(schedule, step, NUM_STEPS)
        starts_B = torch.randint(len(tokens_N) - ROW_TOKENS - 1, (BATCH_ROWS, 1), generator=generator)
        rows_BT = tokens_N[starts_B + torch.arange(ROW_TOKENS + 1)]
        logits_BTV = model(rows_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 4.5, f"ln {VOCAB_SIZE} is 6.2, the unigrams' entropy about 5; the loss is still {loss.item()}"
    return ulm.save(model, tokenizer, folder, step=NUM_STEPS, run="trained-nano")


def equal_until_a_tie(model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two greedy answers are equal; False if they part where the top two logits tie (count these)."""
    return num_equal_tokens(model, prompt, ours, theirs) == max(len(ours), len(theirs))


@torch.no_grad()
def num_equal_tokens(model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Of two greedy answers, up to where they part, which must be where the top two logits tie.

    Parting anywhere else is an AssertionError. <|endoftext|> at the end, which some engines hand out, is no difference
    if the caller cuts it off.
    """
    if list(ours) == list(theirs):
        return len(ours)
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    logits_V = model(torch.tensor([[*prompt, *ours[:at]]]))[0, -1]
    first, second = logits_V.topk(2).values.tolist()
    assert first - second < TIE, f"part at token {at} with {first - second:.4f} between the top two: {ours} {theirs}"
    return at
