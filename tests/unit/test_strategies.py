"""Strategies over members that are slow, fail and hang as told, on a virtual clock: budgets, ledgers, failover."""

import asyncio
import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies.broadcast import Broadcast
from serve.strategies.fallback import Fallback
from serve.strategies.mixture import Mixture
from serve.strategies.route import Route
from serve.strategies.single import Single
from tests.virtual_members import TOKENIZER, VirtualEngine, following, member, open_calls, router, run
from ulm import registry
from ulm.errors import RequestError, UnavailableError
from ulm.models.sampling import Sampling
from ulm.recipes.serve import Budget

KINDS = {"single": Single, "route": Route, "mixture": Mixture, "fallback": Fallback, "broadcast": Broadcast}
ROUNDING_S = 1e-6


def strategy(kind: str, **options: Any) -> Any:
    return KINDS[kind](registry.configure("strategy", {"kind": kind, **options}))


def request(text: str = "alpha bravo", max_tokens: int = 12, **fields: Any) -> GenerateRequest:
    return GenerateRequest(tuple(TOKENIZER.encode(text)), {}, max_tokens, **fields)


def members_of(*engines: VirtualEngine) -> dict[str, Member]:
    """One member an engine: e0, e1, …."""
    return {f"e{n}": member(f"e{n}", engine) for n, engine in enumerate(engines)}


def context_of(members: Mapping[str, Member], **fields: Any) -> SwarmContext:
    return SwarmContext(router=router(len([m for m in members if m[1:].isdigit()])), **fields)


async def answered(
    kind: str,
    asked: GenerateRequest,
    members: Mapping[str, Member],
    context: SwarmContext | None = None,
    budget: Budget = Budget(),  # noqa: B008  frozen
    **options: Any,
) -> tuple[list[TokenChunk], Ledger]:
    """The chunks of each choice as one, and the ledger."""
    context = context or context_of(members)
    chunks = [c async for c in strategy(kind, **options).answer(asked, members, context, budget)]
    assert isinstance(chunks[-1], Ledger) and not any(isinstance(c, Ledger) for c in chunks[:-1])
    return TokenChunk.by_choice(chunks[:-1]), chunks[-1]


def expected(asked: GenerateRequest) -> tuple[int, ...]:
    """What members that never fail would say."""
    tokens = list(asked.tokens)
    for _ in range(asked.max_tokens):
        tokens.append(following(tokens))
    return tuple(tokens[len(asked.tokens) :])


# ---- budgets, over everything that may happen

