"""``alphaedit locate``: where a model recalls facts, by causal tracing.

In: a model, facts from a file or the embedded world. Out: average indirect effects by block and
class of token as tables, JSON or a page, and the rewrite layers they suggest. It does what
``alphaedit_peft.studies.locate.locate`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import replace_file

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft.report import Section
    from alphaedit_peft.studies.locate import Located


TITLES = {
    "hidden": "The hidden state after a block restored",
    "mlp": "The outputs of {} restored, which the block stands for",
}


def locate(  # noqa: PLR0913
    model: arguments.ModelArgument,
    *,
    data: arguments.DataOption = None,
    limit: Annotated[int, Option(min=1, help="Trace so many facts at most.")] = 20,
    noise: Annotated[
        float, Option(min=0.0, help="Of the subject, in deviations of its embeddings.")
    ] = 3.0,
    samples: Annotated[int, Option(min=1, help="Draws of the noise for a fact.")] = 10,
    window: Annotated[
        int | None, Option(min=1, help="MLPs restored together; else a fifth of the blocks.")
    ] = None,
    seed: Annotated[int, Option(help="Of the noise.")] = 0,
    html: arguments.PageOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Trace where a model recalls facts: corrupt the subject, restore one state, see what returns.

    `alphaedit locate embedded --limit 10`

    `alphaedit locate MODEL --data counterfact.json --limit 50 --html located.html`

    Facts are the data's prompts with their true targets; what the model does not know is left out.
    Tracing shows where facts are read, which need not be where edits work best: compare with
    `alphaedit tune`.
    """
    arguments.check_file("--html", html, arguments.PAGES)
    data = arguments.data_for(model, data)

    from alphaedit_peft.studies.locate import locate as trace

    suite = arguments.read_suite(data, limit)
    base, tokenizer = arguments.load_model(model, dtype, device)
    found = trace(
        base,
        tokenizer,
        suite.edits,
        noise=noise,
        samples=samples,
        window=window,
        seed=seed,
        progress=printing.progress,
    )
    if html is not None:
        replace_file(html, _page(found, model))
    written = [] if html is None else [f"Written to {html}"]
    parts = [_table(found, state) for state in TITLES]
    printing.show(as_json, found.to_json(), _summary(found), *parts, _advice(found), *written)


def _summary(found: Located) -> str:
    aside = f", {found.set_aside} set aside as not known" if found.set_aside else ""
    return (
        f"{printing.count(len(found.traces), 'fact')} traced{aside}: P(target) is "
        f"{found.clean.value:.3f}, and {found.corrupted.value:.3f} with noise of {found.noise:g} x "
        f"{found.deviation:.3g} on the subject ({printing.count(found.samples, 'draw')}). Below: "
        "how much comes back"
    )


def _title(found: Located, state: str) -> str:
    if state == "mlp" and found.window == 1:
        return "The output of a block's MLP restored"
    return TITLES[state].format(f"{found.window} neighbouring MLPs")


def _rows(found: Located, state: str) -> tuple[list[str], list[list[Any]]]:
    effects = found.effects(state)
    rows = [
        [block, *(_share(values[block].value) for values in effects.values())]
        for block in range(found.blocks)
    ]
    return [">block", *(f">{name}" for name in effects)], rows


def _share(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _table(found: Located, state: str) -> Table:
    heads, rows = _rows(found, state)
    return printing.table(_title(found, state), [name.replace(" ", "\n") for name in heads], rows)


def _advice(found: Located) -> str:
    peak = found.peak
    best = found.effect("mlp", "last subject")[peak]
    others = [str(block) for block in found.near_peak if block != peak]
    beside = f" (within noise of it: {', '.join(others)})" if others else ""
    what = f"the MLP of block {peak} restores" if found.window == 1 else ""
    what = what or f"the MLPs around block {peak} restore"
    return (
        f"At the subject's last token {what} most, {best.value:.3f} (95 % interval {best.low:.3f} "
        f".. {best.high:.3f}){beside}. Rewrite layers up to there: "
        f"{', '.join(map(str, found.suggested_layers))}. Whether edits work there is another "
        "question: 'alphaedit tune' measures it"
    )


def _page(found: Located, model: str) -> str:
    from alphaedit_peft.report import Section, page, paragraph, table

    facts = [(trace.question, trace.target, trace.clean, trace.corrupted) for trace in found.traces]
    columns = ("prompt", "target", ">P(target)", ">corrupted")
    sections = [
        Section("What it says", paragraph(_advice(found))),
        *(_section(found, state) for state in TITLES),
        Section("Facts", table(columns, facts, search="Find a fact")),
    ]
    return page(f"Where {model} recalls facts", sections, _summary(found))


def _section(found: Located, state: str) -> Section:
    from alphaedit_peft.report import Markup, Section, heat_map, table

    effects = found.effects(state)
    values = [[estimate.value for estimate in row] for row in effects.values()]
    largest = max(abs(value) for row in values for value in row) or 1.0
    title = (
        f"Average indirect effect: blocks 0 to {found.blocks - 1} from left to right, the darkest "
        f"is {largest:.3f}"
    )
    shades = [[value / largest for value in row] for row in values]
    chart = heat_map(title, shades, tuple(effects))
    return Section(_title(found, state), Markup(chart + table(*_rows(found, state))))
