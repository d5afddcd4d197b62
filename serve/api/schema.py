"""OpenAI's request bodies, as far as this endpoint honours them.

A field that OpenAI knows and this endpoint does not is accepted at its neutral value only: a setting without effect
is an error, not a silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ulm.models.sampling import MAX_SEED
from ulm.recipes.serve import Budget

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
MAX_MEMBERS = 64


def _valid_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode: it holds a lone surrogate") from None
    return text


Token = Annotated[int, Field(ge=0, strict=True)]  # strict: ["12"] is a text, not a token
Text = Annotated[str, AfterValidator(_valid_unicode)]


class Body(BaseModel):
    """Strict: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class UlmOptions(Body):
    """Our own field `ulm`: what this request may spend, and parameters for a strategy that has them."""

    budget: Budget | None = None
    top_k: int | None = Field(None, ge=1, strict=True)
    every_tokens: int | None = Field(None, ge=1, strict=True)
    margin: float | None = Field(None, ge=0, le=1, strict=True)
    by: Literal["clusterer", "likelihood", "product"] | None = None
    members: tuple[str, ...] | None = Field(None, min_length=1, max_length=MAX_MEMBERS)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if self.members is not None and len(set(self.members)) < len(self.members):
            raise ValueError("members names one twice")
        return self

    def strategy_options(self) -> dict[str, Any]:
        """The parameters that were given."""
        return self.model_dump(exclude={"budget"}, exclude_none=True)


class StreamOptions(Body):
    """What a stream adds."""

    include_usage: bool = False


class GenerationBody(Body):
    """What completions and chat completions share."""

    model: str = Field(max_length=200)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)  # not OpenAI's; vLLM and others have it here
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Text | list[Text] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted for clients that send it; not used
    ulm: UlmOptions = UlmOptions()
    # neutral values only
    n: Literal[1] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: Literal[1] | None = None  # not OpenAI's; clients of vLLM send it
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Clients send null for what they leave open."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _neutral(self) -> Self:
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported yet; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if len(self.stop_strings) > 4 or any(len(s) > 1_000 for s in self.stop_strings):
            raise ValueError("stop takes at most 4 strings of at most 1,000 characters")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]] = Field("", union_mode="left_to_right")
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _some_prompts(self) -> Self:
        if isinstance(self.prompt, list) and not 0 < len(self.prompts()) <= MAX_PROMPTS:
            raise ValueError(f"prompt: give one to {MAX_PROMPTS} prompts")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives are reported beside the chosen token; None: no logprobs."""
        return self.logprobs


class TextPart(Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def plain(self) -> list[dict[str, str]]:
        """The messages for the chat template."""
        return [message.plain() for message in self.messages]

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives are reported beside the chosen token; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
