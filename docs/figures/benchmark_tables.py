"""A benchmark's figures as Markdown, put into a page between its two marks.

In: what ``alphaedit benchmark --out`` wrote. Out: the page, which so holds no figures but these.
"""

from collections.abc import Iterable

from alphaedit_peft.editing.runner import PHASES
from alphaedit_peft.studies.benchmark.pages import (
    FORWARD,
    Values,
    described,
    forwards,
    lines,
    rates,
    ratio_in_words,
)

BEGIN, END = "<!-- tables: docs/figures/plot_benchmark.py -->", "<!-- end of tables -->"


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


def tables(found: Values) -> str:
    """All tables of one model: seconds by phase, shares of the first batch, forward passes."""
    rows = [[line.name, *line.cells("{:.3f}".format)] for line in lines(found)]
    seconds = _markdown(["seconds", *PHASES, "total", "MiB"], rows)
    parts = [_heading(found), seconds, _sentence(found)]
    if any(session["floor"] for session in found["sessions"]):
        parts.append(_profile(found))
    if found["inference"]:
        head = f"forward pass of {found['inference'][0]['tokens']} tokens"
        parts.append(_markdown([head, *FORWARD], forwards(found, rank=",")))
    return "\n\n".join(parts)


def title(found: Values) -> str:
    """Which model, dtype, edits: "lab-llama, float32, 20 edits made up as counterfact"."""
    name, edits = found["head"]["model"]["name"], found["head"]["plan"]["edits"]
    return f"{name}, {described(found)[1]}, {edits} edits {found['requests']}"


def _heading(found: Values) -> str:
    settings, plan, machine = (found["head"][name] for name in ("settings", "plan", "machine"))
    place = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    size, _, weights = described(found)
    return (
        f"### {title(found)}\n\n{size}, {weights}; {settings['steps']} steps, stop_loss "
        f"{settings['stop_loss']:g}; median of runs: {plan['repeats']}. {place}, torch "
        f"{machine['versions']['torch']}."
    )


def _sentence(found: Values) -> str:
    said = []
    if ratio := found["alphaedit_to_memit"]:
        said.append(f"AlphaEdit takes {ratio_in_words(ratio)} times MEMIT's seconds")
    if ratio := found["plain_to_ours"]:
        times = f"{ratio_in_words(ratio)} times AlphaEdit's"
        said.append(f"the plain way takes {times}, without contexts")
    said.append(f"matrix rates in 10^9 operations a second: {rates(found, ',.0f')}")
    if made := ", ".join(f"{what} {value:.2f}" for what, value in found["statistics"].items()):
        said.append(f"statistics ({found['head']['statistics']}), seconds: {made}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _profile(found: Values) -> str:
    """What part of each objective's first batch a phase is, and how far from its floor."""
    rows = []
    for session in found["sessions"]:
        if not session["floor"]:
            continue
        batch, least = session["batches"][0], session["floor"]["seconds"]
        row = [session["objective"]]
        for phase in PHASES:
            seconds = batch["seconds"].get(phase, 0.0)
            near = f", {seconds / least[phase]:.1f} x" if least.get(phase) else ""
            row.append(f"{100 * seconds / batch['total']:.0f} %{near}")
        rows.append(row)
    return _markdown(["share of batch 1, times its floor", *PHASES], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
