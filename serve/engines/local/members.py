"""Members: where each comes from, where its weights are, and what has to go when another one comes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from serve.contracts import MemberInfo
from serve.engines.local.rows import Rows
from serve.engines.local.runner import Runner
from serve.engines.local.stack import Stack, can_stack
from ulm import runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ArtefactError, ConfigError, ModelNotFoundError, OverloadedError, UnsupportedError
from ulm.models.account import num_parameters, on_meta
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.engines.local.engine import Config

MAX_CACHE_BYTES = 1 << 30  # on a CPU, unless the recipe says more
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.8}  # of the memory that is free when the first member of a spec is loaded


@dataclass(eq=False)
class Loaded:
    """A checkpoint in a slot of a runner. A reloaded member is another; this one goes when its answers have ended."""

    id: str
    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    runner: Runner
    slot: int
    number: int  # of this load, among all of the engine's
    num_bytes: int
    info: MemberInfo
    num_users: int = 0  # answers under way
    is_retired: bool = False  # unloaded, evicted or reloaded: gone with its last user
    used_s: float = field(default_factory=time.monotonic)

    def join(self) -> None:
        """An answer begins to use it."""
        self.num_users += 1
        self.used_s = time.monotonic()

    def leave(self) -> None:
        """An answer has ended; the last one takes a retired member's weights along."""
        self.num_users -= 1
        self._go_if_idle()

    def retire(self) -> None:
        """No new answers from now on."""
        self.is_retired = True
        self._go_if_idle()

    def _go_if_idle(self) -> None:
        if self.is_retired and not self.num_users:
            self.runner.drop(self.slot, self.key)

    @property
    def key(self) -> Hashable:
        """What its cached texts are found by: never those of other weights."""
        return self.number


@dataclass(frozen=True)
class Source:
    """Where a member comes from, loaded or put away."""

    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    info: MemberInfo


