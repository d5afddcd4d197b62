"""Answers that are JSON of a schema: which tokens may come next, by llguidance.

A schema comes from a client. It is bounded here before llguidance sees it, tried in a process of its own where its
keywords could make compiling it long, and bounded by LIMITS while an answer follows it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from torch import Tensor

from ulm.errors import MemberDownError, OverloadedError, RequestError, UlmError, UnknownCharacterError, UnsupportedError
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:  # a type in the stubs alone
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT = '{"type":"object"}'
PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
MAX_SCHEMA_BYTES = 64 << 10
MAX_DEPTH = 64
MAX_INTEGER = 2**53  # llguidance takes larger ones for the nearest double
MAX_BRANCHES = 50  # of one anyOf or oneOf: a step of the parser takes their number squared, 300 of them 0.3 s
MAX_KEPT = 16  # compiled schemas, of up to 20 MB each
MAX_KNOWN = 128  # schemas that were looked at lately
MAX_USES = 32  # of one, whose answers fill its tables together
TOO_LARGE = "takes too long or too much memory to compile: smaller bounds and multiples, fewer patterns and allOf"
MAX_WAITING = 16  # new schemas that wait for their trial
TRIAL_S = 20.0  # for the trial of a schema, which itself takes a second of one core at most
FREE_S, TOKEN_S = 0.1, 0.001  # for an answer, and for each of its tokens; a usual one takes 0.01 to 0.3 ms
# Of one step, so that most take some ms at most. A state of the lexer takes 2 kB.
LIMITS = LLParserLimits(
    max_items_in_row=5_000,
    step_lexer_fuel=50_000,
    max_lexer_states=10_000,
    verbose_errors=False,
)
# On one line, with or without a space behind a comma or colon: a model that has lost its way never ends white space.
SPELLING: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}

OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
NESTED = frozenset({"items", "additionalProperties", "additionalItems"})
PLAIN = frozenset(
    "type enum const required $ref format pattern multipleOf minimum maximum exclusiveMinimum exclusiveMaximum"
    " minLength maxLength minItems maxItems maxProperties".split()
)
REMARKS = frozenset(
    "$schema $id $anchor $comment title description default examples deprecated readOnly writeOnly discriminator"
    " contentEncoding contentMediaType".split()
)
# What can make a short schema a large automaton.
TRIED = frozenset("allOf pattern patternProperties format multipleOf minItems maxItems maxProperties".split())


def refusal(problem: str) -> RequestError:
    """The error of a schema that is not taken."""
    return RequestError(f"json_schema: {problem}", param="json_schema")


def schema_text(schema: Any) -> str:
    """A schema as a request carries it; RequestError for what is no JSON."""
    try:
        return json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise refusal(f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise refusal("holds a number that JSON does not have") from None


@lru_cache(MAX_KNOWN)
def check_schema(text: str) -> bool:
    """Whether a schema has to be tried before it is compiled; RequestError for what no answer could be held to."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise refusal(f"has {len(text):,} bytes, and {MAX_SCHEMA_BYTES:,} are the most")
    try:
        schema = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        raise refusal(f"is no JSON, or nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(schema, dict):
        raise refusal("is no object")
    if not _is_within(schema, MAX_DEPTH):
        raise refusal(f"is nested deeper than {MAX_DEPTH} levels")
    return bool([part for part in _parts(schema, "") if not TRIED.isdisjoint(part)])


def _integer(digits: str) -> int:
    if abs(number := int(digits)) > MAX_INTEGER:
        raise refusal(f"holds {digits[:30]}, which is beyond what every reader of JSON holds exactly")
    return number


def _is_within(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return depth > 0 and all(_is_within(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))


def _parts(schema: Any, place: str) -> Iterator[Mapping[str, Any]]:
    """A schema and all within it; RequestError for keywords that would have no effect."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise refusal(f"{place or 'it'} is no schema: an object, true or false")
    yield schema
    for keyword, value in schema.items():
        at = f"{place}.{keyword}"[-200:].lstrip(".")
        within: list[tuple[str, Any]] = []
        if keyword in OF_SCHEMAS and isinstance(value, dict):
            within = [(f"{at}.{name}", part) for name, part in value.items()]
        elif keyword in LISTS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list) or len(value) > MAX_BRANCHES:
                raise refusal(f"{at} is no list of up to {MAX_BRANCHES} schemas")
            within = [(f"{at}.{number}", part) for number, part in enumerate(value)]
        elif keyword in NESTED:
            within = [(at, value)]
        elif keyword not in PLAIN | REMARKS:
            raise refusal(f"{at}: this keyword is not supported")
        for where, part in within:
            yield from _parts(part, where)


class Constraint:
    """Which tokens one answer may go on with. Not thread-safe."""

    def __init__(self, compiled: Compiled, matcher: LLMatcher, allowance: _Allowance) -> None:
        self._compiled, self._matcher, self._allowance = compiled, matcher, allowance

    def copy(self) -> Constraint:
        """For another choice of the same answer."""
        return Constraint(self._compiled, self._matcher.deep_copy(), self._allowance)

    def allowed(self) -> NDArray[np.bool_]:
        """Of every token, whether it may come next; RequestError where the schema cannot be followed any further."""
        with self._allowance.used():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._allowance.left_s < 0:
            raise refusal("takes too long to be followed further")
        if self._matcher.is_error():
            self._compiled.is_full = True
            problem = _line(self._matcher.get_error())
            if problem.startswith("NoExtension"):
                raise refusal("no text is as it asks for, or none that this vocabulary can spell")
            raise refusal(f"is too complex to be followed further: {problem}")
        return np.unpackbits(bits, count=self._compiled.vocab_size, bitorder="little").view(np.bool_)

    def append(self, token: int) -> None:
        """The answer has one more token."""
        with self._allowance.used():
            self._matcher.consume_token(token)
        self._allowance.left_s += TOKEN_S

    def masked(self, scores_V: Tensor) -> Tensor:
        """Scores on the CPU, -inf where a token may not come next; UlmError where no other has one."""
        masked_V = scores_V.masked_fill(torch.from_numpy(~self.allowed()), -torch.inf)
        if not masked_V.max() > -torch.inf:
            raise UlmError("the members' scores are no numbers: no token follows from them")
        return masked_V

    @property
    def is_broken(self) -> bool:
        """Whether a token came that was not allowed."""
        return bool(self._matcher.is_error())

    @property
    def may_end(self) -> bool:
        """Whether the answer so far is JSON of the schema."""
        return bool(self._matcher.is_accepting())

    @property
    def is_whole(self) -> bool:
        """Whether it is, and nothing can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class _Allowance:
    """Time of one core that all choices of an answer may still take of the others, who wait meanwhile."""

    def __init__(self) -> None:
        self.left_s = FREE_S

    @contextmanager
    def used(self) -> Iterator[None]:
        """Take what a block takes."""
        began_s = time.thread_time()
        yield
        self.left_s -= time.thread_time() - began_s


class Compiled:
    """A schema in a vocabulary. What answers find out about both they share, until it is full."""

    def __init__(self, vocabulary: LLTokenizer, schema: str) -> None:
        self.vocab_size, self.num_used, self.is_full = vocabulary.vocab_size, 0, False
        self._first = LLMatcher(vocabulary, grammar_of(schema), limits=LIMITS, log_level=0)
        if self._first.is_error():
            raise refusal(_line(self._first.get_error()))

    def begin(self) -> Constraint:
        """The constraint of an answer that has no token yet."""
        self.num_used += 1
        return Constraint(self, self._first.deep_copy(), _Allowance())


class Grammars:
    """Compiles schemas, in a thread of its own: one after the other, and while nobody else waits.

    What has to be tried before waits elsewhere, so that answers of schemas that are known are not kept by it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._trials, self._num_waiting = ThreadPoolExecutor(1, thread_name_prefix="trials"), 0
        self._vocabularies: dict[str, LLTokenizer] = {}  # by their tokenizer's digest
        self._kept: OrderedDict[tuple[str, str], Compiled] = OrderedDict()

    async def begin(self, tokenizer: Tokenizer, schema: str, generated: Sequence[int] = ()) -> Constraint:
        """The constraint of an answer that has `generated` already.

        RequestError for a schema that cannot be followed, and for what was generated against it; OverloadedError
        where too many new ones wait already.
        """
        try:
            if (tokenizer.digest, schema) not in self._kept and check_schema(schema):
                await self._try(schema)
            begun = self._thread.submit(self._begin, tokenizer, schema, generated)
        except RuntimeError:  # it has ended
            raise MemberDownError("the engine was closed") from None
        return await asyncio.wrap_future(begun)

    async def _try(self, schema: str) -> None:
        """Have `tried` know it."""
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} new schemas wait to be compiled", code="overloaded")
        self._num_waiting += 1
        try:
            await asyncio.wrap_future(self._trials.submit(tried, schema))
        finally:
            self._num_waiting -= 1

    def _begin(self, tokenizer: Tokenizer, schema: str, generated: Sequence[int]) -> Constraint:
        constraint = self._compiled(tokenizer, schema).begin()
        constraint.allowed()  # here, for the first one takes longest
        for token in generated:
            constraint.append(token)
        if generated and constraint.is_broken:
            raise RequestError("generated: this is no beginning of JSON of the schema", param="generated")
        return constraint

    def _compiled(self, tokenizer: Tokenizer, schema: str) -> Compiled:
        key = tokenizer.digest, schema
        compiled = self._kept.pop(key, None)
        if compiled is None or compiled.is_full or compiled.num_used == MAX_USES:
            if check_schema(schema) and (problem := tried(schema)):
                raise refusal(problem)
            if tokenizer.kind == "char":
                _check_alphabet(tokenizer, schema)
            compiled = Compiled(self._vocabulary(tokenizer), schema)
        self._kept[key] = compiled
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return compiled

    def _vocabulary(self, tokenizer: Tokenizer) -> LLTokenizer:
        if tokenizer.digest not in self._vocabularies:
            self._vocabularies[tokenizer.digest] = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        return self._vocabularies[tokenizer.digest]

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown(wait=False)
        self._trials.shutdown(wait=False, cancel_futures=True)


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.tokens = tokenizer.eot_id, tokenizer.token_bytes
        self.special_token_ids = sorted(tokenizer.special_ids.values())

    def __call__(self, text: str) -> list[int]:
        """The tokens of what a schema leaves no choice about: a model is to write it as it learned it."""
        return self._tokenizer.encode(text)


def _check_alphabet(tokenizer: Tokenizer, schema: str) -> None:
    """UnsupportedError for an alphabet that lacks characters of JSON, or of this schema."""
    try:
        tokenizer.encode(PRINTABLE + json.dumps(json.loads(schema), ensure_ascii=False))
    except UnknownCharacterError as error:
        raise UnsupportedError(
            f"json_schema: {error}; a member with a byte or bpe tokenizer can spell all JSON"
        ) from None


def grammar_of(schema: str) -> str:
    """A schema as llguidance's grammar."""
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=SPELLING))
    except ValueError as error:
        raise refusal(_line(str(error))) from None


@lru_cache(MAX_KNOWN)
def tried(schema: str) -> str:
    """What is wrong with a schema, if anything, found out in a process of its own, for it may take very much."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("trial.py"))]
    grammar = grammar_of(schema)
    try:
        done = subprocess.run(command, input=grammar, capture_output=True, text=True, timeout=TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        return TOO_LARGE
    return TOO_LARGE if done.returncode else _line(done.stdout)


def _line(error: str) -> str:
    """What llguidance says, on one line."""
    return " ".join(error.removesuffix("<non-verbose/>").split())[:200]
