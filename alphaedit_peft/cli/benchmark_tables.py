"""The tables of ``alphaedit benchmark``, from the same plain values that it writes as JSON.

In: what ``Findings.to_json`` or ``Growth.to_json`` gave. Out: tables and sentences to print.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alphaedit_peft.cli import show

if TYPE_CHECKING:
    from rich.table import Table

PHASES = ("contexts", "keys", "targets", "solve", "write", "score")
MEBI, GIGA = 2**20, 10**9
Values = Mapping[str, Any]


def measured(facts: Values) -> Iterator[Table | str]:
    """Everything that was measured on a model."""
    plan, model, machine = (facts["head"][name] for name in ("plan", "model", "machine"))
    yield _about(facts)
    title = (
        f"Seconds for {show.count(plan['edits'], 'edit')}; MiB: peak above what was there before"
    )
    heads = ["run", *(f">{phase}" for phase in PHASES), ">total", ">MiB"]
    yield show.table(title, heads, _rows(facts))
    yield from _remarks(facts)
    rates = ", ".join(f"{n} {rate / GIGA:.3g}" for n, rate in facts["rates"].items())
    place = machine.get("gpu", machine["processor"])
    yield (
        f"Matrix rates of this machine ({place}, {show.count(machine['threads'], 'thread')}), "
        f"measured in this run, in 10^9 operations a second: {rates}"
    )
    rows = [[name, seconds] for name, seconds in facts["statistics"].items()]
    if rows:
        yield f"Statistics, made once a model: {facts['head']['statistics']}"
        yield show.table("Seconds of statistics", ["what", ">seconds"], rows)
    if facts["inference"]:
        yield _inference(facts["inference"], model)


def _about(facts: Values) -> str:
    model, settings = facts["head"]["model"], facts["head"]["settings"]
    layers = ",".join(map(str, settings["rewrite_layers"]))
    cast = f", autocast {model['autocast']}" if model["autocast"] else ""
    weights = "random weights" if model["random"] else "its own weights"
    stop = settings["stop_loss"]
    runs = f"down to a loss of {stop:g}" if stop else "all of them run (stop_loss 0)"
    return (
        f"{model['name']}: {model['parameters'] / 1e6:,.1f}M parameters, {model['dtype']}{cast}, "
        f"{weights}; rewrite layers {layers}; {show.count(settings['steps'], 'step')}, {runs}; "
        f"edits {facts['requests']}"
    )


def _rows(facts: Values) -> Iterator[list[Any]]:
    """A row for each batch, and beneath the first one its floor."""
    for session in facts["sessions"]:
        for number, batch in enumerate(session["batches"], start=1):
            yield _row(f"{session['objective']} {number}", batch["seconds"], batch)
            if number == 1 and session["floor"]:
                yield _row("  floor", session["floor"]["seconds"], session["floor"])
    plain = facts["plain"]
    if plain:
        yield _row("plain, scaled", plain["scaled"], plain)
        if plain["floor"]:
            yield _row("  floor", plain["scaled_floor"], {})


def _row(name: str, seconds: Mapping[str, float], found: Values) -> list[Any]:
    total = found.get("total", sum(seconds.values()))
    cells = [_seconds(seconds[phase]) if seconds.get(phase) else "" for phase in PHASES]
    memory = f"{found['memory'] / MEBI:,.0f}" if "memory" in found else ""
    return [name, *cells, _seconds(total), memory]


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _remarks(facts: Values) -> Iterator[str]:
    from alphaedit_peft.studies.benchmark.markdown import ratio_in_words

    if facts["alphaedit_to_memit"]:
        yield f"AlphaEdit takes {ratio_in_words(facts['alphaedit_to_memit'])} times MEMIT's time."
    if facts["plain_to_ours"]:
        plain = facts["plain"]
        yield (
            f"The plain way takes {ratio_in_words(facts['plain_to_ours'])} times the time, without "
            "contexts; "
            f"its targets and keys are those of {show.count(plain['edits'], 'edit')}, scaled to "
            f"{plain['of']}."
        )
    for session in facts["sessions"]:
        first, floor = session["batches"][0], session["floor"]
        if floor:
            rest = first["total"] - first["seconds"]["contexts"]
            yield (
                f"{session['objective']}: {_count(floor)} operations over {floor['tokens']:,.0f} "
                f"tokens through the model take at least {floor['total']:.3g} s at the matrix "
                f"rate; the batch takes {rest / floor['total']:.2f} times that, without contexts."
            )
        for batch in session["batches"]:
            if batch["rows"] < batch["edits"]:
                yield (
                    f"{session['objective']}: {batch['made']} of {batch['edits']} edits were made, "
                    f"in {batch['rows']} rows, so the times are of less work."
                )


def _count(floor: Values) -> str:
    total = sum(n for counts in floor["operations"].values() for n in counts.values())
    return f"{total:.3g}"


def _inference(forwards: Sequence[Values], model: Values) -> Table:
    base = forwards[0]["milliseconds"]
    rows = [
        [
            one["model"] + (f", rank {one['rank']}" if one["rank"] else ""),
            f"{one['milliseconds']:,.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['milliseconds'] / base:.2f}",
        ]
        for one in forwards
    ]
    title = f"A forward pass of {forwards[0]['tokens']} tokens, {model['dtype']}"
    return show.table(title, ["model", ">ms", ">tokens/s", ">to base"], rows)


def curves(grown: Values) -> Iterator[Table]:
    """The points of the growth curves."""
    grid = grown["grid"]
    titles = {
        "edits": f"A solve at d_in {grid['d_in']:,}, over rows in place",
        "widths": f"A solve with {grid['rows']:,} rows in place, over d_in",
        "depths": f"A batch at hidden size {grid['hidden'][0]}, over blocks",
        "hidden": f"A batch with {grid['depths'][0]} blocks, over the hidden size",
    }
    heads = [">at", "how", ">seconds", ">floor", ">kept, MiB", ">peak, MiB"]
    for name, title in titles.items():
        rows = [
            [
                f"{p['at']:,}",
                p["method"],
                _seconds(p["seconds"]),
                None if p["floor"] is None else _seconds(p["floor"]),
                f"{p['state'] / MEBI:,.1f}" if p["method"] != "batch" else None,
                f"{p['memory'] / MEBI:,.0f}",
            ]
            for p in grown["points"]
            if p["curve"] == name
        ]
        yield show.table(title, heads, rows)
