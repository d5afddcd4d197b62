"""A ulm decoder as vLLM runs it: our components as they are, on vLLM's matrices and vLLM's keys and values.

So a kind of norm, position, feed-forward layer or embedding is written once, in ulm/components. All sequences of a step
stand end to end in one row, whose tokens vLLM tells apart when it looks up what they may see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.platforms import current_platform

from ulm import registry
from ulm.components.contracts import Mask
from ulm.components.feedforward.moe import MixtureOfExperts
from ulm.components.feedforward.swiglu import SwiGLU
from ulm.errors import UnsupportedError
from ulm.exchange.own import vllm_refusals
from ulm.models.account import on_meta
from ulm.spec import ModelSpec

# Names in a folder, as patterns, and what stands there here, one after the other.
PLACES = {
    r"^model\.embedding\.weight$": "model.embedding.table.weight",
    r"^model\.": "model.decoder.",
    **{
        rf"(\.feedforward\.experts\.\d+\.){ours}\.": rf"\1{theirs}_proj."  # vLLM's experts know no others
        for ours, theirs in (("gate", "gate"), ("up", "up"), ("out", "down"))
    },
}


class VllmKeyValues:
    """A layer's past in vLLM's pages, as our attention by scores wants it."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def attend(self, attention: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Mask) -> Tensor:
        """What the T queries of the one row find, each in its own sequence, as out_BTHE."""
        out_TJ: Tensor = self.attention(*(x[0].flatten(-2) for x in (q_BTHE, k_BTKE, v_BTKE)))
        return out_TJ.view_as(q_BTHE)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class UlmModel(nn.Module):
    """The decoder of a spec up to its last norm."""

    def __init__(self, *, vllm_config: VllmConfig, spec: ModelSpec, prefix: str = "") -> None:
        super().__init__()
        self.spec, self.config, self.prefix = spec, vllm_config, prefix
        self.quant = vllm_config.quant_config
        self.stacked: dict[str, tuple[str, str | int]] = {}  # part of a stored name -> the matrix it is part of
        self.rank, self.num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        if reasons := vllm_refusals(spec):
            raise UnsupportedError(f"vLLM cannot run this model: {'; '.join(reasons)} (the local engine can)")
        if self.num_ranks > 1 and any(layer.attention.qk_norm == "whole" for layer in self._layers()):
            raise UnsupportedError("qk_norm: whole is over all heads, so tensor_parallel_size must be 1")
        decoder = on_meta(spec)
        for number, block in enumerate(decoder.blocks):
            self._exchange_attention(block.attention, f"blocks.{number}.attention")
            self._exchange_feedforward(block, f"blocks.{number}.feedforward")
        self._exchange_embedding(decoder.embedding)
        decoder.head = nn.Identity()  # the scores are UlmForCausalLM's
        for position, config in decoder.positions.items():  # tables that are not stored
            for name, table in registry.find("position", config.kind)(config, decoder.dims).named_buffers():
                setattr(position, name, table)
        _materialise(decoder)
        self.attentions = nn.ModuleList(
            self._attention(block.attention, layer) for layer, block in enumerate(decoder.layers)
        )
        self.states = [VllmKeyValues(attention) for attention in self.attentions]
        self.decoder = decoder

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The last layer's normed state of tokens laid end to end, as x_TD."""
        x_BTD: Tensor = self.decoder.advance(input_ids[None], positions[None], Mask(), self.states)
        return x_BTD[0]

    def _layers(self) -> list[Any]:
        return self.spec.blocks_of_weights

    def _share(self, num_heads: int) -> tuple[int, int]:
        """The first of the heads that this rank has, and how many; fewer heads than ranks stand several times."""
        num = max(1, num_heads // self.num_ranks)
        return self.rank * num_heads // self.num_ranks, num

    def _attention(self, attention: Any, layer: int) -> Attention:
        """vLLM's side of a layer: its pages, and what is done to scores. Layers that share weights have one each."""
        first, num_heads = self._share(attention.num_heads)
        slopes = None
        if attention.position.has_bias:
            slopes = attention.position.slopes_H[first : first + num_heads].tolist()
        more = {} if attention.sinks is None else {"sinks": attention.sinks}
        return Attention(
            num_heads,
            attention.head_dim,
            attention.head_dim**-0.5,  # another scale is in the queries
            num_kv_heads=self._share(attention.num_kv_heads)[1],
            alibi_slopes=slopes,
            cache_config=self.config.cache_config,
            quant_config=self.quant,
            logits_soft_cap=attention.soft_cap,
            per_layer_sliding_window=attention.window_tokens,
            prefix=f"{self.prefix}.layers.{layer}.attn",
            **more,
        )

    def _exchange_attention(self, attention: Any, place: str) -> None:
        has_bias = attention.q.bias is not None
        width = attention.q.in_features
        attention.qkv = QKVParallelLinear(
            width,
            attention.head_dim,
            attention.num_heads,
            attention.num_kv_heads,
            bias=has_bias,
            quant_config=self.quant,
            prefix=f"{self.prefix}.{place}.qkv",
            return_bias=False,
        )
        sizes = [
            self._share(num)[1] * attention.head_dim for num in (attention.num_heads, *[attention.num_kv_heads] * 2)
        ]
        attention.products = lambda x_BTD: attention.qkv(x_BTD).split(sizes, dim=-1)
        for name in ("q", "k", "v"):
            delattr(attention, name)
            self.stacked[f"{place}.{name}."] = (f"{place}.qkv.", name)
        attention.out = self._spread(RowParallelLinear, attention.out, f"{place}.out")
        if attention.sinks is not None:
            # vLLM's CPU kernel reads sinks in bfloat16 alone: they are rounded to 8 bits there, beside float32 weights.
            dtype = torch.bfloat16 if current_platform.is_cpu() else torch.get_default_dtype()
            attention.sinks = self._shared(attention.sinks.to(dtype), 0, attention.num_heads, 1)

    def _exchange_feedforward(self, block: Any, place: str) -> None:
        feedforward = block.feedforward
        if isinstance(feedforward, MixtureOfExperts):
            block.feedforward = Experts(feedforward, self.quant, f"{self.prefix}.{place}")
            return
        if isinstance(feedforward, SwiGLU):
            self._join_gate(feedforward, place)
        for name in ("gate", "up"):
            if hasattr(feedforward, name):
                setattr(
                    feedforward, name, self._spread(ColumnParallelLinear, getattr(feedforward, name), f"{place}.{name}")
                )
        feedforward.out = self._spread(RowParallelLinear, feedforward.out, f"{place}.out")

    def _join_gate(self, feedforward: Any, place: str) -> None:
        """One matrix for gate and up."""
        sizes = [feedforward.gate.out_features] * 2
        feedforward.gate_up = MergedColumnParallelLinear(
            feedforward.gate.in_features,
            sizes,
            bias=False,
            quant_config=self.quant,
            prefix=f"{self.prefix}.{place}.gate_up",
            return_bias=False,
        )
        act = SiluAndMul()
        feedforward.gated = lambda x_BTD: act(feedforward.gate_up(x_BTD))
        for number, name in enumerate(("gate", "up")):
            delattr(feedforward, name)
            self.stacked[f"{place}.{name}."] = (f"{place}.gate_up.", number)

    def _exchange_embedding(self, embedding: Any) -> None:
        embedding.table = VocabParallelEmbedding(
            self.spec.vocab_size, self.spec.d_model, quant_config=self.quant, prefix=f"{self.prefix}.embedding"
        )
        embedding.look_up = lambda tokens_BT: embedding.table(tokens_BT)  # a module would stand behind the method
        del embedding.weight
        if hasattr(embedding, "tables"):  # of values: rows of the vocabulary, the columns of this rank's heads
            heads = (self.spec.num_kv_heads, self.spec.head_dim)
            tables = [torch.empty(self.spec.vocab_size, heads[0] * heads[1], device="meta") for _ in embedding.tables]
            embedding.tables = nn.ParameterList(self._shared(table, 1, *heads) for table in tables)

    def _spread(self, kind: Any, linear: nn.Linear, place: str) -> Any:
        """A matrix of vLLM's, its columns or its rows spread over the ranks."""
        return kind(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_config=self.quant,
            prefix=f"{self.prefix}.{place}",
            return_bias=False,
        )

    def _shared(self, whole: Tensor, dim: int, num_heads: int, width: int) -> nn.Parameter:
        """A real parameter of this rank's heads alone, which takes its part of what is stored."""
        first, num = self._share(num_heads)
        shape = list(whole.shape)
        shape[dim] = num * width
        part = nn.Parameter(torch.empty(shape, dtype=whole.dtype), requires_grad=False)

        def load(param: Tensor, loaded_weight: Tensor) -> None:  # by these names vLLM calls it when it loads again
            param.data.copy_(loaded_weight.narrow(dim, first * width, num * width))

        part.weight_loader = load  # type: ignore[attr-defined]
        return part


class Experts(nn.Module):
    """A mixture of experts by vLLM's kernels, which choose and weigh as MixtureOfExperts does."""

    def __init__(self, moe: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        num_experts, width, top_k = moe.router.out_features, moe.router.in_features, moe.experts_per_token
        self.router = ReplicatedLinear(
            width, num_experts, bias=False, quant_config=None, prefix=f"{prefix}.router", return_bias=False
        )
        self.experts = FusedMoEFactory(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=width,
            intermediate_size=moe.experts[0].out.in_features,
            renormalize=top_k > 1,  # a single expert is weighed by its probability among all
            quant_config=quant,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, as out_BTD."""
        x_TD = x_BTD.flatten(0, 1)
        out_TD: Tensor = self.experts(x_TD, self.router(x_TD))
        return out_TD.view_as(x_BTD)


def _materialise(decoder: nn.Module) -> None:
    """Real tensors for the parameters that are used as they are, in vLLM's dtype and on its device."""
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))


class UlmForCausalLM(nn.Module):
    """The decoder and its scores, in the form that vLLM asks of a model."""

    packed_modules_mapping = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}  # for quantised ones

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.spec = ModelSpec(**config.spec)
        self.model = UlmModel(vllm_config=vllm_config, spec=self.spec, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.spec.vocab_size,
            self.spec.d_model,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.decoder.embedding.table)
        self.logits_processor = LogitsProcessor(self.spec.vocab_size, soft_cap=getattr(self.spec.head, "cap", None))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Vectors of tokens, without what positions add."""
        x_TD: Tensor = self.model.decoder.embedding(input_ids)
        return x_TD

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The last layer's normed state of tokens laid end to end, as x_TD."""
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise UnsupportedError("a ulm model in vLLM reads token ids, on one stage of a pipeline")
        x_TD: Tensor = self.model(input_ids, positions)
        return x_TD

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Scores of the vocabulary; None on ranks that do not sample."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes in the tensors of a folder; returns the names of what has its weights now."""
        mapper = WeightsMapper(
            orig_to_new_regex={re.compile(stored): ours for stored, ours in PLACES.items()},
            orig_to_new_stacked=self.model.stacked,
        )
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        return loaded
