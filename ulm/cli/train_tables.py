"""How training is shown: the estimate of a run, the list of runs, and one run, as rich renderables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ulm.cli.console import printable
from ulm.cli.corpus_tables import right

STYLES = {"running": "green", "failed": "red", "interrupted": "yellow"}
MAX_EVENTS = 20  # of the newest; the JSON line has all


def plan(planned: dict[str, Any]) -> RenderableType:
    """The estimate of `train --plan`."""
    batch, memory, disk = planned["batch"], planned["memory"], planned["disk"]
    parts = [f"{name.replace('_', ' ')} {decimal(memory[name])}" for name in _MEMORY if memory[name]]
    workers, possible = planned["workers"], ", ".join(map(str, planned["workers_possible"]))
    how = "measured" if planned["measured"] else "assumed"
    per_parameter = planned["tokens_per_parameter"]
    rows = {
        "parameters": f"{planned['parameters']:,}",
        "steps": f"{planned['steps']:,}, of which {planned['steps_done']:,} are done",
        "tokens": f"{planned['tokens']:,}, {per_parameter:.3g} per parameter (about 20 are compute-optimal)",
        "corpus": f"{planned['epochs']:.2f} epochs; {planned['padding_share']:.1%} of the slots are padding",
        "batch": f"{batch['tokens']:,} tokens in {batch['rows']:,} rows; "
        f"of a worker {batch['micro_batches']:,} times up to {batch['micro_batch_rows']:,} rows",
        "workers": f"{workers}; the batch can be shared by {possible}",
        "device": planned["device"],
        "precision": planned["precision"],
        "compile": f"{'yes' if planned['compile'] else 'no'}: {planned['compile_why']}",
        "memory": f"{decimal(memory['total'])} of {decimal(memory['free'])} free: {', '.join(parts)}",
        "disk": f"{decimal(disk['total'])} of {decimal(disk['free'])} free: "
        f"{disk['kept']} checkpoints and one being written, {decimal(disk['checkpoint'])} each",
        "operations": f"{planned['flops']:.2e} FLOP",
        "time": f"about {duration(planned['seconds'])}: {planned['tokens_per_second']:,.0f} tokens/s, "
        f"{how}, {planned['mfu']:.0%} of {planned['peak_flops'] / 1e12:.3g} TFLOP/s",
    }
    return Group(pairs(rows), *(styled(f"note: {remark}", "yellow") for remark in planned["remarks"]))


def ending(line: dict[str, Any], report: Path) -> RenderableType:
    """What a person may do next, after `ulm train`."""
    if line.get("status") == "interrupted":
        return styled(f"saved as {line['checkpoint'] or 'nothing'}; the same command goes on from there", "yellow")
    return styled(f'step {line["step"]:,} is the last; see {report}, or `ulm generate {line["run"]} "…"`', "dim")


def finished(run: str) -> RenderableType:
    """What a person hears who starts a run that has ended."""
    longer = f"another name, with init_from: {run}, trains it longer"
    return styled(f"{run} is finished: nothing is trained, whatever its recipe changes; {longer}", "dim")


_MEMORY = ("weights", "gradients", "optimizer", "average", "activations", "checkpoint_copy", "program")


def runs(found: list[dict[str, Any]]) -> RenderableType:
    """All runs, a line each, narrow enough for 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold", min_width=min(20, max((len(run["run"]) for run in found), default=0)))
    for title in ("status", "started"):
        table.add_column(title, no_wrap=True)
    for title in ("size", "step", "loss", "bpb", "tok/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in found:
        started = run["started"]
        table.add_row(
            styled(run["run"]),
            styled(run["status"], STYLES.get(run["status"], "")),
            started[5:16].replace("T", " ") if started else "-",
            _size(run["parameters"]),
            f"{_number(run['step'], '')}/{_number(run['num_steps'], '')}",
            _number(run["loss"], ".3f"),
            _number(run["bits_per_byte"], ".3f"),
            _number(run["tokens_per_second"], ",.0f"),
        )
    return table if found else styled("no runs yet")


def run(found: dict[str, Any]) -> RenderableType:
    """One run: its recipe, figures, checkpoints, events, and where its report is."""
    rows = {
        "run": f"{found['run']}, {found['status']}",
        "step": _steps(found),
        "parameters": _number(found["parameters"], ","),
        "loss": _number(found["loss"], ".4f"),
        "bits per byte": _number(found["bits_per_byte"], ".4f"),
        "tokens per second": _number(found["tokens_per_second"], ",.0f"),
        "report": found["report"] or "-",
    }
    checkpoints = Table("checkpoint", *right("val_loss"), "", title="checkpoints", title_justify="left")
    for entry in found["about_checkpoints"]:
        best = "best" if entry["best"] else ""
        checkpoints.add_row(styled(entry["name"]), _number(entry["val_loss"], ".4f"), best)
    events = Table(*right("step"), "what", "", title="events", title_justify="left")
    for event in found["events"][-MAX_EVENTS:]:
        events.add_row(
            f"{event['step']:,}", styled(event["kind"], STYLES.get(event["kind"], "")), styled(event["text"])
        )
    recipe = found["recipe"] or "no recipe.yaml"
    return Group(styled(recipe.rstrip(), "dim"), styled(""), pairs(rows), checkpoints, events)


def _steps(run: dict[str, Any]) -> str:
    return f"{_number(run['step'], ',')} of {_number(run['num_steps'], ',')}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(parameters: int | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"


def duration(seconds: float) -> str:
    """A time as people say it: 12 s, 3 min 5 s, 2 h 10 min, 3.1 days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def pairs(rows: dict[str, str]) -> Table:
    """Names and what they are, without lines."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(styled(name, "dim"), styled(value))
    return table


def styled(text: str, style: str = "") -> Text:
    """Text from anywhere that cannot act on the terminal."""
    return Text(printable(text), style)
