"""Group `swarm`: experts found in the data against one dense model of the same tokens, and what stands beside them.

Run by `ulm bench swarm` in a checkout, with ULM_CORPORA set. The protocol is that of pipelines/swarm/plan.py, on eight
domains: `dense` goes on from the same seed with all the experts' tokens. Every configuration is one `ulm swarm train`,
a process of its own in a home that stays, so that what was interrupted goes on and what is finished is not trained
again; `results/` there, or the folder of --results, holds what came of each (remove one to have it evaluated anew). The
first configuration, the centre, and the figures of `serving` take 20 minutes on two cores; --full varies one setting
after another from the centre, in an order in which an interruption costs least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from pipelines.swarm.forecast import counts, information
from pipelines.swarm.plan import plan_swarm
from pipelines.swarm.rule import Measured, Rule, Setting
from tests.benchmarks import _swarm_plots as plots
from tests.benchmarks._figures import Failed, report
from ulm import artefacts, runtime
from ulm.recipes import load_recipe

ULM = [sys.executable, "-m", "ulm.cli.main"]
HOME = Path(".bench/swarm")  # of a checkout; git ignores it
FIGURES = Path("docs/figures/swarm")
DOMAINS = (
    "fiction_standardebooks", "code_pystdlib", "dialogue_sgd", "medical_medquad",
    "law_dccode", "science_acl", "techdocs_peps", "news_wikinews",
)  # fmt: skip
CORPUS: dict[str, Any] = {"name": "eight", "tokenizer": {"kind": "bpe", "vocab_size": 4_096}}
MODEL = {  # of the first trial: 0.36M parameters
    "preset": "llama-like", "size": "nano", "d_model": 64, "num_layers": 2, "context_tokens": 256,
    "attention": {"num_heads": 2, "num_kv_heads": 2}, "feedforward": {"kind": "relu2", "d_hidden": 256},
}  # fmt: skip
# With 8,192 tokens a step an expert would make 2 steps at 1 token per parameter, and 14 at 5.
BATCH_TOKENS = {1: 1_024, 5: 2_048}
LR, LR_OF_SMALL_BATCHES = 1.2e-2, 6e-3  # tuned on dense alone: docs/experiments.md
MICRO_TOKENS = 5_000_000  # seed and experts; dense takes half as many: half an hour on two cores
END_GRACE_S = 120.0  # for a training that is asked to stop to save all its runs

KEPT = ("macro", "bits_per_byte", "tokens_per_parameter", "parameters", "dense_flops")  # of a last line, in results

Values = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """One swarm to train; the defaults are the centre."""

    tokens_per_parameter: int = 50
    experts: int = 8
    seed_share: float = 0.5
    seed: int = 0
    size: str = "trial"
    controls: tuple[str, ...] = ("dense", "random")

    @property
    def name(self) -> str:
        """Of its runs; controls are not part of it, so that another control is added to what is trained."""
        length = "" if self.size == "micro" else f"-t{self.tokens_per_parameter}"
        return f"{self.size}{length}-k{self.experts}-s{round(100 * self.seed_share)}-r{self.seed}"

    def recipe(self) -> Values:
        """What `ulm swarm train` is given."""
        batch_tokens = BATCH_TOKENS.get(self.tokens_per_parameter, 8_192)
        lr = LR_OF_SMALL_BATCHES if self.tokens_per_parameter in BATCH_TOKENS else LR
        length = {"tokens_per_parameter": self.tokens_per_parameter}
        if self.size == "micro":
            length = {"tokens": MICRO_TOKENS}
        return {
            "name": self.name,
            "corpus": CORPUS["name"],
            "model": MODEL if self.size == "trial" else {"size": self.size, "context_tokens": 256},
            "train": {**length, "batch_tokens": batch_tokens, "context_tokens": 256, "seed": self.seed},
            "optimizer": {"kind": "adamw", "lr": lr} if self.size == "trial" else {},
            "experts": self.experts,
            "seed_share": self.seed_share,
            "clustering": {"seed": self.seed},
            # a fifth of an expert's steps at most
            "warmup_steps": 5 if self.tokens_per_parameter < 20 or self.size == "micro" else 20,
            "controls": list(self.controls),
            "samples": {"prompts": []},
        }


CENTRE = Configuration()
DENSE_ALONE = ("dense",)


def configurations(full: bool) -> list[Configuration]:
    """All to be trained, in the order of what they tell for their time."""
    if not full:
        return [CENTRE]
    tokens = [replace(CENTRE, tokens_per_parameter=t) for t in (20, 5, 1)]
    longest = replace(CENTRE, tokens_per_parameter=100, controls=DENSE_ALONE)
    experts = [replace(CENTRE, experts=k, controls=DENSE_ALONE) for k in (4, 16, 2)]
    shares = [replace(CENTRE, seed_share=s, controls=DENSE_ALONE) for s in (0.25, 0.75)]
    larger = [replace(CENTRE, controls=(*CENTRE.controls, "dense_flops"))]
    seeds = [replace(CENTRE, seed=seed) for seed in (1, 2)]
    micro = replace(CENTRE, size="micro", controls=DENSE_ALONE)
    return [CENTRE, *tokens, *experts, *shares, seeds[0], *larger, longest, seeds[1], micro]


# ---- running


def main() -> None:
    """All figures of the group."""
    measures: dict[str, Callable[[Bench], None]] = {
        "comparison": comparison, "serving": serving, "routing": routing, "queue": queue,
    }  # fmt: skip
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="this group has no figures of a GPU")
    options.add_argument("--full", action="store_true", help="all configurations: some hours")
    options.add_argument("--only", default=None, choices=measures)
    options.add_argument("--home", type=Path, default=HOME, help="kept: what is finished is not trained again")
    options.add_argument("--results", type=Path, default=None, help="where results are kept, if not in the home")
    options.add_argument("--minutes", type=float, default=math.inf, help="end after so many; the same command goes on")
    chosen = options.parse_args()
    corpora = runtime.variable("ULM_CORPORA")
    bench = Bench(
        home=chosen.home.absolute(),
        results=(chosen.results or chosen.home / "results").absolute(),
        corpora=Path(corpora).absolute() / "train" if corpora else None,
        full=chosen.full,
        ends_s=time.monotonic() + 60 * chosen.minutes,
    )
    due = [chosen.only] if chosen.only else ["comparison", "serving", *(["routing", "queue"] if chosen.full else [])]
    for name in due:
        measures[name](bench)


@dataclass(frozen=True)
class Bench:
    """Where everything is, and until when."""

    home: Path
    results: Path
    corpora: Path | None
    full: bool
    ends_s: float

    def environment(self) -> dict[str, str]:
        """Of a process of ours."""
        return {**runtime.environment(), "ULM_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}

    def write_recipe(self, name: str, fields: Values) -> Path:
        """A file of JSON, which is YAML; never half of one."""
        return _write(self.home / "recipes" / f"{name}.yaml", fields)

    def result(self, of: Configuration) -> Values | None:
        """What came of a finished training, where it was by this very recipe: its last line, and "measured"."""
        path = self.results / f"{of.name}.json"
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = {**kept["recipe"], "controls": None} == {**of.recipe(), "controls": None}
        has_all = set(of.controls) <= set(kept["recipe"]["controls"])  # more controls than asked for do no harm
        return dict(kept["result"]) if same and has_all else None

    def keep(self, name: str, recipe: Values, result: Values) -> None:
        """What came of a recipe."""
        _write(self.results / f"{name}.json", {"recipe": recipe, "result": result})

    def train(self, of: Configuration) -> Values | None:
        """What came of `ulm swarm train`; None when the time was up, and it saved. Raises Failed."""
        if (known := self.result(of)) is not None:
            return known
        recipe = self.write_recipe(of.name, of.recipe())
        line = self.ulm("swarm", "train", recipe)
        if line is None or line.get("status") == "interrupted":
            return None
        measured = [asdict(one) for one in _measured(self.home, recipe, Trained(of, line))]
        result = {**{name: line[name] for name in KEPT}, "measured": measured}
        self.keep(of.name, of.recipe(), result)
        return result

    def ulm(self, *words: object) -> Values | None:
        """The last line of an `ulm` command, as it ended or was ended at the bench's own end. Raises Failed."""
        if (left_s := self.ends_s - time.monotonic()) <= 0:
            return None
        command = [*ULM, *(str(word) for word in words)]
        log = self.home / "bench.log"
        with log.open("ab") as said:
            child = subprocess.Popen(command, env=self.environment(), stdout=subprocess.PIPE, stderr=said, text=True)
            try:
                out, _ = child.communicate(timeout=None if math.isinf(left_s) else left_s)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
                child.terminate()
                child.communicate(timeout=END_GRACE_S)
                if isinstance(ended, KeyboardInterrupt):
                    raise
                return None
            finally:
                child.kill()  # what did not heed the request within its grace
        if child.returncode != 0:
            last = log.read_text(encoding="utf-8", errors="replace").strip()[-300:]
            raise Failed(f"`ulm {words[0]} {words[1]}` ended with {child.returncode}: {last}")
        line: Values = json.loads(out.splitlines()[-1])
        return line

    def corpus(self) -> None:
        """Build the corpus, unless it is there. Raises Failed."""
        if (self.home / "corpora" / "names" / CORPUS["name"]).is_file():
            return
        if self.corpora is None:
            raise Failed("ULM_CORPORA is not set: no folder with train/ to measure on")
        sources = [{"path": str(self.corpora / name), "domain": name.partition("_")[0]} for name in DOMAINS]
        self.home.mkdir(parents=True, exist_ok=True)
        if self.ulm("corpus", "build", self.write_recipe("eight", {**CORPUS, "sources": sources})) is None:
            raise Failed("the time was up before the corpus was built")


