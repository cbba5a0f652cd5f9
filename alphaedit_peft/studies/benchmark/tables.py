"""A benchmark's figures as Markdown, from the JSON that it wrote, so that pages hold no others.

In: what ``Findings.to_json`` gave, a page with two marks. Out: tables, and the page with these
between its marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from alphaedit_peft.editing.runner import PHASES

BEGIN, END = "<!-- tables: docs/figures/plot_benchmark.py -->", "<!-- end of tables -->"
MEBI, GIGA = 2**20, 10**9
Values = Mapping[str, Any]


class Line(NamedTuple):
    """A batch, or a floor: its name, seconds by phase and in all, peak memory where known."""

    name: str
    seconds: Mapping[str, float]
    total: float
    memory: int | None


def lines(found: Values) -> list[Line]:
    """Every batch, the floor beneath the first one of each objective, the plain way."""
    rows = []
    for session in found["sessions"]:
        for number, batch in enumerate(session["batches"], start=1):
            name = f"{session['objective']}, batch {number}"
            rows.append(Line(name, batch["seconds"], batch["total"], batch["memory"]))
            if number == 1 and session["floor"]:
                floor = session["floor"]
                rows.append(Line("its floor", floor["seconds"], floor["total"], None))
    if plain := found["plain"]:
        name = f"plain, {plain['edits']} of {plain['of']} edits, scaled"
        rows.append(Line(name, plain["scaled"], plain["total"], plain["memory"]))
        if floor := plain["scaled_floor"]:
            rows.append(Line("its floor", floor, sum(floor.values()), None))
    return rows


def tables(found: Values) -> str:
    """All tables of one model: seconds by phase, shares of the first batch, forward passes."""
    parts = [_about(found), _seconds(found), _remarks(found)]
    if any(session["floor"] for session in found["sessions"]):
        parts.append(_profile(found))
    if found["inference"]:
        base = found["inference"][0]["milliseconds"]
        rows = [
            [
                one["model"] + (f", rank {one['rank']:,}" if one["rank"] else ""),
                f"{one['milliseconds']:,.1f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['milliseconds'] / base:.2f}",
            ]
            for one in found["inference"]
        ]
        head = f"forward pass of {found['inference'][0]['tokens']} tokens"
        parts.append(_table([head, "ms", "tokens/s", "to base"], rows))
    return "\n\n".join(parts)


def page_with(page: str, models: Iterable[Values]) -> str:
    """A page with the tables of these models between its two marks.

    Raises:
        ValueError: a page without the marks, or with them the wrong way round.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, in this order")
    body = "\n\n".join(tables(found) for found in models)
    return f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}"


def title(found: Values) -> str:
    """Which model, dtype, edits: "lab-llama, float32, 20 edits made up as counterfact"."""
    model = found["head"]["model"]
    cast = f", autocast {model['autocast']}" if model["autocast"] else ""
    edits = f"{found['head']['plan']['edits']} edits {found['requests']}"
    return f"{model['name']}, {model['dtype']}{cast}, {edits}"


def _about(found: Values) -> str:
    model, machine = found["head"]["model"], found["head"]["machine"]
    settings, plan = found["head"]["settings"], found["head"]["plan"]
    place = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    weights = "random weights" if model["random"] else "its own weights"
    stop = f"stop_loss {settings['stop_loss']:g}"
    return (
        f"### {title(found)}\n\n"
        f"{model['parameters'] / 1e6:,.1f}M parameters, {weights}; "
        f"{settings['steps']} steps, {stop}; median of runs: "
        f"{plan['repeats']}. {place}, torch {machine['versions']['torch']}."
    )


def _seconds(found: Values) -> str:
    rows = [
        [
            line.name,
            *(f"{line.seconds[p]:.3f}" if line.seconds.get(p) else "" for p in PHASES),
            f"{line.total:.3f}",
            "" if line.memory is None else f"{line.memory / MEBI:,.0f}",
        ]
        for line in lines(found)
    ]
    return _table(["seconds", *PHASES, "total", "MiB"], rows)


def _profile(found: Values) -> str:
    """What part of each objective's first batch a phase is, and how far from its floor."""
    rows = []
    for session in found["sessions"]:
        if not session["floor"]:
            continue
        batch, least = session["batches"][0], session["floor"]["seconds"]
        cells = []
        for phase in PHASES:
            seconds = batch["seconds"].get(phase, 0.0)
            share = f"{100 * seconds / batch['total']:.0f} %"
            near = f", {seconds / least[phase]:.1f} x" if least.get(phase) else ""
            cells.append(share + near)
        rows.append([session["objective"], *cells])
    return _table(["share of batch 1, times its floor", *PHASES], rows)


def _remarks(found: Values) -> str:
    said = []
    if found["alphaedit_to_memit"]:
        times = ratio_in_words(found["alphaedit_to_memit"])
        said.append(f"AlphaEdit takes {times} times MEMIT's seconds")
    if found["plain_to_ours"]:
        times = ratio_in_words(found["plain_to_ours"])
        said.append(f"the plain way takes {times} times AlphaEdit's, without contexts")
    rates = ", ".join(f"{name} {rate / GIGA:,.0f}" for name, rate in found["rates"].items())
    said.append(f"matrix rates in 10^9 operations a second: {rates}")
    made = ", ".join(f"{what} {value:.2f}" for what, value in found["statistics"].items())
    said += [f"statistics ({found['head']['statistics']}), seconds: {made}"] if made else []
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def ratio_in_words(found: Values | float) -> str:
    """A ratio's median, and the range of its runs where there are several: "6.1 (5.8 to 6.3)".

    Earlier versions wrote the ratio alone.
    """
    if not isinstance(found, Mapping):
        return f"{found:.3g}"
    runs = found["runs"]
    text = f"{found['median']:.3g}"
    return f"{text} ({min(runs):.3g} to {max(runs):.3g})" if len(runs) > 1 else text


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
