"""A folder that somebody else made runs nothing, fills no memory, and is refused where it is not what it says."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ulm
from ulm.errors import ArtefactError, ConfigError, UlmError
from ulm.exchange import hf_import
from ulm.exchange.export import export
from ulm.exchange.hf import export_hf, fitting
from ulm.exchange.hf_import import import_hf
from ulm.exchange.hf_tokenizer import read_tokenizer
from ulm.exchange.own import export_own
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.chat import render_chat
from ulm.tokenizers.tokenizer import END_OF_TEXT

BYTES = byte_tokenizer()
CHAT = [{"role": "user", "content": "Hi"}]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def stock(nano, tmp_path) -> Path:
    return export_hf(nano(vocab_size=BYTES.vocab_size), BYTES, tmp_path / "stock")


@pytest.fixture
def own(nano, tmp_path) -> Path:
    return export_own(nano(vocab_size=BYTES.vocab_size), BYTES, tmp_path / "own")


def changed(folder: Path, name: str = "config.json", **settings: Any) -> Path:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, **settings}), encoding="utf-8")
    return folder


def stored(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    return folder


def refused(folder: Path, message: str, kind: type[UlmError] = ArtefactError) -> None:
    with pytest.raises(kind, match=message):
        import_hf(folder, root=folder.parent / "root", name="taken")
    assert not (folder.parent / "root" / "runs").exists()


@pytest.mark.parametrize(
    "part",
    [{"attention": "this:Zen"}, {"mask": ["this:Zen"]}, {"mask": "this:Zen"}, {"blocks": [{"norm": "this:Zen"}]},
     {"model": "this:Zen"}],
)  # fmt: skip
def test_no_module_is_imported_however_a_folder_names_it(part, own):
    spec = json.loads((own / "config.json").read_text(encoding="utf-8"))["spec"]
    refused(changed(own, spec={**spec, **part}), "'this:Zen' is no kind of ours", ConfigError)
    assert "this" not in sys.modules


def test_sizes_are_compared_with_the_weights_before_memory_is_taken(stock, own, monkeypatch):
    monkeypatch.setattr(hf_import.ulm, "build", lambda spec: pytest.fail("a model was made"), raising=False)
    huge = {"hidden_size": 131_072, "num_attention_heads": 4_096, "num_key_value_heads": 4_096}
    refused(changed(stock, **huge), r"embedding.weight is \[257, 96\], where config.json means \[257, 131072\]")
    spec = json.loads((own / "config.json").read_text(encoding="utf-8"))["spec"]
    refused(changed(own, spec={**spec, "num_layers": 10_000}), "tensors for 10,000 layers")
    refused(changed(own, spec={**spec, "context_tokens": 2**24}), "positions alone take 4 GiB", ConfigError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": None, "model_type": {}}, "ours has no None"),
        ({"model_type": "gemma2"}, "model_type: 'gemma2', and a LlamaForCausalLM's is 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type is 'linear', and otherwise in rope"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(settings, message, stock):
    refused(changed(stock, **settings), message, ConfigError)


def test_what_is_no_file_of_json_is_refused_and_not_waited_for(stock, own):
    deep: Any = None
    for _ in range(900):
        deep = {"a": deep}
    refused(changed(own, spec={"deep": deep}), "parts within parts|unknown key", ConfigError)
    path = stock / "config.json"
    path.write_text('{"vocab_size": ' + "9" * 5_000 + "}", encoding="utf-8")
    refused(stock, "not readable as JSON: Exceeds the limit")
    path.unlink()
    os.mkfifo(path)
    refused(stock, "no such file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(stock, "no such file")


def test_tensors_that_are_no_weights_of_the_model_are_refused(stock, own):
    refused(
        stored(stock, **{Q: torch.ones(96, 96, dtype=torch.int8)}), "attention.q.weight is int8; weights are read as"
    )
    refused(stored(stock, **{Q: torch.ones(96, 96), "model.embed_tokens.weight": torch.tensor(1.0)}), r"is \[\]")
    refused(stored(own, **{"model.evil": torch.ones(2)}), "no place for: evil")
    refused(stored(own, **{"model.evil": torch.ones(2), "evil": torch.ones(2)}), "two tensors for evil")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["x"], "is no file of"), ({"b": 1}, "is no file of"), ("\ud800", "no such file"), ("..", "no such file")],
)
def test_an_index_that_names_no_file_is_refused(names, message, stock):
    index = {"weight_map": {"a": "model.safetensors", "b": names}}
    (stock / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(stock, message)


def test_a_tensor_in_two_files_is_refused(stock):
    save_file({Q: torch.ones(96, 96)}, stock / "other.safetensors")
    index = {"weight_map": {"a": "model.safetensors", Q: "other.safetensors"}}
    (stock / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(stock, f"has {Q}, and so does another")


def test_fused_weights_of_another_size_are_refused(nano, tmp_path):
    window = {"kind": "sliding", "window_tokens": 8}
    folder = export_hf(nano(vocab_size=257, attention=window), BYTES, tmp_path / "phi")
    refused(changed(folder, intermediate_size=100), "gate_up_proj.weight is .* config.json means another shape")


def test_a_window_that_no_text_outgrows_is_no_window(nano, tmp_path):
    fields = {"embedding": {"scaled": True}, "feedforward": {"kind": "geglu", "approximate": True}}
    gemma = export_hf(nano(vocab_size=257, norm_placement="around", **fields), BYTES, tmp_path / "gemma")
    kinds = ["sliding_attention"] * 3
    taken = import_hf(changed(gemma, sliding_window=4_096, layer_types=kinds), root=tmp_path, name="taken")
    assert taken.notes == ()
    refused(changed(gemma, layer_types=["chunked_attention"] * 3), "layer_types", ConfigError)


def test_a_folder_with_its_own_code_gets_no_longer_context_and_keeps_its_factors(nano, tmp_path):
    position = {"kind": "longrope", "long_factors": [2.0] * 16, "original_context_tokens": 16}
    model = nano(vocab_size=257, position=position, head="soft_cap")
    folder = export_own(model, BYTES, tmp_path / "own")
    with pytest.raises(ConfigError, match="from 2 to the folder's 64"):
        import_hf(folder, root=tmp_path, name="longer", context_tokens=65)
    short, _ = ulm.load(import_hf(folder, root=tmp_path, name="shorter", context_tokens=8).checkpoint)
    tokens_BT = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(short(tokens_BT), model.eval()(tokens_BT))


def tokenizer_of(folder: Path, **parts: Any) -> Path:
    """A folder with GPT-2's kind of tokenizer, parts of its model or of the whole changed."""
    folder.mkdir(exist_ok=True)
    whole = json.loads(train_bpe(["the cat sat on the mat"] * 9, 270).inner.to_str())
    of_model = {key: value for key, value in parts.items() if key in whole["model"]}
    whole["model"] |= of_model
    whole |= {key: value for key, value in parts.items() if key not in of_model}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def added(index: int, content: str, **more: Any) -> list[dict[str, Any]]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": 0, "content": END_OF_TEXT, **usual}, {"id": index, "content": content, **usual, **more}]


