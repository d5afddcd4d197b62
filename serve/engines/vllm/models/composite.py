"""Several models in one engine: each with its keys and values, their probabilities mixed for each request.

A request says its weights in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`) as {"mix": {id: weight}}; without,
those of the folder hold. The engine needs `logits_processors=[LOGITS_PROCESSOR]` to hear of them. This is for vLLM's
first model runner (VLLM_USE_V2_MODEL_RUNNER=0, what a CPU has), without CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ulm.errors import UnsupportedError

LOGITS_PROCESSOR = "serve.engines.vllm.models.composite:MixtureWeights"
PLACE = "ulm_mixture"  # in the engine's own table of layers, by which the processor below finds the model
logger = init_logger(__name__)


class UlmMixtureForCausalLM(nn.Module):
    """log sum_n w_n p_n(token), as scores: their softmax is the mixture, so sampling and logprobs are the mixture's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if not (current_platform.is_cpu() or vllm_config.model_config.enforce_eager):
            raise UnsupportedError(
                "a mixture in vLLM: weights change between steps, so CUDA graphs must be off (eager)"
            )
        root = Path(vllm_config.model_config.model)
        self.ids: list[str] = list(vllm_config.model_config.hf_config.experts)
        folders = [str((root / place).resolve()) for place in vllm_config.model_config.hf_config.experts.values()]
        configs = [get_config(folder, trust_remote_code=False) for folder in folders]
        # vLLM reads a layer's number from its name, so an expert's is no part of its own between dots.
        self.experts: Any = nn.ModuleList(
            init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, f"expert{number}"),
                hf_config=config,
                architectures=config.architectures,
            )
            for number, config in enumerate(configs)
        )
        self.widths = [config.hidden_size for config in configs]
        self.weights = nn.Parameter(torch.empty(len(folders), dtype=torch.float32), requires_grad=False)
        self.secondary_weights = [
            DefaultModelLoader.Source(folder, revision=None, prefix=f"experts.{number}.")
            for number, folder in enumerate(folders)
        ]
        self.asked: dict[int, list[float]] = {}  # weights that a request of the batch has of its own, by its row
        vllm_config.compilation_config.static_forward_context[PLACE] = self

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Vectors of tokens for all experts, side by side."""
        return torch.cat([expert.embed_input_ids(input_ids) for expert in self.experts], dim=-1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The experts' states side by side, and each token's weights behind them, bit by bit, as x_TJ."""
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise UnsupportedError("a mixture in vLLM reads token ids, on one stage of a pipeline")
        states = [expert(input_ids, positions) for expert in self.experts]
        return torch.cat([*states, self._weights_TN(len(input_ids)).view(states[0].dtype)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """log p of the mixture for each row, in float32."""
        *states, weights = hidden_states.split([*self.widths, hidden_states.shape[1] - sum(self.widths)], dim=-1)
        log_weights_TN = weights.contiguous().view(torch.float32).log()
        logprobs_NTV = torch.stack(
            [
                expert.compute_logits(x_TD.contiguous()).float().log_softmax(-1)
                for expert, x_TD in zip(self.experts, states, strict=True)
            ]
        )
        return (logprobs_NTV + log_weights_TN.T[:, :, None]).logsumexp(0)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes in the tensors of the folder and of its experts; returns the names of what has its weights now."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded

    def _weights_TN(self, num_tokens: int) -> Tensor:
        """The weights of each token's request, which sum to 1."""
        usual_N = self.weights / self.weights.sum()
        weights_TN = usual_N.repeat(num_tokens, 1)
        found = get_forward_context().attn_metadata
        if self.asked and found:  # none while vLLM measures its memory
            starts = next(iter(found.values())).query_start_loc.tolist()
            for row, asked in self.asked.items():
                if row + 1 < len(starts):
                    weights_TN[starts[row] : starts[row + 1]] = weights_TN.new_tensor(asked)
        return weights_TN


class MixtureWeights(LogitsProcessor):
    """Tells the model which weights each row of the batch asks for. It leaves logits alone: they are mixed already."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context
        self.asked: dict[int, dict[str, float]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for weights that are none; which experts there are is not known here."""
        mix = (sampling_params.extra_args or {}).get("mix")
        if mix is None:
            return
        if not isinstance(mix, dict) or not all(isinstance(w, int | float) and 0 <= w < math.inf for w in mix.values()):
            raise ValueError(f"mix: {mix!r} is no mapping of experts to weights, each 0 or more")
        if not sum(mix.values()) > 0:
            raise ValueError("mix: all weights are 0; one must be more")

    def is_argmax_invariant(self) -> bool:
        """Logits stay as they are."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests through the rows of the batch, before each forward pass."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.asked.pop(row, None)
        for row, params, *_ in batch_update.added:
            self.asked.pop(row, None)
            if mix := (params.extra_args or {}).get("mix"):
                self.asked[row] = mix
        for source, target, direction in batch_update.moved:
            moved, replaced = self.asked.pop(source, None), self.asked.pop(target, None)
            if moved is not None:
                self.asked[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.asked[source] = replaced
        model = self.layers[PLACE]
        model.asked = {row: _in_order(mix, model.ids) for row, mix in self.asked.items()}


def _in_order(mix: dict[str, float], ids: list[str]) -> list[float]:
    """The weights of all experts, to a sum of 1; those of strangers are left out, all equal where none is left.

    An exception here would end the engine and everybody's answers: who sends requests checks the names.
    """
    if strangers := mix.keys() - set(ids):
        logger.error("mix: no expert %s in this mixture, which has %s", sorted(strangers), ids)
    weights = [float(mix.get(name, 0.0)) for name in ids]
    total = sum(weights)
    return [weight / total for weight in weights] if total else [1 / len(ids)] * len(ids)
