"""Members in vLLM, one or several that it mixes, as an Engine: requests are checked here, answer.py has the outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.constrained import Constraint, Grammars
from serve.contracts import GenerateRequest, MemberInfo, TokenChunk, TokenLogprob
from serve.engines.vllm.answer import Answer, echo, entries_of
from serve.engines.vllm.arguments import arguments_of, looking, mixed, reading
from serve.engines.vllm.client import Client
from serve.engines.vllm.folder import dtype_of, exported, together
from serve.engines.vllm.settings import Config, settle
from ulm import runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import (
    ConfigError,
    MemberDownError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UlmError,
    UnsupportedError,
)
from ulm.models.account import num_parameters, on_meta
from ulm.models.generate import room
from ulm.registry import register
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import Tokenizer

PRIORITY_MS = 10_000  # a unit of priority is worth so much waiting, as in the local engine
# With so many answers open, one token more comes in a piece: each piece is a message of 0.7 ms through Ray Serve, and
# at 32 answers they would cost more than the model. The first token is never held back.
STREAMS_A_TOKEN = 8


@dataclass(frozen=True)
class Source:
    """What a member is made from."""

    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    digest: str

    @classmethod
    def read(cls, checkpoint: str) -> Source:
        """All of a checkpoint but its weights."""
        path = store.resolve(checkpoint, root=runtime.root())
        return cls(path, store.read_spec(path), store.read_tokenizer(path), read_manifest(path).digest)


@register("engine", Config)
class VllmEngine:
    """One member, or several that each answer takes part of; `config` has nothing left open.

    The client's processes are made by the replica (server.py). `root` is where what it exports for a reload is kept.
    """

    @staticmethod
    def settled(config: Config, checkpoints: Mapping[str, Path], root: Path, place: str) -> Config:
        """The settings with nothing left open, and the folder that vLLM reads is there.

        ConfigError for what cannot be; `place` is where the recipe has the settings.
        """
        specs = [store.read_spec(checkpoint) for checkpoint in checkpoints.values()]
        dtypes = {dtype_of(checkpoint) for checkpoint in checkpoints.values()}
        config = settle(config, specs, max(dtypes), place)  # float32 where one is
        try:
            together(checkpoints, config.dtype, root)
        except UnsupportedError as error:
            which = ", ".join(checkpoints)
            raise ConfigError(f"{place}.kind", f"vllm cannot run {which}: {error}", "take {kind: local}") from None
        return config

    @staticmethod
    def deployment(number: int, checkpoints: Mapping[str, Path], config: Config) -> Any:
        """The Serve deployment that runs the members. Ray must be initialised."""
        from serve.engines.vllm.server import build

        return build(number, checkpoints, config)

    def __init__(self, config: Config, sources: Mapping[str, Source], client: Client, root: Path) -> None:
        assert config.context_tokens is not None and config.kv_cache_bytes is not None, "not settled"
        self._config, self._sources, self._client, self._root = config, dict(sources), client, root
        self._context_tokens, self._kv_cache_bytes = config.context_tokens, config.kv_cache_bytes
        self._tokenizer = next(iter(sources.values())).tokenizer  # that of all
        self._num_parameters = {name: num_parameters(on_meta(source.spec)) for name, source in sources.items()}
        self._num_open = 0  # choices asked of vLLM
        self._answers: set[Answer] = set()  # under way
        self._num_generated = self._num_prompt = self._num_shared = 0  # tokens; generated in answers that have ended
        self._is_closed = False
        self._reloading = asyncio.Lock()
        self._grammars = Grammars()

    # ---- members

    async def members(self) -> dict[str, MemberInfo]:
        """Those it was made with."""
        return {member: self._info(member) for member in self._sources}

    def _info(self, member: str) -> MemberInfo:
        source = self._sources[member]
        sizes = (self._context_tokens, source.spec.vocab_size, self._num_parameters[member])
        return MemberInfo(str(source.path), source.digest, *sizes)

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """The same as `reload`, for a member that is there."""
        if member not in self._sources:
            problem = f"this vllm engine runs {', '.join(self._sources)} alone; add {member!r} to the recipe"
            raise UnsupportedError(f"load: {problem}")
        return await self.reload(member, checkpoint)

    async def unload(self, member: str) -> None:
        """UnsupportedError: vLLM's processes hold what they have for their whole life."""
        self._check_member(member)
        raise UnsupportedError(f"unload: a vllm engine is its member; serve without {member!r} instead")

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for the member; answers under way go on with the old ones. ConfigError for another shape."""
        self._check_member(member)
        if len(self._sources) > 1:
            problem = "members that share a vllm engine have their weights for its whole life"
            raise UnsupportedError(f"reload: {problem}; members_per_engine: 1 gives {member!r} one of its own")
        if self._config.max_replicas > 1:
            problem = "its replicas would answer with different weights while it goes on"
            raise UnsupportedError(f"reload: {member!r} has up to {self._config.max_replicas} replicas, and {problem}")
        async with self._reloading:
            source = await asyncio.to_thread(Source.read, checkpoint)
            remedy = "serve it under another name"
            known = self._sources[member]
            if source.spec != known.spec:
                problem = f"{checkpoint} has another spec than member {member!r}, which is from {known.path}"
                raise ConfigError("reload", problem, remedy)
            if source.tokenizer.digest != self._tokenizer.digest:
                raise ConfigError("reload", f"{checkpoint} has another tokenizer than member {member!r}", remedy)
            folder = await asyncio.to_thread(exported, source.path, self._config.dtype, self._root)
            await self._client.reload(folder)
            self._sources[member] = source
            return self._info(member)

    def _check_member(self, member: str) -> None:
        if self._is_closed:
            raise MemberDownError("the engine was closed")
        if member not in self._sources:
            raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")

    # ---- answers

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; closing the iterator cancels it."""
        request.check()
        for member in sorted(name for name, weight in request.weights.items() if weight > 0):
            self._check_member(member)
        self._check_tokens(request.tokens, "prompt")
        self._check_tokens(request.generated, "generated")
        tokenizer = self._tokenizer
        request.sampling.check(tokenizer.vocab_size)
        text = echo(request, tokenizer)
        if request.max_tokens == 0:
            room(len(request.tokens) - 1, self._context_tokens)
            entries = await self._entries(request.tokens, request.prompt_logprobs, request.weights)
            for index in range(request.n):
                yield TokenChunk(text, (), (), "length", None, index, () if index else entries)
            return
        known = (*request.tokens, *request.generated)
        max_tokens = min(request.max_tokens, room(len(known), self._context_tokens))
        arguments = arguments_of(request, max_tokens, tokenizer.eot_id)
        answer = Answer(request, tokenizer, text, await self._constraint(request))
        self._answers.add(answer)
        try:
            async with aclosing(self._asked(known, arguments, request.weights, request.priority)) as outputs:
                async with aclosing(answer.chunks(outputs)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            self._answers.remove(answer)
            self._num_generated += answer.num_tokens

    async def _constraint(self, request: GenerateRequest) -> Constraint | None:
        """What the answer is held to; followed here, too, for vLLM says nothing where it becomes too complex."""
        if request.json_schema is None:
            return None
        if self._tokenizer.kind == "char":
            problem = "vllm reads no char tokenizer for it; a member of the local engine does"
            raise UnsupportedError(f"json_schema: {problem}")
        return await self._grammars.begin(self._tokenizer, request.json_schema)

    async def _asked(
        self, tokens: Sequence[int], arguments: Mapping[str, Any], weights: Mapping[str, float], priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs, of the members by their weights; refused where too many are waiting."""
        if len(self._sources) > 1:
            arguments = {**arguments, **mixed(weights)}
        num_choices = int(arguments.get("n", 1))
        if self._num_open >= self._config.max_answers + self._config.max_waiting:
            waiting = f"{self._num_open - self._config.max_answers:,} answers are waiting already"
            raise OverloadedError(f"{waiting}: ask again later", code="overloaded")
        if arguments["output_kind"] == "DELTA":
            arguments = {**arguments, "stream_interval": 1 + self._num_open // STREAMS_A_TOKEN}
        self._num_open += num_choices
        is_new = True
        try:
            due_ms = int(1e3 * time.monotonic()) - PRIORITY_MS * priority  # whose comes first, goes first
            async with aclosing(self._client.generate(tokens, arguments, due_ms)) as outputs:
                async for output in outputs:
                    if is_new:
                        self._num_prompt += len(tokens)
                        self._num_shared += output.num_cached_tokens or 0
                        is_new = False
                    yield output
        finally:
            self._num_open -= num_choices

    async def _one(self, tokens: Sequence[int], arguments: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
        """The one output of a request that brings one."""
        async with aclosing(self._asked(tokens, arguments, weights)) as outputs:
            found = [output async for output in outputs]
        if not found:
            raise UlmError("vLLM gave no answer")
        return found[-1]

    async def _entries(
        self, tokens: Sequence[int], num_top: int | None, weights: Mapping[str, float]
    ) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of all tokens but the first."""
        if num_top is None or len(tokens) < 2:
            return ()
        output = await self._one(*reading(tokens, num_top), weights)
        return entries_of(tokens[1:], [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]], num_top)

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats."""
        self._check_asked(member, tokens)
        room(len(tokens) - 1, self._context_tokens)
        return [entry.logprob for entry in await self._entries(tuple(tokens), 0, {member: 1.0})]

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """float32 log-probabilities of the whole vocabulary after `tokens`, by vLLM's prefix cache.

        ContextLengthError for a text that fills the context: to vLLM there is no place after it.
        """
        self._check_asked(member, tokens)
        room(len(tokens), self._context_tokens)
        found = (await self._one(tokens, looking(), {member: 1.0})).outputs[0].logprobs
        logprobs_V = np.full(self._tokenizer.vocab_size, -np.inf, dtype=np.float32)
        logprobs_V[found.token_ids] = found.logprobs
        return logprobs_V

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """UnsupportedError: vLLM either generates or embeds."""
        self._check_asked(member, tokens)
        raise UnsupportedError("embed: the vllm engine does not; a member of the local engine does")

    def _check_asked(self, member: str, tokens: Sequence[int]) -> None:
        self._check_member(member)
        GenerateRequest(tuple(tokens), {member: 1.0}, 1).check()
        self._check_tokens(tokens, "prompt")

    def _check_tokens(self, tokens: Sequence[int], name: str) -> None:
        vocab_size = self._tokenizer.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            sizes = f"the vocabulary has {vocab_size}, from 0 on"
            raise RequestError(f"{name}: there is no token {wrong}: {sizes}", param=name)

    async def stats(self) -> dict[str, float]:
        """Choices running and waiting, tokens, memory of the replica and of vLLM's processes below it."""
        running = min(self._num_open, self._config.max_answers)
        return {
            "running": float(running),
            "waiting": float(self._num_open - running),
            "generated_tokens": float(self._num_generated + sum(answer.num_tokens for answer in self._answers)),
            "prompt_tokens": float(self._num_prompt),
            "shared_prompt_tokens": float(self._num_shared),
            "members": float(len(self._sources)),
            "kv_cache_bytes": float(self._kv_cache_bytes),
            "resident_bytes": float(runtime.tree_rss_bytes()),
        }

    async def close(self) -> None:
        """End vLLM's processes; answers under way fail."""
        self._is_closed = True
        self._grammars.close()
        await asyncio.to_thread(self._client.close)