NEXT = train_bpe(["the cat sat on the mat"] * 9, 270).vocab_size
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPACES_GONE = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dropout": 0.5}, "model.dropout is 0.5"),
        ({"end_of_word_suffix": "</w>"}, "prefix or a suffix"),
        ({"added_tokens": "abc"}, "added_tokens is no list"),
        ({"added_tokens": [1]}, "added_tokens is no list"),
        ({"added_tokens": added(NEXT + 5, "<hole>")}, f"'<hole>' is given id {NEXT + 5}, where"),
        ({"added_tokens": added(NEXT, "<l>", special=False, lstrip=True)}, "'<l>' takes the white space"),
        ({"added_tokens": added(5, "%")}, "'%' would become it"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPACES_GONE, BYTE_LEVEL]}}, "of another make"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}}, "of another make"),
        ({"pre_tokenizer": {**SPACES_GONE, "pattern": {"String": "ByteLevel("}}}, "of another make"),
    ],
)
def test_a_tokenizer_that_loses_text_or_moves_ids_is_refused(parts, message, tmp_path):
    assert read_tokenizer(tokenizer_of(tmp_path / "good"), {})[0].vocab_size == NEXT
    with pytest.raises(ArtefactError, match=message):
        read_tokenizer(tokenizer_of(tmp_path / "bad", **parts), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocab: vocab | {"zz": 2**31}, "not 0, 1, 2 and so on"),
        (lambda vocab: vocab | {"\u65e5": NEXT}, "'\u65e5' is not spelled by bytes"),
        (lambda vocab: {("??" if token == "!" else token): index for token, index in vocab.items()}, "byte 0x21"),
    ],
)
def test_a_vocabulary_with_gaps_or_without_a_byte_is_refused(change, message, tmp_path):
    path = tokenizer_of(tmp_path) / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["model"]["vocab"] = change(whole["model"]["vocab"])
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ArtefactError, match=message):
        read_tokenizer(tmp_path, {})


