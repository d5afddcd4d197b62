"""What `ulm swarm` shows people: nothing wraps at 80 columns, and each ending says what comes next."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from ulm.cli import swarm_tables

WORDS = ["characters", "conditions", "definitions", "statement", "assignment", "license"]
DIGEST = "32a7a444b07b" + 52 * "0"


def shown(what: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def planned(experts: int) -> dict[str, Any]:
    cluster = {"domain": "reference", "words": WORDS, "train_tokens": 1_157_610, "epochs": 0.083}
    return {
        "experts": experts,
        "clusters_found_before": False,
        "information": 0.2,
        "clusters": [{"member": f"e{number:02d}", **cluster} for number in range(experts)],
        "parameters": 393_888,
        "tokens": 61_440,
        "tokens_per_parameter": 0.156,
        "pays_from_tokens_per_parameter": 4.2,
        "forecast": {"ratio": 1.12, "low": 1.0, "high": 1.26},
        "device": "cpu with 2 cores",
        "runs": 5,
        "side_by_side": 2,
        "seconds": 12.0,
        "seconds_per_step": 0.06,
        "memory": {"total": 10**9, "free": 10**10},
        "disk": {"total": 10**8, "free": 10**10},
        "verdict": "too close to call",
        "advice": [],
        "remarks": [],
    }


@pytest.mark.parametrize("width", [80, 140])
def test_a_plan_has_one_line_for_each_cluster_and_loses_no_number(width):
    lines = shown(swarm_tables.plan(planned(3)), width)
    rows = [line for line in lines if line.startswith("e0")]
    assert [row.split()[:5] for row in rows] == [
        [f"e{number:02d}", "reference", "1,157,610", "0.083", "times"] for number in range(3)
    ]
    assert lines.index(rows[-1]) == lines.index(rows[0]) + 2
    assert max(map(len, lines)) <= width


def test_a_swarm_is_shown_with_its_members_strategy_and_the_digest_that_add_needs():
    found = {
        "digest": DIGEST,
        "members": {
            "e00": {"checkpoint": "../../runs/kinds-e00/step-00000010", "domain": "code"},
            "seed": {"checkpoint": "../../runs/kinds-seed/step-00000030", "domain": None},
        },
        "strategy": {"kind": "mixture", "top_k": 2},
        "budget": {"max_calls": 4, "max_tokens": None},
        "controls": {"dense": {"checkpoint": "x"}, "random": None},
        "corpus_digest": DIGEST,
        "tokenizer_digest": DIGEST,
    }
    lines = [line.split() for line in shown(swarm_tables.manifest(found))]
    assert ["e00", "code", "kinds-e00/step-00000010"] in lines
    assert ["seed", "-", "kinds-seed/step-00000030"] in lines
    assert ["strategy", "mixture:", "top_k", "2"] in lines
    assert ["budget", "max_calls", "4"] in lines
    assert ["controls", "dense"] in lines
    assert ["tokenizer", "32a7a444b07b"] in lines


def test_training_ends_with_the_ratios_and_the_way_to_serve():
    told = shown(swarm_tables.ending("kinds", {"route": 0.9114, "mixture": 0.9, "seed": 1.2, "oracle": 0.8}))
    assert told[0] == "perplexity as a share of dense's: route 0.911, mixture 0.900, seed 1.200"
    assert "`ulm swarm show kinds`" in told[1] and "`swarm: kinds`" in told[1]
    assert len(shown(swarm_tables.ending("kinds", {}))) == 1  # without a dense control


def test_a_change_says_the_new_digest_and_the_shares():
    told = " ".join(
        shown(swarm_tables.changed("e03 is an expert of kinds", {"digest": DIGEST, "shares": {"e00": 0.6}}))
    )
    assert told == "e03 is an expert of kinds, which is now 32a7a444b07b; shares of the training text: e00 60%"
