"""vLLM's asynchronous engine behind the few calls that we make of it, its errors as ours."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ulm.errors import MemberDownError, RequestError, UlmError


class Client(Protocol):
    """What the engine needs of vLLM."""

    def generate(self, tokens: Sequence[int], arguments: Mapping[str, Any], due_ms: int) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for a prompt; closing the iterator aborts it. Of those that wait the earliest due goes on."""
        ...

    async def reload(self, folder: Path) -> None:
        """Other weights of the same shape. Answers under way are finished first, those that come meanwhile wait."""
        ...

    def close(self) -> None:
        """End vLLM's processes."""
        ...


class AsyncClient:
    """The Client of an AsyncLLM."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    async def generate(
        self, tokens: Sequence[int], arguments: Mapping[str, Any], due_ms: int
    ) -> AsyncGenerator[Any, None]:
        """See Client."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        prompt = {"prompt_token_ids": list(tokens)}
        with _errors():
            kind = RequestOutputKind[arguments["output_kind"]]
            held_to = arguments.get("structured_outputs")
            made = {"output_kind": kind, "structured_outputs": held_to and StructuredOutputsParams(**held_to)}
            sampling = SamplingParams(**{**arguments, **made, "detokenize": False})
            outputs = self._llm.generate(prompt, sampling, uuid.uuid4().hex, priority=due_ms)
            async with aclosing(outputs) as source:
                async for output in source:
                    yield output

    async def reload(self, folder: Path) -> None:
        """See Client."""
        with _errors():
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._llm.collective_rpc("ulm_reload", args=(str(folder),))
            finally:
                await self._llm.resume_generation()

    def close(self) -> None:
        """See Client."""
        self._llm.shutdown()


@contextmanager
def _errors() -> Iterator[None]:
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except EngineDeadError:
        raise MemberDownError("vLLM's engine process has ended; it is started again") from None
    except VLLMClientError as error:
        raise RequestError(str(error)) from None
    except EngineGenerateError as error:
        raise UlmError(f"vLLM could not go on: {error.__cause__ or error}") from error
