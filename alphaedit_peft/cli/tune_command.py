"""``alphaedit tune``: settings tried on a few edits of a model, and which of them to take.

In: a model, probe edits, a null space or texts to make it of. Out: a table of all that was tried
and a recommendation with its reason, as text, JSON or a page. It does what
``alphaedit_peft.studies.tune.tune`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import replace_file

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft.studies.tune import Tuning


NARROW = {
    "threshold": "thres-\nhold",
    "efficacy": "effi-\ncacy",
    "generalization": "general-\nization",
    "specificity": "speci-\nficity",
    "harmonic mean": "harm.\nmean",
}
HELD_OUT = 100  # texts that measure drift, kept out of the statistics
INTERVAL = ">95 % interval"
T = TypeVar("T")


def tune(  # noqa: PLR0913
    model: arguments.ModelArgument,
    *,
    data: arguments.DataOption = None,
    edits: Annotated[int, Option(min=2, help="Probe edits, made and judged.")] = 20,
    objective: Annotated[str, Option(help="alphaedit, or memit, whose w is tried.")] = "alphaedit",
    null_space: arguments.NullSpaceOption = None,
    key_moments: arguments.MomentsOption = None,
    texts: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="One a line: drift is measured on the last 100; the statistics are made of the "
            "others where none are given.",
        ),
    ] = None,
    layers: Annotated[str | None, Option(help="Rewrite layers to try, such as '0-1;2-3'.")] = None,
    clamps: Annotated[str | None, Option(help="clamp_factor, such as 0.75,1.")] = None,
    ridges: Annotated[str | None, Option(help="Relative ridges, such as 0.05,0.2.")] = None,
    thresholds: Annotated[
        str | None, Option(help="Thresholds by energy, such as 0.01,0.05.")
    ] = None,
    weights: Annotated[str | None, Option(help="Times the w that auto decides: 0.25,1,4.")] = None,
    seed: Annotated[int, Option(help="Of the contexts that edits are made with.")] = 0,
    html: arguments.PageOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Try settings on a few edits and say which to take; the model is left as it is.

    `alphaedit tune embedded`

    `alphaedit tune MODEL --data counterfact.json --texts corpus.txt --html tuned.html`

    Choose by edits that you will not be judged by: the figures of the best of many settings
    flatter it.
    """
    arguments.check_file("--html", html, arguments.PAGES)
    data = arguments.data_for(model, data)
    given_none = null_space is None and key_moments is None
    if given_none and texts is None and model != arguments.EMBEDDED:
        raise BadParameter("give --null-space DIR, --key-moments DIR or --texts FILE")
    numbers = {"clamps": clamps, "ridges": ridges, "thresholds": thresholds, "weights": weights}
    given = {n: _split(n, text, ",", float) for n, text in numbers.items() if text is not None}
    wanted = () if layers is None else _split("layers", layers, ";", _layers)

    from alphaedit_peft import AlphaEditConfig, studies
    from alphaedit_peft.architecture import describe
    from alphaedit_peft.studies import tune

    lines = arguments.read_lines(texts)
    corpus = _corpus(None if texts is None else lines) if given_none else []
    suite = arguments.read_suite(data, edits)
    suite = replace(suite, texts=lines[-HELD_OUT:] or suite.texts[:HELD_OUT], unedited=())
    base, tokenizer, space = arguments.load_model_and_space(model, dtype, device, null_space)
    moments = arguments.load_moments(key_moments)
    choices = wanted or tune.layer_choices(describe(base).num_blocks)
    for statistics in (space, moments):
        if statistics is not None and not wanted:
            there = set(statistics.layers)
            choices = tuple(choice for choice in choices if set(choice) <= there)
            choices = choices or (statistics.layers,)
    grid = tune.Grid(choices, **given)
    config = AlphaEditConfig(seed=seed, objective=objective)
    if space is None and moments is not None and config.projects:
        space = moments.null_space(config=config.resolve(base)[0])
    ground = studies.Base(base, tokenizer, space, moments)
    if given_none:
        every = replace(config, rewrite_layers=sorted({n for choice in choices for n in choice}))
        ground = studies.Base.from_texts(base, tokenizer, corpus, every, progress=True)
    found = tune.tune(ground, suite, grid, config, progress=printing.progress)
    if html is not None:
        replace_file(html, _page(found, model))
    written = [] if html is None else [f"Written to {html}"]
    printing.show(as_json, found.to_json(), _table(found), _advice(found), *written)


def _corpus(lines: tuple[str, ...] | None) -> list[str]:
    """Texts for the statistics: all but the held-out ones, or the embedded world's."""
    from alphaedit_peft import embedded

    if lines is None:
        return embedded.texts(arguments.STATISTICS_TEXTS)
    if len(lines) <= HELD_OUT:
        raise ValueError(
            f"--texts holds {len(lines)} texts, and {HELD_OUT} are held out for drift; give more"
        )
    return list(lines[:-HELD_OUT])


def _table(found: Tuning) -> Table:
    """What a terminal of eighty columns holds: no intervals, but what is within noise."""
    tried, made = printing.count(len(found.tried), "setting"), printing.count(found.edits, "edit")
    heads, rows = _rows(found)
    kept = [i for i, name in enumerate(heads) if name != INTERVAL]
    for name, narrow in NARROW.items():
        heads = [head.replace(name, narrow).replace("_", "\n") for head in heads]
    cells = [[row[i] for i in kept] for row in rows]
    return printing.table(f"{tried} tried on {made}", [heads[i] for i in kept], cells)


def _rows(found: Tuning) -> tuple[list[str], list[list[Any]]]:
    columns = found.recommended.columns
    solve = [name.replace("_", " ") for name in found.recommended.setting.solve]
    heads = [">layers", ">clamp", *(f">{name}" for name in (*solve, *columns))]
    rows = []
    for tried in found.ranked:
        setting, score = tried.setting, tried.score
        rows.append(
            [
                ",".join(map(str, setting.rewrite_layers)),
                *(setting.clamp_factor, *setting.solve.values()),
                *(f"{100 * tried.scores[name]:.1f}" for name in columns),
                f"{score.value:.3f}",
                f"{score.low:.3f} .. {score.high:.3f}",
                "" if tried.drift is None else f"{tried.drift.value:.2g}",
                "" if tried in found.even else "lower",
            ]
        )
    return [*heads, ">harmonic mean", INTERVAL, ">drift", "noise"], rows


def _advice(found: Tuning) -> str:
    return (
        f"Recommended: {found.recommended.setting}: {found.reason}. Its figures flatter it, since "
        "it was chosen by them; judge it on other edits"
    )


def _page(found: Tuning, model: str) -> str:
    from alphaedit_peft.report import Section, page, paragraph, table

    legend = (
        "Shares in percent; the interval is of the harmonic mean, over edits; drift is the mean "
        "KL(unedited || edited) on held-out texts in nats a token. 'lower' marks settings that the "
        "recommended one is ahead of by more than noise."
    )
    sections = [
        Section("Recommended", paragraph(_advice(found))),
        Section("All that was tried", table(*_rows(found), search="Find a setting")),
        Section("How to read it", paragraph(legend)),
    ]
    summary = f"Tried on {printing.count(found.edits, 'edit')}."
    return page(f"Settings for {model}", sections, summary)


def _layers(part: str) -> tuple[int, ...]:
    return tuple(arguments.parse_layers(part) or ())


def _split(name: str, text: str, by: str, read: Callable[[str], T]) -> tuple[T, ...]:
    try:
        return tuple(read(part) for part in text.split(by))
    except ValueError:
        raise BadParameter(f"--{name} {text!r} is no list of numbers") from None
