"""Strategies over members that are slow, fail and hang as told, on a virtual clock: budgets, ledgers, failover."""

import asyncio
import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk, TokenLogprob
from serve.strategies.broadcast import Broadcast
from serve.strategies.fallback import Fallback
from serve.strategies.mixture import Mixture
from serve.strategies.route import Route
from serve.strategies.single import Single
from tests.virtual_members import TOKENIZER, VirtualEngine, following, member, open_calls, router, run
from ulm import registry
from ulm.errors import ModelNotFoundError, RequestError, UnavailableError
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

WRONG = ["too much", "wrong shape", "no number", "no token"]
WAYS = st.sampled_from(["well", "well", "well", "well", "dies", "hangs", "no end", "overloaded", *WRONG])
COLD = Sampling(temperature=1e-3)  # draws, so that several choices are allowed, and draws the likeliest
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
    n = 1 if kind == "broadcast" else draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "kind": kind,
        "options": draw(OPTIONS[kind]),
        "members": {name: member(name, engines[place[int(name[1:])]]) for name in names},
        "fallback": draw(st.just(()) | st.just((names[0],))),
        "request": request(text, draw(st.integers(1, 14)), stream=draw(st.booleans()), n=n, sampling=COLD),
        "budget": draw(BUDGETS),
        "cancel_after": draw(st.none() | st.integers(0, 6)),
        "cancel_at_s": draw(st.none() | st.sampled_from([0.0, 0.005, 0.02, 0.31, 1.0, 31.0])),
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
            async with asyncio.timeout(situation["cancel_at_s"]), aclosing(answer):
                async for item in answer:
                    if isinstance(item, Ledger):
                        ledger = item
                    else:
                        chunks.append(item)
                    if situation["cancel_after"] == len(chunks):
                        break
        except UnavailableError:
            assert not any(chunk.tokens for chunk in chunks) or asked.n > 1 or situation["kind"] == "broadcast"
        except TimeoutError:
            pass
        assert open_calls(members) == 0
        if not any(engine.way in WRONG for engine in engines):  # what a member gives beyond what it was asked for
            assert sum(engine.generated for engine in engines) <= (budget.max_tokens or math.inf)
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
            with pytest.raises(UnavailableError, match="No member can answer now") as error:
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


# ---- whose fault it was


def test_who_is_overloaded_is_passed_over_and_stays_up_for_others():
    async def body() -> None:
        for kind in ("fallback", "mixture", "route"):
            members = members_of(VirtualEngine(way="overloaded"), VirtualEngine())
            context = context_of(members)
            (choice,), ledger = await answered(kind, request("alpha alpha"), members, context)
            assert choice.tokens == expected(request("alpha alpha"))
            assert ledger.degraded == ["e0 is overloaded: too many are waiting"] and context.health.is_up("e0")

    run(body)


def test_where_all_are_overloaded_the_refusal_asks_to_come_again_at_once():
    async def body() -> None:
        members = members_of(VirtualEngine(way="overloaded"), VirtualEngine(way="overloaded"))
        for kind in sorted(KINDS):
            with pytest.raises(UnavailableError, match="too many are waiting|is not up") as error:
                await answered(kind, request(), members)
            assert error.value.retry_after_s == 1

    run(body)


def test_how_long_to_wait_is_that_of_the_members_that_would_have_answered():
    async def body() -> None:
        members = members_of(VirtualEngine(way="dies"), VirtualEngine())
        with pytest.raises(UnavailableError) as error:
            await answered("single", request(), members)  # e0; that e1 is up does not help
        assert error.value.retry_after_s == pytest.approx(5, abs=0.1)

    run(body)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_member_that_is_silent_is_down_unless_it_answers_others_meanwhile(is_busy):
    async def body() -> None:
        members = members_of(VirtualEngine(way="hangs"), VirtualEngine())
        context = context_of(members, patience_s=2.0)
        waiting = asyncio.create_task(answered("fallback", request(), members, context))
        await asyncio.sleep(1)
        if is_busy:
            others = {"e0": member("e0", VirtualEngine())}
            await answered("single", request(), others, context)
        (choice,), ledger = await waiting
        assert choice.tokens == expected(request())
        assert ledger.degraded == ["e0 failed: said nothing for 2 s"]
        assert context.health.is_up("e0") == is_busy

    run(body)


def test_an_engines_own_timeout_is_told_as_such():
    class Late(VirtualEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            raise TimeoutError("no lock")
            yield

    async def body() -> None:
        members = members_of(Late(), VirtualEngine())
        _, ledger = await answered("fallback", request(), members, budget=Budget(max_ms=10_000))
        assert ledger.degraded == ["e0 failed: TimeoutError: no lock"]

    run(body)


def test_a_member_that_its_engine_has_not_is_down_and_no_mistake_of_the_client():
    class Empty(VirtualEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            raise ModelNotFoundError("The engine has no member 'e0'", code="model_not_found")
            yield

    async def body() -> None:
        members = members_of(Empty(), VirtualEngine())
        (choice,), ledger = await answered("fallback", request(), members)
        assert choice.tokens == expected(request())
        assert ledger.degraded == ["e0 failed: The engine has no member 'e0'"]

    run(body)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("no token", f"gave a token that is not in its vocabulary of {TOKENIZER.vocab_size}"),
        ("no number", "gave log-probabilities that are no numbers"),
        ("too much", "gave more than was asked for"),
    ],
)
def test_what_no_engine_may_give_ends_its_part_and_nothing_of_it_is_used(way, why):
    async def body() -> None:
        members = members_of(VirtualEngine(way=way, fails_after=3), VirtualEngine())
        (choice,), ledger = await answered("fallback", request(max_tokens=6, num_top_logprobs=0), members)
        assert choice.tokens == expected(request(max_tokens=6))
        assert all(math.isfinite(entry.logprob) for entry in choice.logprobs) and len(choice.logprobs) == 6
        assert ledger.degraded == [f"e0 failed: {why}"]

    run(body)


