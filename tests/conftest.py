"""What many tests need: a root of their own, seeded randomness, a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ulm


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root, also as ULM_HOME."""
    home = tmp_path / "ulm-home"
    monkeypatch.setenv("ULM_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def no_outside_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test joins a cluster that happens to run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def nano() -> Callable[..., Any]:
    """Makes a small model of 300 tokens' vocabulary, with slots and fields laid over the nano preset."""

    def make(seed: int = 0, **overrides: Any) -> Any:
        fields = {"vocab_size": 300, "context_tokens": 64, **overrides}
        return ulm.build(ulm.ModelSpec.preset("nano", **fields), seed=seed).eval()

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread_is_enough() -> Iterator[None]:
    """Tiny matrices are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
