"""An exported Hugging Face folder with its matrices as integers, in the format of compressed-tensors."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ulm import artefacts
from ulm.components.loss import nats_per_target
from ulm.errors import ArtefactError, ConfigError, UnsupportedError
from ulm.exchange.folder import DTYPES, empty, write_json
from ulm.tokenizers.tokenizer import Tokenizer

GROUP_SIZES = (128, 64, 32)  # numbers of a row that share a scale; the widest that divides all rows is taken
MULTIPLE = 32  # of both sides of a matrix: what the four-bit kernels of vLLM on a CPU take
NOT_LINEAR = {
    "GPT2LMHeadModel": "its matrices are Conv1D's, which compressed-tensors does not know",
    "MixtralForCausalLM": "transformers keeps its experts in one tensor, which compressed-tensors does not know",
    "UlmForCausalLM": "a folder that brings its own code is read by fewer tools as it is; quantise a stock one",
}
TABLES = ("embed_tokens.weight", "word_embeddings.weight", "lm_head.weight")
# Shares of the largest number that a scale may reach to. In four bits clipping the largest costs less than a coarser
# grid for all others: of normal numbers a fifth to a quarter of the squared error is saved. In eight bits hardly any.
SHARES = tuple(1 - step / 50 for step in range(31))


@dataclass(frozen=True)
class Scheme:
    """How weights and what they are multiplied by are rounded."""

    num_bits: int  # of a weight
    is_grouped: bool  # a scale for `group_size` numbers of a row, else one for the row
    activation_bits: int | None  # of what matrices are multiplied by, with a scale for each token; None: not rounded
    format: str  # compressed-tensors' name


SCHEMES = {
    "w8a8": Scheme(8, is_grouped=False, activation_bits=8, format="int-quantized"),
    "w4a16": Scheme(4, is_grouped=True, activation_bits=None, format="pack-quantized"),
}


@dataclass(frozen=True)
class Change:
    """What rounding costs: bits per byte of a text with the weights as they were, and rounded."""

    scheme: str
    group_size: int | None
    bits_per_byte: float
    rounded_bits_per_byte: float
    text_bytes: int


def quantize(source: Path | str, target: Path | str, *, scheme: str = "w8a8", group_size: int | None = None) -> Path:
    """A folder at `target` with the matrices of `export_hf`'s folder as integers, whole or not at all; returns it.

    Embeddings, the head, norms and biases stay as they are. Weights are rounded to the nearest step of the scale that
    makes their squared error smallest. `group_size` is w4a16's. UnsupportedError for an architecture or a width that
    the format or its readers do not take, ConfigError for a wrong option, ArtefactError for files that are no export.
    """
    source, target = Path(source).expanduser().absolute(), empty(target)
    config = _config(source)
    tensors = _tensors(source / "model.safetensors")
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2 and not name.endswith(TABLES)]
    chosen, group_size = _chosen(scheme, group_size, {name: tensors[name] for name in matrices})
    found = {name: tensor for name, tensor in tensors.items() if name not in matrices}
    for name in matrices:
        integers, scale = rounded_to_integers(tensors[name], chosen.num_bits, group_size)
        if chosen.is_grouped:
            found[f"{name}_packed"] = _packed(integers, chosen.num_bits)
            found[f"{name}_shape"] = torch.tensor(integers.shape)
        else:
            found[name] = integers
        found[f"{name}_scale"] = scale
    with artefacts.new_folder(target) as partial:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in ("model.safetensors", "config.json", "README.md"):
                shutil.copyfile(path, partial / path.name)
        write_json(partial / "config.json", {**config, "quantization_config": _described(chosen, group_size)})
        save_file(found, partial / "model.safetensors", metadata={"format": "pt"})
    return target


def _config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; a folder of `ulm export --to hf`") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtefactError(f"{path}: names no architecture: {error!r}") from None
    if "quantization_config" in config:
        raise UnsupportedError(f"{source} is quantised already; quantise the folder it was made from")
    if architecture in NOT_LINEAR:
        raise UnsupportedError(f"no quantised {architecture}: {NOT_LINEAR[architecture]}")
    assert isinstance(config, dict)
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: not readable: {error}") from None


def _chosen(scheme: str, group_size: int | None, matrices: Mapping[str, Tensor]) -> tuple[Scheme, int | None]:
    """The scheme of a name, and its group size, which fits all of the matrices."""
    if scheme not in SCHEMES:
        raise ConfigError("scheme", f"no scheme {scheme!r}", f"one of {', '.join(SCHEMES)}")
    chosen = SCHEMES[scheme]
    if not chosen.is_grouped:
        if group_size is not None:
            raise ConfigError("group_size", f"{scheme} has one scale for a row", "leave it out")
        return chosen, None
    width = math.gcd(*(tensor.shape[1] for tensor in matrices.values()))
    fits = [size for size in GROUP_SIZES if width % size == 0]
    if group_size is not None and group_size not in fits:
        raise ConfigError(
            "group_size", f"{group_size} does not fit rows of {width} numbers, or of multiples", f"{fits}"
        )
    odd = [name for name, tensor in matrices.items() if tensor.shape[0] % MULTIPLE or tensor.shape[1] % MULTIPLE]
    if odd:
        shape = " x ".join(map(str, matrices[odd[0]].shape))
        raise UnsupportedError(
            f"no {scheme} of this model: {odd[0]} is {shape}, and kernels take multiples of {MULTIPLE}"
        )
    return chosen, group_size or fits[0]


def rounded_to_integers(weight: Tensor, num_bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Integers of a matrix as int8, and their scales in its dtype, one for a row or for each group of it.

    The scale is the best of SHARES: it leaves the smallest sum of squared errors in its row or group.
    """
    rows = weight.float().reshape(len(weight), -1, group_size or weight.shape[1])
    most = 2 ** (num_bits - 1) - 1
    largest = rows.abs().amax(dim=-1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    best = torch.ones_like(largest)
    for share in SHARES:
        scale = (largest * (share / most)).to(weight.dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
        error = ((_nearest(rows, scale, num_bits) * scale - rows) ** 2).sum(dim=-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    integers = _nearest(rows, best, num_bits).to(torch.int8).reshape(weight.shape)
    return integers, best.squeeze(-1).to(weight.dtype)


def _nearest(rows: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    return (rows / scale).round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)


def _packed(integers: Tensor, num_bits: int) -> Tensor:
    """Neighbours of a row in one int32, the first in its lowest bits, each as its distance from the lowest number."""
    per_word = 32 // num_bits
    parts = (integers.to(torch.int64) + 2 ** (num_bits - 1)).reshape(len(integers), -1, per_word)
    words = (parts << torch.arange(0, 32, num_bits)).sum(dim=-1)
    packed: Tensor = words.to(torch.uint32).view(torch.int32)
    return packed


def _described(scheme: Scheme, group_size: int | None) -> dict[str, Any]:
    """config.json's quantization_config."""

    def numbers(num_bits: int, strategy: str, *, is_dynamic: bool) -> dict[str, Any]:
        kind = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": is_dynamic}
        return {**kind, **({"group_size": group_size} if strategy == "group" else {})}

    activations = scheme.activation_bits and numbers(scheme.activation_bits, "token", is_dynamic=True)
    group = {
        "targets": ["Linear"],
        "weights": numbers(scheme.num_bits, "group" if scheme.is_grouped else "channel", is_dynamic=False),
        "input_activations": activations,
        "output_activations": None,
        "format": scheme.format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def rounded(
    model: nn.Module, *, scheme: str = "w8a8", group_size: int | None = None, dtype: str = "float32"
) -> nn.Module:
    """A copy of a model of ours that computes what its quantised folder does, of an export in `dtype`."""
    found = copy.deepcopy(model).eval()
    linears = _linears(found)
    weights = {name: module.weight.detach().to(DTYPES[dtype]) for name, module in linears.items()}
    chosen, group_size = _chosen(scheme, group_size, weights)
    for name, module in linears.items():
        integers, scale = rounded_to_integers(weights[name], chosen.num_bits, group_size)
        by_groups = integers.float().reshape(*scale.shape, -1) * scale.float()[..., None]
        module.weight.data.copy_(by_groups.flatten(1))
        if chosen.activation_bits:
            module.register_forward_pre_hook(_round_tokens(chosen.activation_bits))
    return found


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of all layers."""
    blocks: Any = model.blocks
    return {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}


def _round_tokens(num_bits: int) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BTD = given[0]
        scale_BT1 = x_BTD.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / (2 ** (num_bits - 1) - 0.5)
        return (_nearest(x_BTD, scale_BT1, num_bits) * scale_BT1, *given[1:])

    return hook


def change(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    scheme: str = "w8a8",
    group_size: int | None = None,
    dtype: str = "float32",
) -> Change:
    """What rounding costs a model on held-out texts."""
    texts = list(texts)
    _, group_size = _chosen(scheme, group_size, {name: module.weight for name, module in _linears(model).items()})
    other = rounded(model, scheme=scheme, group_size=group_size, dtype=dtype)
    before, after = (bits_per_byte(each, tokenizer, texts) for each in (model, other))
    text_bytes = sum(len(text.encode()) for text in texts)
    return Change(scheme, group_size, before, after, text_bytes)


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Bits that a model needs for each byte of some texts. Each begins with <|endoftext|>, in pieces of the context.

    ConfigError where there is no text.
    """
    nats, num_bytes, context_tokens = 0.0, 0, model.spec.context_tokens
    device = next(model.parameters()).device
    for text in texts:
        num_bytes += len(text.encode())
        tokens = [tokenizer.eot_id, *tokenizer.encode(text)]
        for start in range(0, len(tokens) - 1, context_tokens):
            piece_BT = torch.tensor([tokens[start : start + context_tokens + 1]], device=device)
            x_BTD = model.hidden(piece_BT[:, :-1])
            nats += nats_per_target(x_BTD, piece_BT[:, 1:], model.head, model.spec.vocab_size).double().sum().item()
    if not num_bytes:
        raise ConfigError("texts", "no text to measure on", "held-out text, some thousand bytes at least")
    return nats / math.log(2) / num_bytes
