"""POST /v1/embeddings: the mean of a member's last hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from serve.api.access import Visit
from serve.api.prompts import read_prompt
from serve.api.schema import MAX_PROMPTS, Body, Many, Text, Token, several
from serve.api.spent import Record, counted
from serve.catalog import Catalog, Model
from serve.contracts import Member
from ulm.errors import MemberDownError, RequestError, UnavailableError, UnsupportedError
from ulm.models.generate import room


class EmbeddingBody(Body):
    """OpenAI's, with a member or an alias of one as model."""

    model: str = Field(max_length=200)
    input: Text | Many[Token] | Many[Text] | Many[Many[Token]] = Field(union_mode="left_to_right")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not 0 < len(self.inputs()) <= MAX_PROMPTS or not all(self.inputs()):
            raise ValueError(f"input: give one to {MAX_PROMPTS} texts, none of them empty")
        return self

    def inputs(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        return several(self.input)


async def embeddings(catalog: Catalog, body: EmbeddingBody, visit: Visit, record: Record) -> dict[str, Any]:
    """The vectors of all inputs."""
    model = catalog.model(body.model, allowed=visit.models)
    visit.model = model.name
    with counted(record, model.name, "embeddings"):
        answer = await _embedded(model, body, visit)
    record("ulm_tokens_total", visit.tokens, {"model": model.name, "kind": "prompt"})
    return answer


async def _embedded(model: Model, body: EmbeddingBody, visit: Visit) -> dict[str, Any]:
    member = _member(model)
    texts = await asyncio.to_thread(_read, model, body)
    count = sum(map(len, texts))
    await visit.reserve(count)
    with visit.owing(count):
        vectors = await _vectors(member, texts, body.dimensions)
    data = [{"object": "embedding", "index": i, "embedding": _coded(v, body)} for i, v in enumerate(vectors)]
    await visit.used(count)
    return {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


async def _vectors(member: Member, texts: list[list[int]], dimensions: int | None) -> list[np.ndarray]:
    try:
        vectors = [_unit(await member.engine.embed(member.id, tokens)) for tokens in texts]
    except MemberDownError as error:
        raise UnavailableError(f"{member.id} can not answer now ({error})", code="unavailable") from None
    width = len(vectors[0])
    if dimensions not in (None, width):
        raise RequestError(f"dimensions: {member.id} gives {width}, and no fewer", param="dimensions")
    return vectors


def _member(model: Model) -> Member:
    if len(model.members) > 1:
        remedy = f"ask a member, such as {next(iter(model.members))}"
        raise UnsupportedError(f"embeddings: the space is one member's own, and {model.name} has several; {remedy}")
    return next(iter(model.members.values()))


def _read(model: Model, body: EmbeddingBody) -> list[list[int]]:
    found = [read_prompt(it, model.tokenizer, model.context_tokens) for it in body.inputs()]
    for tokens in found:
        room(len(tokens) - 1, model.context_tokens)  # nothing follows a text: it may fill the context
    return found


def _unit(vector_D: np.ndarray) -> np.ndarray:
    return np.asarray(vector_D / max(float(np.linalg.norm(vector_D)), float(np.finfo(np.float32).tiny)))


def _coded(vector_D: np.ndarray, body: EmbeddingBody) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector_D]