class Members:
    """All members of an engine, and what runs them.

    `load`, `unload`, `reload` and `bring_back` are called by one thread, one at a time; what the engine's own thread
    looks at while it answers, they change there, by `do`.
    """

    def __init__(self, config: Config, device: torch.device, do: Callable[[Callable[[], Any]], Any]) -> None:
        self._config, self._device, self._do = config, device, do
        self.sources: dict[str, Source] = {}
        self.loaded: dict[str, Loaded] = {}
        self._leaving: list[Loaded] = []  # retired, with answers under way
        self._runners: dict[tuple[str, torch.dtype], list[Runner]] = {}
        self._numbers = itertools.count()
        self.num_evictions = 0

    @property
    def runners(self) -> list[Runner]:
        """What runs members now."""
        return [runner for runners in list(self._runners.values()) for runner in runners]

    def source(self, member: str) -> Source:
        """Where a member comes from; ModelNotFoundError for a name that is nobody's."""
        source = self.sources.get(member)
        if source is None:
            raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")
        return source

    def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder."""
        source = self._read_source(checkpoint)
        self._install(member, source)
        return source.info

    def unload(self, member: str) -> None:
        """Forget a member; its weights go with its last answer."""

        def remove() -> None:
            self.source(member)
            self.sources.pop(member)
            self._put_away(member)
            self._drop_empty()

        self._do(remove)

    def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights of the same shape for a member."""
        old, source = self.source(member), self._read_source(checkpoint)
        remedy = "unload the member and load this one, or give it another name"
        if source.spec != old.spec:
            problem = f"{checkpoint} has another spec than member {member!r}, which is loaded from {old.path}"
            raise ConfigError("reload", problem, remedy)
        if source.tokenizer.digest != old.tokenizer.digest:
            raise ConfigError("reload", f"{checkpoint} has another tokenizer than member {member!r}", remedy)
        self._install(member, source)
        return source.info

    def bring_back(self, members: Collection[str]) -> None:
        """Load those again that were put away; they stay beside each other."""
        for member in members:
            if member not in self.loaded:
                self._install(member, self.source(member), beside=members)

    def let_go(self) -> None:
        """Give back what retired members held whose last answer has ended. In the engine's thread."""
        if any(not loaded.num_users for loaded in self._leaving):
            self._drop_empty()

    def next_logits(self, member: str, tokens: Sequence[int]) -> Tensor | None:
        """Logits after a text, as logits_V, of a member in rows, which remembers texts asked for lately; else None."""
        loaded = self.loaded.get(member)
        if loaded is None or not isinstance(loaded.runner, Rows):
            return None
        return loaded.runner.next_logits(tokens)

    @staticmethod
    def _read_source(checkpoint: str) -> Source:
        path = store.resolve(checkpoint, root=runtime.root())
        spec, tokenizer = store.read_spec(path), store.read_tokenizer(path)
        if spec.vocab_size != tokenizer.vocab_size:
            sizes = f"its tokenizer has {tokenizer.vocab_size} tokens, its model {spec.vocab_size}"
            raise ArtefactError(f"{path}: {sizes}: some could be read or written by one of them only")
        info = MemberInfo(
            str(path),
            read_manifest(path).digest,
            spec.context_tokens,
            spec.vocab_size,
            num_parameters(on_meta(spec)),
        )
        return Source(path, spec, tokenizer, info)

    def _install(self, member: str, source: Source, beside: Collection[str] = ()) -> None:
        """Weights into a slot, and the member's name onto it. What else has to go, goes first; `beside` stays."""
        tensors = store.read_weights(source.path)
        store.check_weights(source.path, tensors, store.tensors(on_meta(source.spec)))
        dtype = self._dtype(tensors)
        num_bytes = source.info.num_parameters * dtype.itemsize
        self._do(lambda: self._make_room(member, num_bytes, beside))
        runner, slot = self._find_slot(source.spec, dtype)
        try:
            runner.put(slot, tensors)
        except Exception:
            self._do(lambda: runner.used_slots.discard(slot))
            self._do(self._drop_empty)
            raise

        def install() -> None:
            number = next(self._numbers)
            loaded = Loaded(
                member, source.path, source.spec, source.tokenizer, runner, slot, number, num_bytes, source.info
            )
            self._put_away(member)
            self.loaded[member], self.sources[member] = loaded, source
            self._drop_empty()

        self._do(install)

    def _put_away(self, member: str) -> None:
        """No new answers for a member; its weights go with its last answer."""
        if (loaded := self.loaded.pop(member, None)) is not None:
            loaded.retire()
            if loaded.num_users:
                self._leaving.append(loaded)

    def _dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        if self._config.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self._config.dtype))
        return torch.bfloat16 if any(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32

    def _make_room(self, member: str, num_bytes: int, beside: Collection[str]) -> None:
        """Put members away, those used longest ago first, until another fits; nobody's where it cannot.

        UnsupportedError where it never could, alone or with those that it is wanted with; else OverloadedError.
        """
        limit = self._config.max_weight_bytes
        if limit is None:
            return
        kept = [m for m in beside if m in self.loaded and m != member]
        wanted = num_bytes + sum(self.loaded[m].num_bytes for m in kept)
        if wanted > limit:
            together = f" together with {', '.join(map(repr, kept))}" if kept else ""
            problem = f"member {member!r}{together}: {wanted:,} bytes of weights; max_weight_bytes is {limit:,}"
            raise UnsupportedError(problem)
        held = sum(m.num_bytes for m in [*self.loaded.values(), *self._leaving])
        idle = [m for m in self.loaded.values() if not m.num_users and m.id not in kept]
        at_work = held - sum(m.num_bytes for m in idle)
        if at_work + num_bytes > limit:
            problem = f"{num_bytes:,} bytes of weights do not fit beside the {at_work:,} bytes of members at work"
            remedy = f"ask again later, or allow more than max_weight_bytes = {limit:,}"
            raise OverloadedError(f"member {member!r}: {problem}: {remedy}", code="overloaded")
        idle.sort(key=lambda m: (m.id != member, m.used_s))  # what is replaced goes first
        for away in idle:
            if held + num_bytes <= limit:
                break
            self._put_away(away.id)
            self.num_evictions += away.id != member
            held -= away.num_bytes
        self._drop_empty()

    def _find_slot(self, spec: ModelSpec, dtype: torch.dtype) -> tuple[Runner, int]:
        """Where another member of a spec can be put."""
        key = store.spec_digest(spec), dtype

        def find() -> tuple[Runner, int] | None:
            for runner in self._runners.get(key, ()):
                for slot in range(runner.max_slots):
                    if slot not in runner.used_slots:
                        runner.used_slots.add(slot)
                        return runner, slot
            return None

        found: tuple[Runner, int] | None = self._do(find)
        if found is not None:
            return found
        made = self._new_runner(spec, dtype)
        made.used_slots.add(0)
        self._do(lambda: self._runners.setdefault(key, []).append(made))
        return made, 0

    def _new_runner(self, spec: ModelSpec, dtype: torch.dtype) -> Runner:
        cache_bytes = self._config.kv_cache_bytes
        if cache_bytes is None:
            cache_bytes = int(CACHE_SHARE[self._device.type] * runtime.free_bytes(self._device))
            cache_bytes = min(cache_bytes, MAX_CACHE_BYTES) if self._device.type == "cpu" else cache_bytes
        if can_stack(spec):
            return Stack(
                spec,
                dtype=dtype,
                device=self._device,
                kv_cache_bytes=cache_bytes,
                max_batch_tokens=self._config.max_batch_tokens,
                compile_after_steps=self._config.compile_after_steps,
                max_compile_s=self._config.max_compile_s,
            )
        return Rows(
            spec,
            dtype=dtype,
            device=self._device,
            kv_cache_bytes=cache_bytes,
            max_rows=self._config.max_answers,
            num_prefixes=self._config.num_prefixes,
        )

    def _drop_empty(self) -> None:
        """Give back the memory of runners without members."""
        self._leaving = [loaded for loaded in self._leaving if loaded.num_users]
        for key, runners in list(self._runners.items()):
            self._runners[key] = [runner for runner in runners if runner.used_slots]
            if not self._runners[key]:
                del self._runners[key]
