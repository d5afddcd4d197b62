"""The local engine's kernels: what they compute is what plain torch computes, and the same bits in any company."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engines.local import kernels
from serve.engines.local.flat import Flat, Span
from serve.engines.local.kernels import build
from serve.engines.local.matrix import Matrix
from serve.engines.local.paged import PAGE_TOKENS, PagedKeyValues
from ulm import runtime
from ulm.components.attend import naive
from ulm.components.contracts import Mask, Places
from ulm.errors import UnsupportedError

CPU = torch.device("cpu")
SUM_ORDER = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of a thousand products of size one, in another order
EXPONENTIALS = {"rtol": 1e-5, "atol": 5e-6}  # and an e^x of our own, within 2e-7


@pytest.fixture(scope="module", autouse=True)
def kernels_under_a_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULM_HOME", str(tmp_path_factory.mktemp("home")))
        kernels.load()
        yield


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels, and what runs without them."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "load", lambda: "left out by a test")
    else:
        needs_kernels()
    return str(request.param)


@pytest.fixture
def native() -> None:
    needs_kernels()


def needs_kernels() -> None:
    reason = kernels.load()
    if reason is not None:
        pytest.skip(reason)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- products


def tokens_of(segments: Sequence[tuple[int, int]], num_filling: int = 0) -> Flat:
    """So many tokens of each slot."""
    spans = [Span(slot, 0, list(range(count)), [[1] * 64]) for slot, count in segments]
    total = sum(count for _, count in segments)
    return Flat.of(spans, 64, CPU, total + num_filling if num_filling else None)


def matrix_with(
    slots: Sequence[int], num_out: int, num_in: int, dtype: torch.dtype, biased: Sequence[int] = ()
) -> tuple[Matrix, dict[int, Tensor], dict[int, Tensor]]:
    """A matrix with weights in some slots, and the weights and biases as they are rounded."""
    matrix = Matrix(num_out, num_in, dtype=dtype, device=CPU)
    weights = {slot: torch.randn(num_out, num_in, generator=seeded(slot)).to(dtype).float() for slot in slots}
    biases = {slot: torch.randn(num_out, generator=seeded(99 + slot)).to(dtype).float() for slot in biased}
    for slot in slots:
        matrix.put(slot, weights[slot], biases.get(slot))
    return matrix, weights, biases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "num_in"), [(64, 32), (71, 45), (5, 1), (300, 1408)])
@pytest.mark.parametrize("segments", [[(0, 1)], [(3, 40)], [(0, 1), (3, 14), (200, 5)]])
def test_each_token_is_multiplied_by_its_members_matrix(
    path: str, segments: list[tuple[int, int]], num_out: int, num_in: int, dtype: torch.dtype
) -> None:
    matrix, weights, biases = matrix_with([0, 3, 200], num_out, num_in, dtype, biased=[3])
    flat = tokens_of(segments)
    x_BD = torch.randn(len(flat.tokens_B), num_in, generator=seeded(1))
    out_BF = matrix.linear(x_BD, flat)
    for slot, first, end in flat.segments:
        wanted = x_BD[first:end] @ weights[slot].T + biases.get(slot, torch.zeros(num_out))
        torch.testing.assert_close(out_BF[first:end], wanted, rtol=SUM_ORDER["rtol"], atol=num_in**0.5 * 4e-6)


def test_weights_in_bfloat16_give_the_bits_of_the_rounded_weights_in_float32(native: None) -> None:
    half, weights, _ = matrix_with([0], 77, 133, torch.bfloat16)
    full = Matrix(77, 133, dtype=torch.float32, device=CPU)
    full.put(0, weights[0])
    flat, x_BD = tokens_of([(0, 30)]), torch.randn(30, 133, generator=seeded())
    assert torch.equal(half.linear(x_BD, flat), full.linear(x_BD, flat))
    assert half.nbytes < 0.6 * full.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_token_gets_the_same_bits_alone_and_among_others(native: None, dtype: torch.dtype, threads: int) -> None:
    matrix, _, _ = matrix_with([0, 1, 2], 100, 1408, dtype, biased=[1])
    flat = tokens_of([(0, 230), (1, 3), (2, 20)])  # 230: more than one block of activations
    x_BD = torch.randn(253, 1408, generator=seeded())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together_BF = matrix.linear(x_BD, flat)
    finally:
        torch.set_num_threads(before)
    alone = [matrix.linear(x_BD[b : b + 1], tokens_of([(int(flat.slots_B[b]), 1)])) for b in range(253)]
    assert torch.equal(together_BF, torch.cat(alone))


def test_filling_tokens_get_zeros_and_change_nothing(native: None) -> None:
    matrix, _, _ = matrix_with([0, 1], 40, 24, torch.float32)
    x_BD = torch.randn(9, 24, generator=seeded())
    x_BD[5:] = torch.nan
    filled_BF = matrix.linear(x_BD, tokens_of([(0, 2), (1, 3)], num_filling=4))
    assert torch.equal(filled_BF[:5], matrix.linear(x_BD[:5], tokens_of([(0, 2), (1, 3)])))
    assert torch.equal(filled_BF[5:], torch.zeros(4, 40))


def test_filling_tokens_are_allowed_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: "left out by a test")
    matrix, weights, _ = matrix_with([0, 1], 40, 24, torch.float32)
    flat = tokens_of([(0, 2), (1, 3)], num_filling=4)
    assert torch.equal(matrix.linear(torch.ones(9, 24), flat)[5:], torch.zeros(4, 40))
    assert torch.equal(matrix.embed(flat.tokens_B, flat)[4], weights[1][2])


def test_dimensions_before_the_last_and_strides_are_kept_apart(path: str) -> None:
    matrix, weights, _ = matrix_with([0], 10, 6, torch.float32)
    wide_B1D = torch.randn(7, 1, 20, generator=seeded())[..., :6]
    out_B1F = matrix.linear(wide_B1D, tokens_of([(0, 7)]))
    assert out_B1F.shape == (7, 1, 10)
    torch.testing.assert_close(out_B1F, wide_B1D @ weights[0].T, **SUM_ORDER)
    transposed_BD = torch.randn(6, 7, generator=seeded()).T
    torch.testing.assert_close(
        matrix.linear(transposed_BD, tokens_of([(0, 7)])), transposed_BD @ weights[0].T, **SUM_ORDER
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_embedding_is_its_row_of_its_members_matrix(path: str, dtype: torch.dtype) -> None:
    matrix, weights, _ = matrix_with([0, 2], 71, 45, dtype)
    flat = tokens_of([(0, 70), (2, 71)])
    x_BD = matrix.embed(flat.tokens_B, flat)
    assert torch.equal(x_BD, torch.cat([weights[0][:70], weights[2]]))


def test_a_token_beyond_the_vocabulary_is_refused(native: None) -> None:
    matrix, _, _ = matrix_with([0], 71, 45, torch.float32)
    flat = tokens_of([(0, 1)])
    with pytest.raises(RuntimeError, match="token 71 is not among 71"):
        matrix.embed(torch.tensor([71]), flat)


def test_a_slot_is_filled_anew_and_emptied(path: str) -> None:
    matrix, _, _ = matrix_with([4], 33, 7, torch.float32, biased=[4])
    flat, x_BD = tokens_of([(4, 2)]), torch.randn(2, 7, generator=seeded())
    weight_FD = torch.randn(33, 7, generator=seeded(5))
    matrix.put(4, weight_FD)
    torch.testing.assert_close(matrix.linear(x_BD, flat), x_BD @ weight_FD.T, **SUM_ORDER)  # the bias is gone too
    weight_FD.zero_()  # a copy was taken
    assert matrix.linear(x_BD, flat).abs().min() > 0
    matrix.drop(4)
    assert matrix.nbytes == 0
    with pytest.raises((RuntimeError, KeyError), match="4"):
        matrix.linear(x_BD, flat)


# ---- attention


class Sequences:
    """Sequences of random queries, keys and values, laid in pages that are NaN until written."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        **rules: Any,
    ) -> None:
        self.rules, self.lengths = rules, lengths
        self.columns = -(-max(lengths) // PAGE_TOKENS) + 1
        num_pages = 1 + len(lengths) * self.columns
        self.pages = PagedKeyValues(num_pages, num_kv_heads, head_dim, dtype, CPU)
        self.pages.k_pages.fill_(torch.nan)
        self.pages.v_pages.fill_(torch.nan)
        numbers = (torch.randperm(num_pages - 1, generator=seeded(7)) + 1).tolist()
        self.tables = [numbers[i :: len(lengths)] for i in range(len(lengths))]
        sizes = [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, head_dim)]
        self.qkv = [[torch.randn(n, *size, generator=seeded(n + i)) for i, size in enumerate(sizes)] for n in lengths]

    def step(self, parts: Sequence[tuple[int, int, int]], num_filling: int = 0) -> list[Tensor]:
        """What sequence i finds from position `start` to `end`, for each part; written and read in one step."""
        spans = [Span(0, start, [0] * (end - start), [self._table(i, start)]) for i, start, end in parts]
        total = sum(end - start for _, start, end in parts)
        flat = Flat.of(spans, self.columns, CPU, total + num_filling if num_filling else None)
        q, k, v = (
            torch.cat([self.qkv[i][x][start:end] for i, start, end in parts] + [torch.ones(num_filling, *size)])
            for x, size in enumerate(y.shape[1:] for y in self.qkv[0])
        )
        out_BHE = self.pages.attend(q, k, v, flat, 0, **self.rules)
        return [out_BHE[first:end] for first, end in [*flat.bounds, (total, len(out_BHE))]]

    def _table(self, i: int, start: int) -> list[int]:
        """Pages that no later token can see are given back."""
        window, sinks = self.rules.get("window_tokens"), self.rules.get("num_sink_tokens", 0)
        if window is None:
            return self.tables[i]
        gone = range(-(-sinks // PAGE_TOKENS), max(start - window + 1, 0) // PAGE_TOKENS)
        return [-1 if column in gone else page for column, page in enumerate(self.tables[i])]

    def wanted(self, i: int) -> Tensor:
        """The whole sequence at once, by the equation."""
        q, k, v = (x[None] for x in self.qkv[i])
        positions = torch.arange(self.lengths[i])
        distance_TS = positions[:, None] - positions
        allowed_TS = distance_TS >= 0
        if "window_tokens" in self.rules:
            near = distance_TS < self.rules["window_tokens"]
            allowed_TS &= near | (positions < self.rules.get("num_sink_tokens", 0))
        mask = Mask((), Places(positions[None], positions[None]), allowed_TS[None])
        bias = self.rules.get("bias_HS")
        bias_BHTS = None if bias is None else bias[:, distance_TS.clamp(min=0)][None]
        others = {name: self.rules[name] for name in ("soft_cap", "sinks_H") if name in self.rules}
        return naive(q, k, v, mask, bias_BHTS, **others)[0]


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide heads": {"head_dim": 64, "num_heads": 8, "num_kv_heads": 4},
    "one head of keys": {"num_kv_heads": 1, "num_heads": 11},
    "odd head width": {"head_dim": 21},
    "window": {"window_tokens": 5},
    "window of pages": {"window_tokens": 33},
    "window and first tokens": {"window_tokens": 9, "num_sink_tokens": 3},
    "window and first page": {"window_tokens": 17, "num_sink_tokens": 20},
    "soft cap": {"soft_cap": 0.7},
    "sinks": {"sinks_H": torch.tensor([-3.0, 0.0, 2.0, 30.0])},
    "bias": {"bias_HS": -torch.arange(4.0)[:, None] * torch.arange(128) / 8},
    "all": {
        "window_tokens": 9,
        "num_sink_tokens": 3,
        "soft_cap": 0.7,
        "sinks_H": torch.tensor([-3.0, 0.0, 2.0, 4.0]),
        "bias_HS": torch.randn(4, 128, generator=seeded()),
    },
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_prompts_and_single_tokens_in_one_step_find_what_the_equation_says(path: str, rules: dict[str, Any]) -> None:
    sequences = Sequences([70, 41, 17, 100], **rules)
    starts = [60, 40, 0, 99]  # then a piece of a prompt, one token, a whole prompt, one token
    first = sequences.step([(i, 0, start) for i, start in enumerate(starts) if start])
    second = sequences.step([(i, start, sequences.lengths[i]) for i, start in enumerate(starts)])
    for i, start in enumerate(starts):
        wanted_THE = sequences.wanted(i)
        torch.testing.assert_close(second[i], wanted_THE[start:], **EXPONENTIALS)
        if start:
            torch.testing.assert_close(first[[0, 1, None, 2][i]], wanted_THE[:start], **EXPONENTIALS)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_a_prompt_in_pieces_of_any_size_gives_the_same_bits(native: None, rules: dict[str, Any]) -> None:
    whole = Sequences([40], **rules).step([(0, 0, 40)])[0]
    for size in (1, 7, 16):
        sequences = Sequences([40], **rules)
        pieces = [sequences.step([(0, start, min(start + size, 40))])[0] for start in range(0, 40, size)]
        assert torch.equal(torch.cat(pieces), whole), size


def test_company_does_not_change_a_sequences_bits(native: None) -> None:
    among, alone = (Sequences([50, 33, 64]) for _ in range(2))
    among.step([(0, 0, 49), (1, 0, 32), (2, 0, 63)])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = among.step([(0, 49, 50), (1, 32, 33), (2, 63, 64)], num_filling=5)
    finally:
        torch.set_num_threads(before)
    for i, length in enumerate(alone.lengths):
        alone.step([(i, 0, length - 1)])
        assert torch.equal(together[i], alone.step([(i, length - 1, length)])[0])


def test_filling_tokens_find_nothing_and_write_to_nobodys_page(path: str) -> None:
    sequences = Sequences([20])
    sequences.step([(0, 0, 19)])
    before = sequences.pages.k_pages[1:].clone()
    found, filling = sequences.step([(0, 19, 20)], num_filling=6)
    torch.testing.assert_close(found, sequences.wanted(0)[19:], **EXPONENTIALS)
    assert torch.equal(filling, torch.zeros(6, 4, 16))
    is_new = ~before.isclose(sequences.pages.k_pages[1:], equal_nan=True)
    assert int(is_new.sum()) == 2 * 16  # one token's keys


def test_pages_in_bfloat16_hold_rounded_keys_and_values(path: str) -> None:
    sequences = Sequences([45], dtype=torch.bfloat16, head_dim=20)
    out_BHE = torch.cat([sequences.step([(0, 0, 44)])[0], sequences.step([(0, 44, 45)])[0]])
    sequences.qkv[0][1:] = [x.bfloat16().float() for x in sequences.qkv[0][1:]]
    torch.testing.assert_close(out_BHE, sequences.wanted(0), **EXPONENTIALS)


def test_scores_far_apart_neither_overflow_nor_vanish(path: str) -> None:
    sequences = Sequences([40])
    sequences.qkv[0][0] *= 1000
    torch.testing.assert_close(sequences.step([(0, 0, 40)])[0], sequences.wanted(0), rtol=1e-3, atol=1e-3)


def test_queries_keys_and_values_may_be_views_of_one_product(native: None) -> None:
    pages, wanted = (PagedKeyValues(3, 2, 16, torch.float32, CPU) for _ in range(2))
    flat = Flat.of([Span(0, 0, [0] * 9, [[1]])], 1, CPU)
    joint_B = torch.randn(9, 8 * 16, generator=seeded())
    q, k, v = (x.unflatten(1, (-1, 16)) for x in joint_B.split([64, 32, 32], dim=1))
    found = pages.attend(q, k, v, flat, 0)
    assert torch.equal(found, wanted.attend(q.contiguous(), k.contiguous(), v.contiguous(), flat, 0))


def test_a_copied_page_is_read_as_its_source(path: str) -> None:
    sequences = Sequences([20])
    wanted = sequences.step([(0, 0, 18)])[0][17]
    first, second, unused = sequences.tables[0]
    sequences.pages.copy_page(second, unused)
    sequences.pages.k_pages[second] = sequences.pages.v_pages[second] = torch.nan
    sequences.tables[0] = [first, unused, second]
    torch.testing.assert_close(sequences.step([(0, 17, 18)])[0][0], wanted, **EXPONENTIALS)


@pytest.mark.parametrize("head_dim", [16, 21])
def test_the_size_of_a_page_is_known_before_there_is_one(path: str, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pages = PagedKeyValues(5, 3, head_dim, dtype, CPU)
        assert 5 * PagedKeyValues.page_bytes(3, head_dim, dtype) == pages.nbytes


def test_a_position_without_a_page_is_refused(native: None) -> None:
    sequences = Sequences([16])
    q, k, v = (x[:1] for x in sequences.qkv[0])
    flat = Flat.of([Span(0, 40, [0], [[1, 2]])], 2, CPU)
    with pytest.raises(RuntimeError, match="position 40 of span 0 is not in the tables"):
        sequences.pages.attend(q, k, v, flat, 0)
    flat = Flat.of([Span(0, 20, [0], [[1, 9]])], 2, CPU)
    with pytest.raises(RuntimeError, match="there is no page 9"):
        sequences.pages.attend(q, k, v, flat, 0)


# ---- torch.compile and the library itself


def test_the_compiler_sees_shapes_and_what_is_written(native: None) -> None:
    engine, flat = torch.ops.ulm_engine, tokens_of([(0, 3)])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight = engine.pack(torch.randn(10, 6), False)
    addresses_N, zeros_N = torch.tensor([weight.data_ptr()]), torch.zeros(1, dtype=torch.long)
    x_BD = torch.randn(3, 6)
    for operator, given in [
        (engine.linear, (x_BD, addresses_N, zeros_N, flat.segments_N3, 10, False)),
        (engine.embed, (flat.tokens_B, flat.slots_B, addresses_N, 10, 6, False)),
        (
            engine.attend,
            (
                *(torch.randn(3, heads, 4) for heads in (4, 2, 2)),
                *(torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 16, 16)),
                *(flat.tables_NC[0], flat.spans_B, flat.positions_B, 0, 0, 0.0, None, None),
            ),
        ),
    ]:
        torch.library.opcheck(operator.default, given, test_utils=tests)


def compiler(folder: Path, text: str) -> str:
    """A program that acts as compiler: `text` is run for everything but --version, $out is what it should make."""
    script = folder / "compiler"
    prelude = 'if [ "$1" = --version ]; then echo 1; exit; fi\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n'
    script.write_text(f"#!/bin/sh\n{prelude}{text}\n")
    script.chmod(0o755)
    return str(script)


def test_without_a_compiler_the_reason_is_told_once_and_torch_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_load", cache(build._load.__wrapped__))  # as if nobody had asked yet
    reason = "no compiler no-such-compiler (No such file or directory): install g++, or name another in CXX"
    with caplog.at_level(logging.WARNING):
        assert [kernels.load(), kernels.load()] == [reason, reason]
    assert caplog.messages == [f"the local engine's kernels are missing, and plain torch runs instead: {reason}"]
    matrix, weights, _ = matrix_with([0], 8, 4, torch.bfloat16)
    x_BD = torch.randn(3, 4, generator=seeded())
    assert torch.equal(matrix.linear(x_BD, tokens_of([(0, 3)])), torch.nn.functional.linear(x_BD, weights[0]))


def test_the_compilers_last_words_are_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo first >&2; echo 'no room left' >&2; exit 1"))
    with pytest.raises(UnsupportedError, match="compiler failed: no room left$"):
        build.compiled()
    assert list((tmp_path / "home" / "kernels").iterdir()) == []


def test_a_processor_of_another_kind_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(UnsupportedError, match="riscv64: the kernels know x86_64"):
        build.compiled()


def test_a_root_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "true"))
    with pytest.raises(UnsupportedError, match="file/kernels cannot be written"):
        build.compiled()


def test_those_who_compile_at_once_leave_one_whole_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo half > $out; sleep 0.2; echo whole >> $out"))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(build.compiled().read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [library[:-32] for library in found] == [b"half\nwhole\n"] * 3  # without its digest
    assert len(list((tmp_path / "home" / "kernels").iterdir())) == 1


def test_a_library_is_compiled_again_only_where_it_is_cut_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo first > $out"))
    library = build.compiled()
    compiler(tmp_path, "echo second > $out")
    assert build.compiled().read_bytes().startswith(b"first\n")
    library.write_bytes(library.read_bytes()[:-1])
    assert build.compiled().read_bytes().startswith(b"second\n")


def test_a_library_that_does_not_load_is_compiled_again(
    native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign = tmp_path / "kernels" / build.compiled().name
    foreign.parent.mkdir()
    foreign.write_bytes(b"of another system" + hashlib.sha256(b"of another system").digest())
    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    asked = "import torch; from serve.engines.local import kernels; print(kernels.load(), torch.ops.ulm_engine.linear)"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, env=runtime.environment(), timeout=200
    )
    assert done.stdout == "None ulm_engine.linear\n", done.stderr
    assert foreign.stat().st_size > 10_000