WAYS = st.sampled_from(["well", "well", "well", "dies", "hangs", "too much", "wrong shape", "no end"])
ENGINES = st.builds(
    VirtualEngine,
    delay_s=st.sampled_from([0.0, 0.01, 0.3, 45.0]),
    way=WAYS,
    fails_after=st.integers(0, 12),
    heeds_deadlines=st.booleans(),
)
BUDGETS = st.builds(
    Budget,
    max_calls=st.none() | st.integers(1, 6),
    max_tokens=st.none() | st.integers(1, 30),
    max_ms=st.none() | st.integers(1, 3_000),
)
OPTIONS = {
    "single": st.just({}),
    "route": st.fixed_dictionaries(
        {
            "every_tokens": st.integers(1, 8),
            "margin": st.sampled_from([0.0, 0.5, 1.0]),
            "top_k": st.integers(1, 3),
            "by": st.sampled_from(["clusterer", "likelihood", "product"]),
        }
    ),
    "mixture": st.fixed_dictionaries(
        {
            "every_tokens": st.integers(1, 8),
            "top_k": st.integers(1, 4),
            "by": st.sampled_from(["clusterer", "likelihood", "product"]),
        }
    ),
    "fallback": st.just({}),
    "broadcast": st.just({}),
}


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    """A strategy, members over some engines with their ways to fail, a request, a budget."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    engines = draw(st.lists(ENGINES, min_size=1, max_size=4))
    number = draw(st.integers(1, 4))
    place = draw(st.lists(st.integers(0, len(engines) - 1), min_size=number, max_size=number))
    names = draw(st.permutations([f"e{n}" for n in range(number)]))
    text = draw(st.sampled_from(["alpha", "bravo charlie", "delta alpha", "nothing known", "x"]))
    return {
        "kind": kind,
        "options": draw(OPTIONS[kind]),
        "members": {name: member(name, engines[place[int(name[1:])]]) for name in names},
        "fallback": draw(st.just(()) | st.just((names[0],))),
        "request": request(text, draw(st.integers(1, 14)), stream=draw(st.booleans())),
        "budget": draw(BUDGETS),
        "cancel_after": draw(st.none() | st.integers(0, 6)),
    }


@settings(max_examples=300, deadline=None)
@given(situations())
def test_no_budget_is_exceeded_whatever_members_do_and_no_call_outlives_its_answer(situation):
    members, budget, asked = situation["members"], situation["budget"], situation["request"]
    engines = {id(m.engine): m.engine for m in members.values()}.values()
    slowest_s = max(engine.delay_s for engine in engines)

    async def body() -> None:
        clock = asyncio.get_running_loop().time
        context = context_of(members, fallback=situation["fallback"])
        started_s, chunks, ledger = clock(), list[TokenChunk](), None
        answer = strategy(situation["kind"], **situation["options"]).answer(asked, members, context, budget)
        try:
            async with aclosing(answer):
                async for item in answer:
                    if isinstance(item, Ledger):
                        ledger = item
                    else:
                        chunks.append(item)
                    if situation["cancel_after"] == len(chunks):
                        break
        except UnavailableError:
            assert not any(chunk.tokens for chunk in chunks) or situation["kind"] == "broadcast"
        assert open_calls(members) == 0
        if budget.max_ms is not None:
            assert clock() - started_s <= budget.max_ms / 1e3 + slowest_s + ROUNDING_S
        if ledger is None:
            return
        spent = sum(call.tokens_out for call in ledger.calls)
        assert len(ledger.calls) <= (budget.max_calls or math.inf)
        assert spent <= (budget.max_tokens or math.inf)
        assert {m for engine in engines for m, _ in engine.asked} <= {call.member for call in ledger.calls}
        for choice in TokenChunk.by_choice(chunks):
            assert choice.finish_reason in ("stop", "length")
            assert choice.tokens == expected(asked)[: len(choice.tokens)]  # whoever said it, and whoever failed
            assert choice.text == TOKENIZER.decode(choice.tokens)
            if len(choice.tokens) < asked.max_tokens:
                assert ledger.degraded  # it is marked
        if situation["kind"] != "mixture" and situation["options"].get("margin", 0) == 0:
            assert spent == sum(len(c.tokens) for c in chunks)  # one member a token
        assert all(0 <= call.weight <= 1 + ROUNDING_S for call in ledger.calls)

    run(body)


def test_at_the_edge_of_each_budget_the_answer_so_far_is_returned_and_marked():
    async def body() -> None:
        for budget, tokens, mark in (
            (Budget(max_tokens=5), 5, "ended after 5 tokens by budget.max_tokens"),
            (Budget(max_ms=65), 6, "ended after 6 tokens by budget.max_ms"),
        ):
            members = members_of(VirtualEngine())
            (choice,), ledger = await answered("single", request(), members, budget=budget)
            assert (len(choice.tokens), choice.finish_reason) == (tokens, "length")
            assert mark in ledger.degraded and choice.degraded and mark in choice.degraded

    run(body)


def test_a_mixture_spends_a_token_for_each_of_its_members():
    async def body() -> None:
        shared = VirtualEngine()
        members = {f"e{n}": member(f"e{n}", shared) for n in range(2)}
        (choice,), ledger = await answered("mixture", request(), members, budget=Budget(max_tokens=9))
        assert len(choice.tokens) == 4
        assert [call.tokens_out for call in ledger.calls] == [4, 4]

    run(body)


def test_with_fewer_calls_than_members_the_heaviest_answer():
    async def body() -> None:
        members = members_of(VirtualEngine(), VirtualEngine(), VirtualEngine())
        asked = request("bravo bravo alpha")
        _, ledger = await answered("mixture", asked, members, budget=Budget(max_calls=1), top_k=3)
        assert [call.member for call in ledger.calls] == ["e1"]
        assert ledger.degraded == ["answered by 1 of 3 members by budget.max_calls"]

    run(body)


def test_a_silent_member_does_not_hold_an_answer_beyond_its_time():
    async def body() -> None:
        members = members_of(VirtualEngine(way="hangs", fails_after=3))
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        (choice,), ledger = await answered("single", request(), members, budget=Budget(max_ms=500))
        assert loop.time() - started_s == pytest.approx(0.5)
        assert len(choice.tokens) == 3 and ledger.degraded == ["ended after 3 tokens by budget.max_ms"]

    run(body)


# ---- who answers


def test_route_asks_the_expert_of_the_text_and_looks_again_after_every_window():
    async def body() -> None:
        members = members_of(VirtualEngine(), VirtualEngine(), VirtualEngine())
        _, ledger = await answered("route", request("charlie ", 12), members, every_tokens=4)
        assert [(call.member, call.why, call.tokens_out) for call in ledger.calls] == [("e2", "routed", 12)]
        assert len(members["e2"].engine.asked) == 3  # three windows, one call

    run(body)


def test_route_widens_where_the_lead_is_below_the_margin():
    async def body() -> None:
        for text, experts in (("alpha alpha bravo", ["e0"]), ("alpha bravo", ["e0", "e1"])):
            shared = VirtualEngine()
            members = {f"e{n}": member(f"e{n}", shared) for n in range(3)}
            _, ledger = await answered("route", request(text, 2), members, margin=0.3, top_k=2)
            assert sorted(call.member for call in ledger.calls) == experts

    run(body)


def test_likelihood_weighs_by_what_the_experts_made_of_the_text_and_each_is_a_call():
    async def body() -> None:
        # The virtual expert eN gives each token (N + 1) times the nats, so e0 is likeliest, whatever the text says.
        for by, first in (("likelihood", "e0"), ("clusterer", "e2")):
            members = members_of(*(VirtualEngine() for _ in range(3)))
            _, ledger = await answered("mixture", request("charlie " * 40, 3), members, by=by, top_k=1)
            answering = [call.member for call in ledger.calls if call.why == "routed"]
            assert answering == [first]
            weighed = [call.member for call in ledger.calls if call.why == "weighed"]
            assert sorted(weighed) == (["e0", "e1", "e2"] if by == "likelihood" else [])

    run(body)


def test_the_order_of_members_never_matters():
    async def body() -> None:
        found = []
        for order in (("e0", "e1", "e2"), ("e2", "e0", "e1")):
            members = {name: member(name, VirtualEngine()) for name in order}
            choice, ledger = await answered("mixture", request("alpha bravo charlie charlie"), members, top_k=2)
            found.append((choice[0].tokens, [(c.member, c.weight) for c in ledger.calls]))
        assert found[0] == found[1]

    run(body)


def test_broadcast_gives_one_choice_a_member_and_marks_those_that_are_down():
    async def body() -> None:
        members = members_of(VirtualEngine(), VirtualEngine(way="dies"), VirtualEngine())
        choices, ledger = await answered("broadcast", request(max_tokens=4), members)
        assert [len(c.tokens) for c in sorted(choices, key=lambda c: c.index)] == [4, 0, 4]
        assert [call.member for call in ledger.calls] == ["e0", "e1", "e2"]
        assert "e1 is not up" in ledger.degraded

    run(body)


def test_n_choices_share_the_budget_and_differ_by_their_draws_alone():
    async def body() -> None:
        members = members_of(VirtualEngine())
        asked = request(max_tokens=8, n=3, sampling=Sampling(temperature=1.0, seed=5))
        choices, ledger = await answered("single", asked, members, budget=Budget(max_tokens=10))
        assert sorted(len(c.tokens) for c in choices) == [3, 3, 4]
        assert sum(call.tokens_out for call in ledger.calls) == 10

    run(body)


# ---- failures


def test_another_member_goes_on_where_one_failed_before_or_within_its_answer():
    async def body() -> None:
        for fails_after in (0, 5):
            members = members_of(VirtualEngine(way="dies", fails_after=fails_after), VirtualEngine())
            (choice,), ledger = await answered("fallback", request(), members)
            assert choice.tokens == expected(request())
            assert [(c.member, c.tokens_out, c.why) for c in ledger.calls] == [
                ("e0", fails_after, "asked"),
                ("e1", 12 - fails_after, "fallback"),
            ]
            assert ledger.degraded == ["e0 failed: its process is gone"]

    run(body)


@pytest.mark.parametrize("way", ["dies", "hangs", "no end"])
@pytest.mark.parametrize("kind", ["route", "mixture"])
def test_the_experts_that_are_left_answer_where_one_fails(kind, way):
    async def body() -> None:
        members = members_of(*(VirtualEngine() for _ in range(3)))
        members["e1"].engine.way, members["e1"].engine.fails_after = way, 4
        (choice,), ledger = await answered(kind, request("bravo bravo alpha"), members, every_tokens=64)
        assert choice.tokens == expected(request("bravo bravo alpha"))
        if way != "no end" or kind == "route":  # a mixture of several engines has no calls that could end
            assert any(text.startswith("e1 failed") for text in ledger.degraded)
            assert {call.member for call in ledger.calls} > {"e1"}

    run(body)


def test_scores_of_the_wrong_shape_are_a_members_failure_not_the_mixtures():
    async def body() -> None:
        members = members_of(VirtualEngine(), VirtualEngine(way="wrong shape"))
        (choice,), ledger = await answered("mixture", request(), members)
        assert choice.tokens == expected(request())
        size = TOKENIZER.vocab_size
        assert ledger.degraded == [f"e1 failed: gave scores of shape ({size + 1},) for a vocabulary of {size}"]

    run(body)


def test_a_member_that_failed_is_left_alone_for_a_while_and_then_asked_again():
    async def body() -> None:
        members = members_of(VirtualEngine(way="dies"), VirtualEngine())
        context = context_of(members)
        await answered("fallback", request(), members, context)
        _, ledger = await answered("fallback", request(), members, context)
        assert [call.member for call in ledger.calls] == ["e1"]
        members["e0"].engine.way = "well"
        await asyncio.sleep(6)
        _, ledger = await answered("fallback", request(), members, context)
        assert [call.member for call in ledger.calls] == ["e0"] and not ledger.degraded

    run(body)


def test_the_operators_fallback_answers_where_all_experts_are_down():
    async def body() -> None:
        members = {**members_of(VirtualEngine(way="dies")), "seed": member("seed", VirtualEngine())}
        context = SwarmContext(router=router(1), fallback=("seed",))
        (choice,), ledger = await answered("route", request(), members, context)
        assert choice.tokens == expected(request()) and ledger.calls[-1].member == "seed"
        assert "answered by seed: nobody that should answer is up" in ledger.degraded

    run(body)


def test_with_nobody_up_the_refusal_says_when_to_come_again():
    async def body() -> None:
        members = members_of(VirtualEngine(way="dies"), VirtualEngine(way="dies"))
        context = context_of(members)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="No member that could answer is up") as error:
                await answered("mixture", request(), members, context)
            assert error.value.retry_after_s == pytest.approx(5, abs=0.1)

    run(body)


def test_a_requests_own_mistake_is_raised_and_blames_no_member():
    class Refusing(VirtualEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            raise RequestError("no such bias", param="logit_bias")
            yield

    async def body() -> None:
        members = {"e0": member("e0", Refusing())}
        context = context_of(members)
        with pytest.raises(RequestError, match="no such bias"):
            await answered("single", request(), members, context)
        assert context.health.is_up("e0")

    run(body)


def test_members_of_other_vocabularies_take_over_in_text():
    from ulm.tokenizers.char import char_tokenizer

    async def body() -> None:
        class Saying(VirtualEngine):
            async def generate(self, request: GenerateRequest) -> Any:
                assert letters.decode(request.tokens).startswith("alpha bravo")
                for token in letters.encode("xyz"):
                    yield TokenChunk("", (token,))
                yield TokenChunk("", (), finish_reason="stop")

        letters = char_tokenizer("abcdefghijklmnopqrstuvwxyz ")
        members = {
            "e0": member("e0", VirtualEngine(way="dies", fails_after=4)),
            "e1": member("e1", Saying(), letters),
        }
        (choice,), ledger = await answered("fallback", request(), members)
        assert choice.text == TOKENIZER.decode(expected(request())[:4]) + "xyz"
        assert [call.tokens_out for call in ledger.calls] == [4, 3]
        with pytest.raises(RequestError, match="different vocabularies"):
            await answered("fallback", request(num_top_logprobs=0), members)

    run(body)


def test_a_stop_string_may_lie_across_windows():
    async def body() -> None:
        asked = request("alpha", 40)
        whole = TOKENIZER.decode(expected(asked))
        stop = whole[6:10]  # windows end after 4 and 8 tokens
        members = members_of(VirtualEngine())
        asked = request("alpha", 40, stop=(stop,))
        (choice,), _ = await answered("route", asked, members, every_tokens=4)
        assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"

    run(body)