def _write(path: Path, fields: Values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    artefacts.write_json(path, fields)
    return path


# ---- the comparison


@dataclass(frozen=True)
class Trained:
    """A configuration with what came of it."""

    of: Configuration
    line: Values

    def ratio(self, column: str, to: str = "dense") -> float:
        """Perplexity of a column by that of another: exp of the difference of macro-mean nats per token."""
        macro = self.line["macro"]
        return math.exp(macro[column]["nats_per_token"] - macro[to]["nats_per_token"])

    def perplexity(self, column: str) -> float | None:
        """Of a column, None where it was not asked for."""
        found = self.line["macro"].get(column)
        return None if found is None else math.exp(found["nats_per_token"])


def comparison(bench: Bench) -> None:
    """Train what is due, report each, and draw what there is."""
    trained: list[Trained] = []
    try:
        bench.corpus()
        for of in configurations(bench.full):
            began_s = time.monotonic()
            is_new = bench.result(of) is None
            line = bench.train(of)
            if line is None:
                sys.stderr.write(f"{of.name}: the time is up; the same command goes on from there\n")
                continue  # what others came to is known
            took = f", {(time.monotonic() - began_s) / 60:.1f} minutes" if is_new else ", trained before"
            sys.stderr.write(f"{of.name}: route {Trained(of, line).ratio('route'):.3f} of dense{took}\n")
            trained = [it for it in trained if it.of.name != of.name] + [Trained(of, line)]
    except Failed as error:
        report("swarm_route", [], "perplexity", goal="<= 0.80", peer="dense", note=str(error))
    if trained:
        _of_centre([it for it in trained if replace(it.of, seed=0, controls=CENTRE.controls) == CENTRE])
        _of_axes(trained)
        measured = [Measured(Setting(**one["setting"]), one["ratio"]) for it in trained for one in it.line["measured"]]
        _of_rule(measured)
        plots.draw(FIGURES, [_point(it) for it in trained], measured, list(table(trained)))
        sys.stderr.write("\n".join(table(trained)) + "\n")


def _of_centre(runs: Sequence[Trained]) -> None:
    """The figures of the centre, over its seeds."""
    claims = (
        ("swarm_route", "route", "dense", "<= 0.80"),
        ("swarm_mixture", "mixture", "dense", "<= 0.80"),
        ("swarm_mixture_vs_route", "mixture", "route", "<= 1"),
        ("swarm_route_vs_oracle", "route", "oracle", "<= 1.03"),
        ("swarm_random", "random", "dense", ">= 1.0"),
        ("swarm_mixture_likelihood", "mixture_likelihood", "dense", None),
        ("swarm_mixture_product", "mixture_product", "dense", None),
        ("swarm_dense_flops", "route", "dense_flops", None),
        ("swarm_soup_uniform", "soup_uniform", "dense", None),
        ("swarm_soup_router", "soup_router", "dense", None),
    )
    for figure, column, peer, goal in claims:
        _report(figure, runs, column, peer, goal)


def _of_axes(trained: Sequence[Trained]) -> None:
    """Route against dense, of each configuration that differs from the centre in one setting."""
    for it in trained:
        if (of := it.of).seed == 0 and replace(of, controls=CENTRE.controls) != CENTRE:
            goal = "<= 0.88" if of == replace(CENTRE, tokens_per_parameter=20) else None
            _report(f"swarm_route_{of.name}", [it], "route", "dense", goal)


def _report(figure: str, runs: Sequence[Trained], column: str, peer: str, goal: str | None) -> None:
    found = [(it.perplexity(column), it.perplexity(peer)) for it in runs]
    pairs = [(ours, theirs) for ours, theirs in found if ours is not None and theirs is not None]
    if not pairs and goal is None:
        return  # a column that nobody asked for
    report(
        figure,
        [ours for ours, _ in pairs],
        "perplexity",
        goal=goal,
        peer=peer,
        peer_values=[theirs for _, theirs in pairs],
        note=None if pairs else f"no run has the columns {column} and {peer}",
    )


def _point(it: Trained) -> plots.Point:
    of, line = it.of, it.line
    ratios = {name: it.ratio(name) for name in line["macro"] if name != "dense"}
    length = line["tokens_per_parameter"]
    return plots.Point(
        of.size, length, of.experts, of.seed_share, of.seed, line["parameters"], ratios, line["bits_per_byte"]
    )


def _measured(home: Path, recipe: Path, it: Trained) -> Iterator[Measured]:
    """What pipelines/swarm/rule.py is to be given of a result: its route, and the route of its random clusters."""
    plan = plan_swarm(load_recipe("swarm train", recipe, []), root=home)  # type: ignore[arg-type]
    columns = {"route": plan.clusters, "random_route": plan.random_clusters}
    for column, clusters in columns.items():
        if clusters is not None and column in it.line["macro"]:
            says = information(counts(replace(plan, clusters=clusters)))
            length = it.line["tokens_per_parameter"]
            setting = Setting(length, it.of.experts, says, it.of.seed_share, float(it.line["parameters"]))
            yield Measured(setting, it.ratio(column))


def _of_rule(measured: Sequence[Measured]) -> None:
    """What the rule says of each result when it was fitted to all the others, and the lines that belong into it."""
    misses = []
    for number, one in enumerate(measured):
        rule = Rule.fit([*measured[:number], *measured[number + 1 :]])
        misses.append(abs(math.log(rule.forecast(one.setting).ratio / one.ratio)))
    if len(measured) > 2:
        note = f"median over {len(measured)} results, each forecast from the others; at most {max(misses):.3f}"
        report("swarm_rule_error", [statistics.median(misses)], "nats", note=note)
    for one in measured:
        numbers = ", ".join(f"{value:.4g}" for value in asdict(one.setting).values())
        sys.stderr.write(f"    Measured(Setting({numbers}), {one.ratio:.4f}),\n")


def table(trained: Sequence[Trained]) -> Iterator[str]:
    """The results as Markdown, for docs/experiments.md."""
    columns = ("route", "mixture", "oracle", "random", "dense_flops", "soup_uniform", "soup_router")
    shown = [name for name in columns if any(name in it.line["macro"] for it in trained)]
    yield f"| size | tokens per parameter | experts | seed share | seed | dense, bits per byte | {' | '.join(shown)} |"
    yield "|" + " --- |" * (6 + len(shown))
    for it in trained:
        macro = it.line["macro"]
        cells = [f"{it.ratio(name):.3f}" if name in macro else "" for name in shown]
        of, length = it.of, f"{it.line['tokens_per_parameter']:.3g}"
        begins = [
            of.size,
            length,
            of.experts,
            f"{of.seed_share:.0%}",
            of.seed,
            f"{macro['dense']['bits_per_byte']:.3f}",
        ]
        yield f"| {' | '.join(map(str, [*begins, *cells]))} |"


# ---- what stands in files of its own


def serving(bench: Bench) -> None:
    """A strategy's time over its calls, and requests per second through the gateway by members."""
    from tests.benchmarks import _swarm_serving as own

    router = next(iter(sorted(bench.home.glob("corpora/*/domains/*"))), None)
    of_router = "a router of the corpus" if router else "a router of eight words: nothing is clustered yet"
    for kind, times_ms in own.overheads(router).items():
        note = f"64 tokens, members that answer at once, {of_router}"
        report(f"strategy_overhead_{kind}", times_ms, "ms", goal="<= 2", note=note)
    rates = own.gateway_rates(bench.home / "echo")
    least = min(rates)
    for members, values in rates.items():
        report(f"gateway_requests_{members}", values, "requests/s", peer=f"{least} members", peer_values=rates[least])


def routing(bench: Bench) -> None:
    """Accuracy of the router on short passages, beside a classifier that has labels."""
    module = _other("_swarm_routing", "swarm_routing_accuracy")
    if module is None or bench.corpora is None:
        return
    found = module.routing_accuracy(bench.home / "routing", bench.corpora)
    peer = [found["naive_bayes"]]
    note = f"{found['clusters']} clusters without labels, {found['ms_per_text']:.2f} ms a text; the peer has labels"
    report("swarm_routing_accuracy", [found["accuracy"]], "share", peer="naive Bayes", peer_values=peer, note=note)


def queue(bench: Bench) -> None:
    """Eight experts over one, two and four slots, and with a worker killed every minute."""
    module = _other("_swarm_queue", "swarm_queue")
    if module is None:
        return
    for slots, kill_every_s in ((1, None), (2, None), (4, None), (2, 60.0)):
        found = module.run(bench.home / "queue", slots, kill_every_s)
        name = f"swarm_queue_{slots}" + ("_killed" if kill_every_s else "")
        report(name, [found["seconds"]], "s", note=json.dumps(found))


def _other(name: str, figure: str) -> Any:
    """A module beside this one, where it is there."""
    if find_spec(f"tests.benchmarks.{name}") is None:
        report(figure, [], "", note=f"no tests/benchmarks/{name}.py in this checkout")
        return None
    return import_module(f"tests.benchmarks.{name}")


if __name__ == "__main__":
    main()
