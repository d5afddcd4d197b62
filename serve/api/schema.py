"""OpenAI's request bodies, as far as this endpoint honours them.

A field that OpenAI knows and this endpoint does not is accepted at its neutral value only: a setting without effect
is an error, not a silence. Labels that change no answer (`user`, `metadata`, …) are accepted, and not used.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve.constrained import ANY_OBJECT, schema_text
from serve.contracts import MAX_CHOICES
from ulm.models.sampling import MAX_SEED, Bias, Sampling, TokenId
from ulm.recipes.serve import Budget, Defaults, MinP, OpenAIPenalty, RepetitionPenalty, Temperature, TopP

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
MAX_MEMBERS = 64
MAX_FIELDS = 100  # of an object; no body here has half as many
MAX_LABELS = 16  # OpenAI's
TEXT_TYPES = ("text", "input_text", "output_text")  # of a message's parts, in chats and responses
LENGTHS = ("max_completion_tokens", "max_output_tokens", "max_tokens")  # names of an answer's length, newer ones first


def _valid_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode: it holds a lone surrogate") from None
    return text


Token = Annotated[int, Field(ge=0, strict=True)]  # strict: ["12"] is a text, not a token
Text = Annotated[str, AfterValidator(_valid_unicode)]
# A body can hold millions of wrong items. An error for each of them takes a minute and gigabytes: the first will do.
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]


def _few_fields(given: Any) -> Any:
    """The same of fields that are not known."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"an object has {len(given)} fields, and {MAX_FIELDS} are the most")
    return given


Labels = Annotated[dict[str, str], Field(max_length=MAX_LABELS, fail_fast=True)]


def several(given: str | list[Any]) -> list[str | list[int]]:
    """What may be one text or one list of token ids, or a list of either, as a list."""
    is_one = isinstance(given, str) or (given and isinstance(given[0], int))
    return [given] if is_one else list(given)


class Body(BaseModel):
    """Strict: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_bounded(cls, given: Any) -> Any:
        return _few_fields(given)


class UlmOptions(Body):
    """Our own field `ulm`: what this request may spend, and parameters for a strategy that has them."""

    budget: Annotated[Budget | None, BeforeValidator(_few_fields)] = None
    top_k: int | None = Field(None, ge=1, strict=True)
    every_tokens: int | None = Field(None, ge=1, strict=True)
    margin: float | None = Field(None, ge=0, le=1, strict=True)
    by: Literal["clusterer", "likelihood", "product"] | None = None
    members: tuple[str, ...] | None = Field(None, min_length=1, max_length=MAX_MEMBERS, fail_fast=True)

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


class NamedSchema(Body):
    """A JSON schema, and what the client calls it; every one is followed strictly, whatever `strict` says."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class Format(Body):
    """What an answer is to look like."""

    type: Literal["text", "json_object", "json_schema"]

    def json_schema_of(self, schema: dict[str, Any] | None) -> str | None:
        """What the answer is held to, as a request carries it; `schema` is what was given beside the type."""
        if self.type == "text":
            return None
        return ANY_OBJECT if schema is None else schema_text(schema)