@pytest.mark.parametrize("ids", [{}, [], [[]]])
def test_an_end_of_text_that_is_no_id_is_none(ids, tmp_path):
    path = tokenizer_of(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(END_OF_TEXT, "</s>"), encoding="utf-8")
    with pytest.raises(ArtefactError, match="no end of text"):
        read_tokenizer(tmp_path, {"eos_token_id": ids})


def test_a_chat_has_the_tokens_that_the_folder_names_and_only_a_renamed_one_changes(tmp_path):
    folder = tokenizer_of(tmp_path, added_tokens=added(NEXT, "<|turn|>"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|turn|>{{ eos_token }}{% endfor %}"
    about = {"bos_token": "<s>", "eos_token": {"content": "<|turn|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    ours, notes = read_tokenizer(folder, {})
    assert notes == (f"the end of text is {END_OF_TEXT} here, and <|turn|> there",)
    assert ours.render_chat(CHAT) == "<s>Hi<|turn|><|turn|>"


def test_templates_have_what_transformers_gives_them():
    def rendered(template: str) -> str:
        return render_chat(template, CHAT, add_generation_prompt=True)

    assert rendered("{{ bos_token }}|{{ eos_token }}") == f"{END_OF_TEXT}|{END_OF_TEXT}"
    assert rendered("{% if tools is not none %}tools{% endif %}") == ""
    assert rendered("{% for m in messages %}{{ {'<': 'é'} | tojson }}{% break %}{% endfor %}") == '{"<": "é"}'
    with pytest.raises(UlmError, match="only users"):
        rendered("{{ raise_exception('only users') }}")
    with pytest.raises(UlmError, match="nested"):
        rendered("{% for m in messages %}" * 25 + "{% endfor %}" * 25)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "attention": "linear",
            "position": {"scaling": {"kind": "yarn", "factor": 2.0, "original_context_tokens": 16}},
        },
        {"blocks": [{}, {"feedforward": "moe"}]},
        {"attention": {"kind": "sliding", "window_tokens": 1}},
    ],
    ids=["YaRN without scores", "experts after the first layer", "a window of one token"],
)
def test_what_no_stock_architecture_has_is_refused_and_not_a_crash(fields, nano):
    with pytest.raises(UlmError, match="no stock architecture"):
        fitting(nano(**fields).spec)


def test_phi3_has_scaled_positions_by_factors_of_its_own_kind(nano, tmp_path):
    position = {"rotary_dim": 16, "scaling": {"kind": "linear", "factor": 4.0}}
    folder = export_hf(nano(vocab_size=257, position=position), BYTES, tmp_path / "phi")
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    assert (said["rope_type"], said["long_factor"]) == ("longrope", [4.0] * 8)


def test_what_cannot_be_written_is_an_error_of_ours_and_leaves_the_name_free(nano, stock, tmp_path):
    model = nano(vocab_size=BYTES.vocab_size)
    checkpoint = ulm.save(model, BYTES, tmp_path / "runs" / "t" / "step-00000001")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for target in (tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        for to in ("hf", "gguf"):
            with pytest.raises(ArtefactError, match="cannot be written"):
                export(checkpoint, target, root=tmp_path, to=to)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(ArtefactError, match="cannot be written"):
            import_hf(stock, root=tmp_path, name="again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    (tmp_path / "runs" / "again" / "step-00000000.x.partial").mkdir(parents=True)  # what a kill leaves
    assert import_hf(stock, root=tmp_path, name="again").checkpoint.is_dir()


def test_of_two_exports_to_one_place_the_later_is_told(nano, tmp_path, monkeypatch):
    checkpoint = ulm.save(nano(vocab_size=BYTES.vocab_size), BYTES, tmp_path / "runs" / "t" / "step-00000001")
    target = tmp_path / "out"

    def meanwhile(facts: object) -> str:
        shutil.copytree(tmp_path / "runs", target)
        return ""

    monkeypatch.setattr("ulm.exchange.export.card", meanwhile)
    with pytest.raises(ConfigError, match="was made by somebody else meanwhile"):
        export(checkpoint, target, root=tmp_path)
    assert [path.name for path in target.iterdir()] == ["t"]
