"""A benchmark's figures in tables for a terminal, from the JSON that it wrote.

In: what ``Findings.to_json`` or ``Growth.to_json`` gave, with the ``requests`` of its edits. Out:
tables as values, and sentences. ``docs/figures/benchmark_tables.py`` makes Markdown of the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from alphaedit_peft.editing.runner import PHASES
from alphaedit_peft.tables import Table, count

MEBI, GIGA = 2**20, 10**9
Values = Mapping[str, Any]


class Line(NamedTuple):
    """A batch, or a floor: its name on pages, and a short one for terminals.

    Seconds are by phase and in all; peak memory where it is known.
    """

    name: str
    short: str
    seconds: Mapping[str, float]
    total: float
    memory: int | None

    @classmethod
    def floor(cls, seconds: Mapping[str, float]) -> Line:
        """The floor of the line above."""
        return cls("its floor", "  floor", seconds, sum(seconds.values()), None)

    def cells(self, write: Callable[[float], str]) -> list[str]:
        """Seconds of each phase and in all, as ``write`` has them, and MiB."""
        each = (self.seconds.get(phase) for phase in PHASES)
        memory = "" if self.memory is None else f"{self.memory / MEBI:,.0f}"
        return [*(write(value) if value else "" for value in each), write(self.total), memory]


def lines(found: Values) -> list[Line]:
    """Every batch, the floor beneath the first one of each objective, the plain way."""
    rows = []
    for session in found["sessions"]:
        own = session["objective"]
        for number, batch in enumerate(session["batches"], start=1):
            names = f"{own}, batch {number}", f"{own} {number}"
            rows.append(Line(*names, batch["seconds"], batch["total"], batch["memory"]))
            if number == 1 and session["floor"]:
                rows.append(Line.floor(session["floor"]["seconds"]))
    if plain := found["plain"]:
        names = f"plain, {plain['edits']} of {plain['of']} edits, scaled", "plain, scaled"
        rows.append(Line(*names, plain["scaled"], plain["total"], plain["memory"]))
        if plain["scaled_floor"]:
            rows.append(Line.floor(plain["scaled_floor"]))
    return rows


def forwards(found: Values, rank: str = "") -> list[list[str]]:
    """A row for each model whose forward pass was timed; ``rank`` is how its number is written."""
    base = found["inference"][0]["milliseconds"]
    return [
        [
            one["model"] + (f", rank {one['rank']:{rank}}" if one["rank"] else ""),
            f"{one['milliseconds']:,.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['milliseconds'] / base:.2f}",
        ]
        for one in found["inference"]
    ]


FORWARD = ("ms", "tokens/s", "to base")


def ratio_in_words(found: Values | float) -> str:
    """A ratio's median, and the range of its runs where there are several: "6.1 (5.8 to 6.3)".

    Earlier versions wrote the ratio alone.
    """
    if not isinstance(found, Mapping):
        return f"{found:.3g}"
    runs = found["runs"]
    spread = f" ({min(runs):.3g} to {max(runs):.3g})" if len(runs) > 1 else ""
    return f"{found['median']:.3g}{spread}"


def measured(found: Values) -> Iterator[tuple[str, Table] | str]:
    """Everything that was measured on a model: sentences, and tables under their titles."""
    plan, model, machine = (found["head"][name] for name in ("plan", "model", "machine"))
    yield _about(found)
    what = f"Seconds for {count(plan['edits'], 'edit')}; MiB: peak above what was there before"
    heads = ["run", *(f">{name}" for name in (*PHASES, "total", "MiB"))]
    yield what, Table(heads, [[line.short, *line.cells(_seconds)] for line in lines(found)])
    yield from _remarks(found)
    place = machine.get("gpu", machine["processor"])
    yield (
        f"Matrix rates of this machine ({place}, {count(machine['threads'], 'thread')}), "
        f"measured in this run, in 10^9 operations a second: {rates(found, '.3g')}"
    )
    if found["statistics"]:
        yield f"Statistics, made once a model: {found['head']['statistics']}"
        rows = list(found["statistics"].items())
        yield "Seconds of statistics", Table(["what", ">seconds"], rows)
    if found["inference"]:
        what = f"A forward pass of {found['inference'][0]['tokens']} tokens, {model['dtype']}"
        yield what, Table(["model", *(f">{name}" for name in FORWARD)], forwards(found))


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def rates(found: Values, form: str) -> str:
    """Matrix rates in 10^9 operations a second, by dtype."""
    return ", ".join(f"{name} {rate / GIGA:{form}}" for name, rate in found["rates"].items())


def _about(found: Values) -> str:
    name, settings = found["head"]["model"]["name"], found["head"]["settings"]
    layers, stop = ",".join(map(str, settings["rewrite_layers"])), settings["stop_loss"]
    runs = f"down to a loss of {stop:g}" if stop else "all of them run (stop_loss 0)"
    return (
        f"{name}: {', '.join(described(found))}; rewrite layers {layers}; "
        f"{count(settings['steps'], 'step')}, {runs}; edits {found['requests']}"
    )


def described(found: Values) -> tuple[str, str, str]:
    """A model's size, its dtype with autocast's, and whose weights it has."""
    model = found["head"]["model"]
    return (
        f"{model['parameters'] / 1e6:,.1f}M parameters",
        model["dtype"] + (f", autocast {model['autocast']}" if model["autocast"] else ""),
        "random weights" if model["random"] else "its own weights",
    )


def _remarks(found: Values) -> Iterator[str]:
    if ratio := found["alphaedit_to_memit"]:
        yield f"AlphaEdit takes {ratio_in_words(ratio)} times MEMIT's time."
    if ratio := found["plain_to_ours"]:
        made, of = count(found["plain"]["edits"], "edit"), found["plain"]["of"]
        yield (
            f"The plain way takes {ratio_in_words(ratio)} times the time, without contexts; its "
            f"targets and keys are those of {made}, scaled to {of}."
        )
    for session in found["sessions"]:
        own, first = session["objective"], session["batches"][0]
        if floor := session["floor"]:
            total = sum(n for counts in floor["operations"].values() for n in counts.values())
            rest = first["total"] - first["seconds"]["contexts"]
            yield (
                f"{own}: {total:.3g} operations over {floor['tokens']:,.0f} tokens through the "
                f"model take at least {floor['total']:.3g} s at the matrix rate; the batch takes "
                f"{rest / floor['total']:.2f} times that, without contexts."
            )
        for batch in session["batches"]:
            if batch["rows"] < batch["edits"]:
                yield (
                    f"{own}: {batch['made']} of {batch['edits']} edits were made, in "
                    f"{batch['rows']} rows, so the times are of less work."
                )


def grown(found: Values) -> Iterator[tuple[str, Table]]:
    """The points of each growth curve, under their titles."""
    grid = found["grid"]
    titles = {
        "edits": f"A solve at d_in {grid['d_in']:,}, over rows in place",
        "widths": f"A solve with {grid['rows']:,} rows in place, over d_in",
        "depths": f"A batch at hidden size {grid['hidden'][0]}, over blocks",
        "hidden": f"A batch with {grid['depths'][0]} blocks, over the hidden size",
    }
    heads = [">at", "how", ">seconds", ">floor", ">kept, MiB", ">peak, MiB"]
    for name, title in titles.items():
        points = [point for point in found["points"] if point["curve"] == name]
        yield title, Table(heads, list(map(_point, points)))


def _point(point: Values) -> list[str | None]:
    return [
        f"{point['at']:,}",
        point["method"],
        _seconds(point["seconds"]),
        None if point["floor"] is None else _seconds(point["floor"]),
        None if point["method"] == "batch" else f"{point['state'] / MEBI:,.1f}",
        f"{point['memory'] / MEBI:,.0f}",
    ]