class ResponseFormat(Format):
    """`response_format` of completions and chats."""

    json_schema: NamedSchema | None = None

    @property
    def schema_given(self) -> dict[str, Any] | None:
        """The schema, without its name."""
        return None if self.json_schema is None else self.json_schema.schema_

    @model_validator(mode="after")
    def _schema_where_it_counts(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is what a type of json_schema needs, and no other takes")
        return self


class GenerationBody(Body):
    """What completions, chat completions and responses share."""

    model: str = Field(max_length=200)
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    stream: bool = False
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    user: str | None = None
    ulm: UlmOptions = UlmOptions()
    # not OpenAI's; vLLM and others have them here
    top_k: int | None = Field(None, ge=-1)  # -1 and 0: all
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Clients send null for what they leave open."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    def laid_over(self, defaults: Defaults) -> Self:
        """The body with an operator's defaults where it says nothing itself."""
        open_fields = type(self).model_fields.keys() - self.model_fields_set
        values = defaults.model_dump(exclude_none=True)
        lengths = [name for name in LENGTHS if name in type(self).model_fields]
        if (length := values.pop("max_tokens", None)) is not None and open_fields.issuperset(lengths):
            values[lengths[0]] = length
        laid = {name: value for name, value in values.items() if name in open_fields}
        if laid.get("temperature", self.temperature) == 0:  # greedy, which they would be refused beside
            laid = {name: value for name, value in laid.items() if name not in ("top_k", "min_p")}
        return self.model_copy(update=laid)

    def sampling(self, seed: int) -> Sampling:
        """How tokens are chosen; `seed` is that of a request that names none."""
        given = {name: getattr(self, name) for name in Sampling.model_fields if name in type(self).model_fields}
        given["top_k"] = self.top_k if self.top_k and self.top_k > 0 else None
        given["seed"] = seed if self.seed is None else self.seed & MAX_SEED
        return Sampling(**given)

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """Tokens that an answer may have; None: as many as the context holds."""

    # what its errors call GenerateRequest's json_schema
    format_place: ClassVar[str] = "response_format"

    def more(self) -> dict[str, Any]:
        """Further settings of a GenerateRequest."""
        return {}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What ends an answer."""
        return ()

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives are reported beside the chosen token; None: no logprobs."""
        return None


class ChoicesBody(GenerationBody):
    """What completions and chat completions share."""

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    frequency_penalty: OpenAIPenalty = 0.0
    presence_penalty: OpenAIPenalty = 0.0
    logit_bias: dict[TokenId, Bias] = Field({}, fail_fast=True)
    stop: Text | Many[Text] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if len(self.stop_strings) > 4 or any(len(s) > 1_000 for s in self.stop_strings):
            raise ValueError("stop takes at most 4 strings of at most 1,000 characters")
        return self

    def more(self) -> dict[str, Any]:
        """Further settings of a GenerateRequest."""
        wanted = self.response_format
        return {"n": self.n, "json_schema": wanted and wanted.json_schema_of(wanted.schema_given)}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(ChoicesBody):
    """POST /v1/completions."""

    prompt: Text | Many[Token] | Many[Text] | Many[Many[Token]] = Field("", union_mode="left_to_right")
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_tokens

    @model_validator(mode="after")
    def _some_prompts(self) -> Self:
        if isinstance(self.prompt, list) and not 0 < len(self.prompts()) <= MAX_PROMPTS:
            raise ValueError(f"prompt: give one to {MAX_PROMPTS} prompts")
        if self.echo and self.logprobs is not None and self.stream and self.n > 1:
            raise ValueError("echo: with logprobs, several choices are not streamed; ask for them whole")
        return self

    def more(self) -> dict[str, Any]:
        """Further settings of a GenerateRequest."""
        prompt_logprobs = self.logprobs if self.echo else None
        return {**super().more(), "best_of": self.best_of, "echo": self.echo, "prompt_logprobs": prompt_logprobs}

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each a text or token ids."""
        return several(self.prompt)

    @property
    def gives_tokens(self) -> bool:
        """Whether the prompts are token ids, which are read as they are; before a text goes an <|endoftext|>."""
        return not isinstance(self.prompts()[0], str)

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives are reported beside the chosen token; None: no logprobs."""
        return self.logprobs


def text_alone(given: Any) -> Any:
    """The same of a message's content; where it has a part of another type, an error that says so."""
    types = [part.get("type") for part in given if isinstance(part, dict)] if isinstance(given, list) else []
    if any(isinstance(type_, str) and type_ not in TEXT_TYPES for type_ in types):
        raise ValueError("has a part that is no text, such as an image, a file or audio; only text is read here")
    return given


class TextPart(Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | Many[TextPart], BeforeValidator(text_alone)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(ChoicesBody):
    """POST /v1/chat/completions."""

    messages: Many[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    # labels
    metadata: Labels | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # neutral values only
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Many[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens that an answer may have; None: as many as the context holds."""
        return self.max_completion_tokens or self.max_tokens

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
