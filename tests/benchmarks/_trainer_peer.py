"""transformers' Trainer on a Llama model of given sizes, as one JSON line: tokens per second after the warm-up.

`.venv-peers/bin/python _trainer_peer.py SETTINGS`; SETTINGS is a JSON object with the sizes that train.py takes from
our spec, the tokens (a file of uint16), rows of a batch and of a micro-batch, dtype and whether to compile. Its rate,
clipping, weight decay, betas and schedule are ours; nothing is logged, evaluated or saved.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(Dataset):
    """Rows of consecutive tokens, over and over."""

    def __init__(self, path: str, context_tokens: int, num_rows: int) -> None:
        tokens = np.fromfile(path, np.uint16).astype(np.int64)
        whole = len(tokens) // context_tokens
        self._rows = torch.from_numpy(tokens[: whole * context_tokens]).view(whole, context_tokens)
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index % len(self._rows)]
        return {"input_ids": row, "labels": row}  # the model shifts them itself


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.ends_s: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.ends_s.append(time.perf_counter())


def main() -> None:
    """Train as many steps as asked for and print their speed."""
    given = json.loads(sys.argv[1])
    if given["device"] == "cpu":
        torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=given["vocab_size"],
            hidden_size=given["d_model"],
            intermediate_size=given["d_hidden"],
            num_hidden_layers=given["num_layers"],
            num_attention_heads=given["num_heads"],
            num_key_value_heads=given["num_kv_heads"],
            max_position_embeddings=given["context_tokens"],
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    steps, rows, micro_rows = given["steps"], given["rows"], given["micro_rows"]
    clock = Clock(given["device"])
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=rows // micro_rows,
            use_cpu=given["device"] == "cpu",
            bf16=given["dtype"] == "bfloat16",
            torch_compile=given["compile"],
            optim="adamw_torch_fused",
            learning_rate=1.2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=given["warm_up_steps"],
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=given["device"] == "cuda",
        )
        dataset = Rows(given["tokens"], given["context_tokens"], steps * rows)
        trained = Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[clock]).train()
    timed_s = clock.ends_s[-1] - clock.ends_s[given["warm_up_steps"] - 1]
    tokens = (steps - given["warm_up_steps"]) * rows * given["context_tokens"]
    line = {
        "tokens_per_second": tokens / timed_s,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": trained.training_loss,
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
