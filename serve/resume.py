"""An answer that another process goes on with: what of it has come, and the request for its rest."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from serve.contracts import GenerateRequest, TokenChunk


class SoFar:
    """What of an answer has come, and the request for its rest."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request, self._began_s = request, asyncio.get_running_loop().time()
        self._tokens: list[int] = []
        self._has_begun, self._num_open = False, request.n

    def add(self, chunk: TokenChunk) -> None:
        """Enter a chunk."""
        self._has_begun = True
        self._tokens += chunk.tokens
        self._num_open -= chunk.finish_reason is not None

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return not self._num_open

    @property
    def can_go_on(self) -> bool:
        """Whether another replica can give the rest: of several choices none can be told from the others."""
        request = self._request
        is_one = request.num_choices == 1 and not request.echo and len(self._tokens) < request.max_tokens
        return is_one or not self._has_begun

    def rest(self) -> GenerateRequest:
        """What is still to be done, in the time that is left."""
        request, left_s = self._request, self._request.deadline_s
        if left_s is not None:
            left_s = max(0.0, left_s - (asyncio.get_running_loop().time() - self._began_s))
        if not self._has_begun:
            return replace(request, deadline_s=left_s)
        return replace(
            request,
            generated=(*request.generated, *self._tokens),
            max_tokens=request.max_tokens - len(self._tokens),
            prompt_logprobs=None,  # they came with the first chunk
            deadline_s=left_s,
        )
