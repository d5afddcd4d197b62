"""A ulm decoder in transformers, from the spec in its configuration: embedding, layers, norm, head.

Shape letters, as suffixes of tensor names: B batch, T new tokens, S known tokens, D model width, H heads, K key/value
heads, E head width, F pairs of dimensions or features, J K x E, M tokens of all rows, N experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_ulm import ATTENTIONS, Places, UlmKernelAttention, is_seen, norm_of
from .configuration_ulm import UlmConfig
from .layers_ulm import UlmBlock, UlmEmbedding
from .positions_ulm import POSITIONS, NoPosition


class UlmPreTrainedModel(PreTrainedModel):
    """What both models are to transformers."""

    config_class = UlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UlmBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UlmBlock}
    _input_embed_layer = "embedding"

    @property
    def _supports_sdpa(self) -> bool:
        """PyTorch's kernel has no place for caps and sinks."""
        kinds = [block["attention"] for block in self.config.blocks]
        return not any(kind.get("soft_cap") or kind.get("sinks") for kind in kinds)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoPosition):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and not isinstance(module, nn.Linear | nn.Embedding):
                init.normal_(parameter, mean=0.0, std=0.02)


class UlmModel(UlmPreTrainedModel):
    """The decoder up to its last norm."""

    def __init__(self, config: UlmConfig) -> None:
        super().__init__(config)
        spec, blocks = config.spec, config.blocks
        if config._attn_implementation == "vllm" and (reasons := _no_backend(config)):
            problem = f"vLLM's transformers backend would compute something else: {', '.join(reasons)}"
            raise ValueError(f"{problem}; install ulm beside vLLM, whose plugin brings a model of its own")
        self.embedding = UlmEmbedding(config, spec["embedding"])
        self.embedding_norm = norm_of(spec["norm"], config) if spec["embedding_norm"] else nn.Identity()
        self.position = POSITIONS[spec["position"]["kind"]](spec["position"], config)
        # Positions that single layers have in place of the model's; none of them has weights.
        own = [block["position"] for block in blocks if block["position"] != spec["position"]]
        own = [position for number, position in enumerate(own) if position not in own[:number]]
        self.own_positions = nn.ModuleList(POSITIONS[position["kind"]](position, config) for position in own)
        self.position_of = [own.index(block["position"]) if block["position"] in own else None for block in blocks]
        self.blocks = nn.ModuleList(UlmBlock(config, block, number) for number, block in enumerate(blocks))
        self.norm = nn.Identity() if spec["norm_placement"] == "after" else norm_of(spec["norm"], config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last layer's normed state; `attention_mask` is 2D, of the known tokens too, padding on any side."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if input_ids is None and self.embedding.table_of:
            raise ValueError("this model adds embeddings of tokens to its values: it needs input_ids")
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_known = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = _placed(x_BTD, num_known, attention_mask, position_ids, self.config.max_position_embeddings)
        x_BTD = self.embedding_norm(self.position.embed(x_BTD, places.q_BT))
        masks: dict[Any, tuple[Places, Tensor | None]] = {}  # layers of one kind have the same
        for layer in range(self.config.num_hidden_layers):
            number = layer // self.config.layers_per_block
            block, of_block = self.blocks[number], self.position_of[number]
            position = self.position if of_block is None else self.own_positions[of_block]
            window = block.attention.spec.get("window_tokens"), block.attention.spec.get("num_sink_tokens", 0)
            if (window, position) not in masks:
                seen = _held(places, past_key_values, layer)
                masks[window, position] = seen, self._mask(x_BTD, seen, window, position)
            seen, mask = masks[window, position]
            x_BTD = block(
                x_BTD,
                layer=layer,
                position=position,
                places=seen,
                mask=mask,
                values_BTJ=None if input_ids is None else self.embedding.values(input_ids, layer),
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def _mask(
        self, x_BTD: Tensor, places: Places, window: tuple[int | None, int], position: NoPosition
    ) -> Tensor | None:
        """What is added to scores: the bias of distances, and the lowest number where a query must not look.

        None where plain causality is all and the kernel knows it: of new rows without padding.
        """
        implementation, num_tokens = self.config._attn_implementation, x_BTD.shape[1]
        if implementation == "vllm":  # it knows the rows of its tokens, which here stand in one
            return None
        is_plain = len(places.k_BS) == 1 and places.k_BS.shape[1] == num_tokens and not position.has_bias
        if is_plain and implementation == "sdpa" and (window[0] is None or num_tokens <= window[0]):
            return None
        is_seen_B1TS = is_seen(places, *window)[:, None]
        bias = x_BTD.new_zeros(())
        if position.has_bias:
            bias = position.bias(places.q_BT[:, :, None] - places.k_BS[:, None, :]).to(x_BTD.dtype)
        # Not -inf: padding that may look nowhere would become NaN, and a share of 0 keeps no NaN out.
        return torch.where(is_seen_B1TS, bias, torch.finfo(x_BTD.dtype).min)


def _placed(
    x_BTD: Tensor, num_known: int, attention_mask: Tensor | None, position_ids: Tensor | None, context_tokens: int
) -> Places:
    """Where new and known tokens stand, by how many of their row come before them."""
    num_tokens, device = x_BTD.shape[1], x_BTD.device
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("attention_mask must be 2D, one number a token: the model makes the mask of pairs itself")
    if attention_mask is None or bool(attention_mask.all()):
        k_BS = torch.arange(num_known + num_tokens, device=device)[None]
    else:
        k_BS = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, -1).to(device)
    q_BT = k_BS[:, num_known : num_known + num_tokens].clamp_min(0) if position_ids is None else position_ids
    # More tokens than that may be right where some are padding, so only then are the positions looked at.
    if num_known + num_tokens > context_tokens and int(q_BT.max()) >= context_tokens:
        raise ValueError(f"the text is longer than the model's {context_tokens} tokens of context")
    return Places(q_BT, k_BS)


def _held(places: Places, past_key_values: Cache | None, layer: int) -> Places:
    """The same with the known tokens that a layer's cache holds: a sliding one drops the first, a static one has more.

    What is not there yet is padding.
    """
    if past_key_values is None:
        return places
    num_held, first = past_key_values.get_mask_sizes(places.q_BT.shape[1], layer)
    k_BS = places.k_BS[:, first : first + num_held]
    return Places(places.q_BT, nn.functional.pad(k_BS, (0, num_held - k_BS.shape[1]), value=-1))


def _no_backend(config: UlmConfig) -> list[str]:
    """What vLLM's transformers backend would leave out without a word, for it takes no mask and one form of layer."""
    blocks = config.blocks
    attentions = [block["attention"] for block in blocks]
    windows = [kind.get("window_tokens") for kind in attentions]
    told = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types or ()]
    found = {
        "a bias of scores": any(POSITIONS[block["position"]["kind"]].has_bias for block in blocks),
        "attention without scores": any(ATTENTIONS[kind["kind"]] is UlmKernelAttention for kind in attentions),
        "sinks": any(kind.get("sinks") for kind in attentions),
        "windows of several widths, of one token, or beside a text's first tokens": windows != told,
        "layers with different heads or caps": len({(k["num_kv_heads"], k.get("soft_cap")) for k in attentions}) > 1,
        "layers that share weights": config.layers_per_block > 1,
        "embeddings of values": config.spec["embedding"]["kind"] == "value",
        "scaled embeddings": config.spec["embedding"]["scaled"],
    }
    return [reason for reason, is_so in found.items() if is_so]


class UlmForCausalLM(UlmPreTrainedModel, GenerationMixin):
    """The decoder and its scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: UlmConfig) -> None:
        super().__init__(config)
        self.model = UlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cap = config.spec["head"].get("cap")  # arXiv 2408.00118, section 2.3
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token at all positions, or at the last `logits_to_keep`; a loss where labels are given."""
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BTV = self.lm_head(slice_logits_to_keep(found.last_hidden_state, logits_to_keep))
        if self.cap is not None:
            logits_BTV = self.cap * torch.tanh(logits_BTV / self.cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
