"""docs/engine.md is true: its tables are the code's, its Python runs, its refusals are the ones given."""

from __future__ import annotations

import dataclasses
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

import ulm
from serve.api.schema import CompletionBody
from serve.contracts import GenerateRequest
from serve.engines.local.engine import Config
from serve.engines.local.stack import Stack, can_stack
from tests.engine import answers, with_engine
from tests.page import Page
from ulm import registry
from ulm.errors import ConfigError, RequestError
from ulm.models.sampling import Sampling
from ulm.recipes import load_recipe
from ulm.spec import SLOTS, preset_sizes
from ulm.tokenizers.byte import byte_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = Page.read("engine.md")
PAGE, section, tables = DOCS.text, DOCS.section, DOCS.tables
FOLDER = ROOT / "serve/engines/local"
WORDS = {"none": None, "()": (), "greedy": Sampling(), "": dataclasses.MISSING}
HOT = Sampling(temperature=1)
CACHE_BYTES = 1 << 20


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def value(cell: str) -> Any:
    word = cell.strip("`")
    return WORDS[word] if word in WORDS else yaml.safe_load(word)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def limits(cell: str) -> tuple[bool, float, float | None] | None:
    """Whether the lower end itself is out, and both ends; None where the cell has words only."""
    found = re.fullmatch(r"(above |from )?(-?[\d.]+)(?: to ([\d.,]+))?", cell)
    if not found:
        return None
    end = found[3]
    return found[1] == "above ", float(found[2]), None if end is None else float(end.replace(",", ""))


def saved(folder: Path, **over: Any) -> Path:
    """A checkpoint of an untrained nano of one layer."""
    tokenizer = byte_tokenizer()
    spec = ulm.ModelSpec.preset("nano", vocab_size=tokenizer.vocab_size, num_layers=1, **over)
    ulm.save(ulm.build(spec), tokenizer, folder)
    return folder


def test_every_setting_stands_in_its_table_with_its_default():
    (rows,) = tables("Settings")
    listed = {name.strip("`"): value(default) for name, default, _ in rows}
    fields = {name: field for name, field in Config.model_fields.items() if name != "kind"}
    assert listed == {name: field.default for name, field in fields.items()}


def test_every_field_of_a_request_and_of_sampling_stands_in_its_table_with_its_default():
    of_request, of_sampling = tables("Requests")
    fields = {field.name: field.default for field in dataclasses.fields(GenerateRequest)}
    assert {name.strip("`"): value(default) for name, default, *_ in of_request} == fields
    fields = {name: field.default for name, field in Sampling.model_fields.items()}
    assert {name.strip("`"): value(default) for name, default, *_ in of_sampling} == fields


def asked(name: str, given: float) -> None:
    """Make a request with this value of a field, of its own or of its sampling."""
    whole = int(given) if given == int(given) else given
    if name == "logit_bias":
        Sampling(logit_bias={0: given})
    elif name in Sampling.model_fields:
        Sampling(**{"temperature": 1, name: whole})
    else:
        GenerateRequest((1,), {"m": 1.0}, 1, **{"sampling": HOT, "stream": False, name: whole}).check()


BOUNDED = [
    (name.strip("`"), *found)
    for table in tables("Requests")
    for name, _, limit, _ in table
    if (found := limits(limit)) is not None
]


@pytest.mark.parametrize(("name", "is_open", "low", "high"), BOUNDED)
def test_a_limit_of_a_table_is_allowed_and_what_lies_beyond_is_refused(name, is_open, low, high):
    if not is_open:
        asked(name, low)
    for beyond in ([low] if is_open else [low - 1]) + ([] if high is None else [2 * high + 1]):
        with pytest.raises(RequestError, match=name.partition("_")[0]):
            asked(name, beyond)
    if high is not None and high < 2**53:  # a float does not hold the largest seed
        asked(name, high)


def test_there_are_limits_to_try():
    assert len(BOUNDED) >= 12


