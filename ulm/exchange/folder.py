"""What all Hugging Face folders have in common: where one may be made, its tokenizer, its dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ulm.errors import ArtefactError, ConfigError
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checked(model: Any, tokenizer: Tokenizer, folder: Path | str, dtype: str) -> Path:
    """The folder, as an absolute path. ConfigError where it is taken, or what it should hold does not fit together."""
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"no dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if tokenizer.vocab_size != model.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ConfigError("tokenizer", sizes, "export a model with the tokenizer it was trained with")
    return empty(folder)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """ArtefactError where the block cannot write: a full disk, a folder of somebody else's, a name that is too long."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{place}: cannot be written: {error}") from None


def empty(folder: Path | str) -> Path:
    """The folder, as an absolute path, which does not exist or has nothing in it. ConfigError where it is taken."""
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(str(folder), "already exists and is not an empty folder", "name a new folder")
    return folder


def write_config(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, dtype: str) -> None:
    """config.json and generation_config.json, with the ids of special tokens."""
    end = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    write_json(folder / "config.json", {**config, **end, "pad_token_id": None, "dtype": dtype})
    generation = {"_from_model_config": False, "do_sample": False, **end, "pad_token_id": tokenizer.eot_id}
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context_tokens: int) -> None:
    """The tokenizer's files: the ids of `tokenizer.encode`, after <|endoftext|> where special ones are asked for."""
    stored = json.loads(tokenizer.inner.to_str())
    begin = {"id": END_OF_TEXT, "type_id": 0}
    text = [{"Sequence": {"id": id_, "type_id": type_id}} for type_id, id_ in enumerate("AB")]
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": begin}, text[0]],
        "pair": [{"SpecialToken": begin}, *text],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.eot_id], "tokens": [END_OF_TEXT]}},
    }
    write_json(folder / "tokenizer.json", stored)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    others = [token for token in tokenizer.special_ids if token != END_OF_TEXT]
    write_json(folder / "special_tokens_map.json", special)
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": True,
            "additional_special_tokens": others,
            "added_tokens_decoder": {str(i): {"content": token, **added} for token, i in tokenizer.special_ids.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_tokens,
            # Text that spells <|endoftext|> stays text. Further tokens are for chat templates, and those write text.
            "split_special_tokens": not others,
        },
    )
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
