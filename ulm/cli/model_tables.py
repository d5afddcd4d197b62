"""What `ulm show` prints of a model: its parts from the token to the logits, and what each costs."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ulm.cli.corpus_tables import right

HIDDEN = ("kind", "num_heads", "num_kv_heads", "head_dim", "d_hidden", "tied")  # said in words, or by the sizes


def model(spec: Any, built: Any, costs: dict[str, Any]) -> RenderableType:
    """The drawing with parameters and forward operations per token of each part, and the totals under it.

    `built` may be on the meta device; nothing of it is computed.
    """
    table = Table("part", "kind", *right("parameters", "MFLOP/token"), box=None, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{spec.vocab_size:,} of them, up to {spec.context_tokens:,} a row", "", "", style="dim")
    tied = " (is the head's table too)" if built.head.weight is built.embedding.weight else ""
    table.add_row("embedding", _said(spec.embedding) + tied, _count(built.embedding), "")
    table.add_row("position", _said(spec.position), _count(built.position), "")
    if spec.embedding_norm:
        table.add_row("norm", _said(spec.norm), _count(built.embedding_norm), "")
    number = 0
    for layer, same in groupby(spec.blocks_of_weights):
        num_blocks = len(list(same))
        _add_blocks(table, spec, layer, built.blocks[number], num_blocks)
        number += num_blocks
    table.add_row("norm", "none: the last layer's is one" if spec.norm_placement == "after" else _said(spec.norm),
                  _count(built.norm), "")  # fmt: skip
    head = 0 if tied else sum(p.numel() for p in built.head.parameters())
    flops = 2 * spec.vocab_size * spec.d_model / 1e6
    table.add_row("head", _said(spec.head), f"{head:,}", f"{flops:.2f}")
    masks = ", ".join(config.kind for config in spec.mask)
    lines = [
        f"mask: {masks}; {spec.d_model} wide, {spec.num_layers} layers",
        f"{costs['parameters']:,} parameters, {costs['parameters'] * 2 / 1e6:.1f} MB in bfloat16",
        f"{costs['forward_flops_per_token'] / 1e6:,.2f} MFLOP a token forward, "
        f"{costs['train_flops_per_token'] / 1e6:,.2f} to train, in rows of {spec.context_tokens:,}",
        f"cache (bfloat16): {costs['cache_bytes_per_token']:,} bytes a token and {costs['cache_bytes_fixed']:,} a row",
    ]
    return Group(table, Text(), *(Text(line) for line in lines))


def _add_blocks(table: Table, spec: Any, layer: Any, block: Any, num_blocks: int) -> None:
    """The rows of `num_blocks` equal blocks, drawn once, with what one of them costs."""
    num_layers = num_blocks * spec.layers_per_block
    times = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    if spec.layers_per_block > 1:
        times += f" of {num_blocks} x weights, each {spec.layers_per_block} times in a row"
    table.add_row(f"┌ {times}", f"norms {layer.norm_placement}; of one block:", "", "", style="bold")
    heads = (
        f"{spec.num_heads} heads of {spec.head_dim}, {getattr(layer.attention, 'num_kv_heads', 1)} of keys and values"
    )
    norms = sum(p.numel() for name, p in block.named_parameters() if "norm" in name.partition(".")[0])
    table.add_row("│ norm", _said(layer.norm), f"{norms:,}", "")
    if layer.position != spec.position:
        table.add_row("│ position", _said(layer.position), "", "")
    from ulm.models.account import block_flops, own_parameters  # needs torch

    num_own = sum(p.numel() for p in own_parameters(block.attention))
    attention, feedforward = (f"{flops / 1e6:.2f}" for flops in block_flops(block, spec.context_tokens))
    table.add_row("│ attention", _said(layer.attention, heads), f"{num_own:,}", attention)
    widths = {p.shape[1] for name, p in block.feedforward.named_parameters() if name.endswith("out.weight")}
    hidden = f"{widths.pop()} hidden units" if len(widths) == 1 else ""  # of each expert, where there are several
    table.add_row("└ feedforward", _said(layer.feedforward, hidden), _count(block.feedforward), feedforward)


def _said(config: Any, more: str = "") -> str:
    """A kind with the settings that differ from its defaults."""
    fields = type(config).model_fields
    settings = {k: v for k, v in config if k not in HIDDEN and v != fields[k].default}
    parts = [more] if more else []
    parts += [f"{key.replace('_', ' ')}{'' if value is True else f' {value}'}" for key, value in settings.items()]
    return f"{config.kind}: {', '.join(parts)}" if parts else str(config.kind)


def _count(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