@pytest.mark.parametrize(("fields", "message"), tables("What is refused")[0])
def test_a_refusal_of_the_page_is_the_one_given(fields, message, tmp_path):
    async def body(engine: Any) -> str:
        plain = {"tokens": (1, 2, 3), "weights": {"m": 1.0}, "max_tokens": 8}
        with pytest.raises(RequestError) as caught:
            given = eval(f"dict({fields.strip('`')})", {"Sampling": Sampling})
            await answers(engine, GenerateRequest(**{**plain, **given}))
        assert len((await answers(engine, GenerateRequest(**plain)))[0].tokens) > 0, "the next request is not answered"
        return str(caught.value)

    tokenizer = byte_tokenizer()
    ulm.save(ulm.build(ulm.ModelSpec.preset("nano", vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "m")
    assert with_engine({"m": tmp_path / "m"}, body, kv_cache_bytes=CACHE_BYTES) == message


def test_what_the_endpoint_does_not_pass_on_is_as_the_page_says():
    text = section("Requests").rpartition("The HTTP endpoint passes on")[2]
    assert names(text.partition("is for Python")[0])[0] == "priority"
    fields = set(CompletionBody.model_fields)
    listed = {name for table in tables("Requests") for row in table for name in names(row[0])}
    renamed = {"num_top_logprobs", "prompt_logprobs", "deadline_s", "generated", "tokens", "weights", "sampling"}
    renamed.add("json_schema")  # response_format
    assert listed - fields - renamed == {"priority"}
    with pytest.raises(ValidationError, match="priority"):
        CompletionBody(model="m", priority=1)


def test_stats_has_the_names_of_its_list_and_five_of_them_with_a_stack_only(tmp_path):
    (rows,) = tables("Memory")
    listed = [name for cell, _ in rows for name in names(cell)]

    async def body(engine: Any) -> set[str]:
        return set(await engine.stats())

    plain, sums = saved(tmp_path / "plain"), saved(tmp_path / "sums", attention="linear")
    found = with_engine({"plain": plain, "sums": sums}, body, kv_cache_bytes=CACHE_BYTES)
    without = with_engine({"sums": sums}, body, kv_cache_bytes=CACHE_BYTES)
    assert found == set(listed) and len(listed) == len(found)
    assert found - without == set(listed[-5:])


def runs_in(**over: Any) -> str:
    spec = ulm.ModelSpec.parse({"preset": "nano", "num_layers": 1, **over})
    if not can_stack(spec):
        return "rows"
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "kv_cache_bytes": CACHE_BYTES}
    return "a stack" if Stack(spec, **how, max_batch_tokens=16).max_slots > 1 else "a stack of one"


def test_what_runs_in_a_stack_is_as_the_page_says_and_all_other_kinds_do():
    (rows,) = tables("Members")
    told = {cell.strip("`"): where for cell, where in rows}
    assert {cell: runs_in(**yaml.safe_load(cell)) for cell in told} == told
    for slot in SLOTS:
        for kind in ulm.kinds(slot):
            if f"{slot}: {kind}" not in told and not getattr(registry.find(slot, kind), "needs_source", False):
                assert runs_in(**{slot: kind}) == "a stack", kind


def test_members_of_every_preset_share_stacks():
    assert "all presets share stacks." in section("Members")
    found = {runs_in(preset=preset, size=size) for preset in preset_sizes() for size in ("nano", "micro")}
    assert found == {"a stack"}


def test_the_map_names_every_file_of_the_engine_and_no_other():
    named = set(re.findall(r"\b\w+\.(?:py|cpp)\b", section("Where each part lives").partition("The modules in")[0]))
    assert named == {path.name for path in FOLDER.rglob("*.*") if path.suffix in (".py", ".cpp")} - {"__init__.py"}


def test_the_recipe_of_the_page_is_one_and_settings_can_be_laid_over_it(tmp_path):
    (text,) = blocks("yaml")
    path = tmp_path / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    settings = registry.configure("engine", load_recipe("serve up", path).engine)
    assert isinstance(settings, Config)
    assert (settings.dtype, settings.kv_cache_bytes) == ("bfloat16", 256 << 20)
    path.write_text("members: {m: {checkpoint: x}}", encoding="utf-8")
    overrides = re.findall(r"--set ([\w.=]+\w)", section("Settings"))
    assert load_recipe("serve up", path, overrides).engine == {"kind": "local", "threads": 2}
    with pytest.raises(ConfigError, match=r"engine\.threads"):
        load_recipe("serve up", path, [*overrides, "engine.threads=0"])


def test_the_python_of_the_page_runs():
    (code,) = blocks("python")
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "docs/engine.md", "exec"), {})
    said: dict[str, list[str]] = {}
    for line in out.getvalue().splitlines():
        subject, _, rest = line.partition(": ")
        said.setdefault(subject, []).append(rest)
    assert list(said) == ["mixture", "choices", "score", "next", "memory"]
    assert said["mixture"][-1].endswith(("length", "stop")) and len(said["mixture"]) <= 5
    assert [index for index, _ in eval(said["choices"][0])] == [0, 1]
    assert said["score"] == ["13 of 14 tokens"]
    assert float(said["memory"][0]) > 0