@pytest.mark.parametrize("by", ["likelihood", "clusterer"])
def test_an_expert_whose_scores_are_no_numbers_has_no_weight(by):
    async def body() -> None:
        members = members_of(VirtualEngine(way="no number"), VirtualEngine(), VirtualEngine())
        (choice,), ledger = await answered("mixture", request("alpha alpha bravo"), members, by=by)
        assert choice.tokens == expected(request("alpha alpha bravo"))
        assert not any(call.tokens_out for call in ledger.calls if call.member == "e0")
        assert [text[:9] for text in ledger.degraded] == ["e0 failed"]

    run(body)


def test_scores_that_are_too_many_are_their_experts_failure():
    async def body() -> None:
        members = members_of(VirtualEngine(), VirtualEngine(way="wrong shape"))
        _, ledger = await answered("mixture", request("bravo", 3), members, by="product", top_k=1)
        assert ledger.degraded == ["e1 failed: gave 5 scores for 5 tokens"]
        assert [call.member for call in ledger.calls if call.tokens_out] == ["e0"]

    run(body)


def test_experts_score_the_text_in_their_own_vocabulary():
    from ulm.tokenizers.char import char_tokenizer

    async def body() -> None:
        letters, seen = char_tokenizer("abcdefghijklmnopqrstuvwxyz "), []

        class Reading(VirtualEngine):
            async def score(self, member: str, tokens: Any) -> list[float]:
                seen.append(letters.decode(tokens))
                return await super().score(member, tokens)

            async def generate(self, request: GenerateRequest) -> Any:
                yield TokenChunk("", (), finish_reason="stop")

        # the first member, in whose vocabulary the prompt is, is none of the experts
        members = {"seed": member("seed", VirtualEngine()), "e0": member("e0", Reading(), letters)}
        await answered("mixture", request("alpha bravo"), members, SwarmContext(router=router(1)), by="likelihood")
        assert seen == ["alpha bravo"]

    run(body)


# ---- what is spent


def test_tokens_that_a_failed_member_generated_are_spent():
    async def body() -> None:
        engines = VirtualEngine(way="dies", fails_after=4), VirtualEngine()
        asked = request(max_tokens=10, stream=False)
        (choice,), ledger = await answered("fallback", asked, members_of(*engines), budget=Budget(max_tokens=6))
        assert [engine.generated for engine in engines] == [4, 2] and len(choice.tokens) == 6
        assert [call.tokens_out for call in ledger.calls] == [4, 2]
        assert ledger.calls[0].ms > 0, "its time, too"

    run(body)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("stream", [False, True])
def test_with_one_call_every_strategy_gives_one_members_answer(kind, stream):
    async def body() -> None:
        for options in [{"by": by} for by in ("likelihood", "product")] if kind in ("mixture", "route") else [{}]:
            members = members_of(VirtualEngine(), VirtualEngine(), VirtualEngine())
            asked = request("bravo bravo", stream=stream)
            (choice,), ledger = await answered(kind, asked, members, budget=Budget(max_calls=1), **options)
            assert choice.tokens == expected(asked)
            assert [(call.tokens_out, call.weight) for call in ledger.calls] == [(12, 1.0)]

    run(body)


def test_choices_without_a_part_of_the_budget_are_empty_and_marked():
    async def body() -> None:
        for budget in (Budget(max_calls=2), Budget(max_tokens=2), Budget(max_tokens=2, max_calls=10**400)):
            asked = request(max_tokens=4, n=3, sampling=COLD)
            choices, ledger = await answered("single", asked, members_of(VirtualEngine()), budget=budget)
            ends = sorted((len(c.tokens), c.finish_reason) for c in choices)
            assert len(ends) == 3 and ends[0] == (0, "length") and ledger.degraded
            assert sum(call.tokens_out for call in ledger.calls) == sum(number for number, _ in ends)

    run(body)


def test_the_prompts_logprobs_come_with_the_best_answer_whichever_draw_that_is():
    class Drawing(VirtualEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            entry = TokenLogprob(97, -1.0 / (1 + request.sampling.seed))  # later draws are likelier
            told = () if request.prompt_logprobs is None else (TokenLogprob(98, -2.0),)
            yield TokenChunk("", (97,), (entry,), "stop", prompt_logprobs=told)

    async def body() -> None:
        asked = request("ab", 4, best_of=3, stream=False, prompt_logprobs=0, sampling=COLD)
        (choice,), _ = await answered("single", asked, members_of(Drawing()))
        assert [entry.token for entry in choice.prompt_logprobs] == [98]

    run(body)
