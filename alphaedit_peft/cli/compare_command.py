"""``alphaedit compare``: several editing methods on one model, over the same edits.

In: a model, cases, methods' names, a schedule. Out: one table of means and intervals, and a folder
with every run, which a later call takes up. It does what ``alphaedit_peft.studies.compare`` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import replace_file

if TYPE_CHECKING:
    from alphaedit_peft.studies import Base, Comparison, Method


REST = 200  # records behind the edited ones, whose facts should stay
# weaker demands than those that were made for models of billions of parameters
STRENGTHS = {"finetuning": "--set {0}.learning_rate=0.01 --set {0}.bound=0.02"}


def compare(  # noqa: PLR0913
    model: arguments.ModelArgument,
    *,
    data: arguments.DataOption = None,
    out: arguments.OutOption,
    methods: Annotated[
        str, Option(help="Of alphaedit, memit, memit-history, memit-projection, rome, ...")
    ] = "alphaedit,memit",
    edits: Annotated[int, Option(min=1, help="How many to make.")] = 100,
    batch_size: Annotated[int, Option(min=1, help="Edits solved together.")] = 100,
    every: Annotated[
        int, Option(min=0, help="Judge after every so many batches; 0: at the end.")
    ] = 0,
    seeds: Annotated[str, Option(help="Of the orders that edits are made in.")] = "0",
    search: Annotated[
        int,
        Option(min=0, help="Further edits, on which each method's ridge or w is chosen before."),
    ] = 0,
    settings: Annotated[
        list[str] | None,
        Option(
            "--set", metavar="NAME=VALUE", help="For all, or METHOD.NAME=VALUE; can be repeated."
        ),
    ] = None,
    split: arguments.SplitOption = None,
    target: arguments.TargetOption = "answers",
    snippets: arguments.SnippetsOption = None,
    texts: arguments.TextsOption = None,
    generate: arguments.GenerateOption = False,
    null_space: arguments.NullSpaceOption = None,
    key_moments: arguments.MomentsOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Compare editing methods on one model: the same edits, in batches, over several orders.

    `alphaedit compare embedded --edits 40 --batch-size 20 --methods alphaedit,memit,rome --out run`

    `alphaedit compare MODEL --data counterfact.json --key-moments moments --edits 2000
    --every 5 --seeds 0,1 --out run`

    Methods: alphaedit, memit, memit-history, memit-projection, rome, finetuning. Null space and
    projections are made of the key moments where only these are given. A comparison that was
    stopped goes on where it was. `--search 50` tries six settings for each method on 50 edits more
    and takes the best of them.
    """
    arguments.check_folder(out)
    orders = _seeds(seeds)
    data = arguments.data_for(model, data)

    from alphaedit_peft import AlphaEditConfig, studies

    common, own = _assignments(settings or [])
    chosen = _methods(methods, own)
    config = AlphaEditConfig.from_json({"on_conflict": "replace", **common})
    suite = arguments.read_suite(
        data, edits + search, REST, split=split, target=target, snippets=snippets
    )
    suite = replace(suite, texts=(*suite.texts, *arguments.read_lines(texts)))
    apart = suite.cases[edits:]
    suite = replace(suite, cases=suite.cases[:edits])
    origin = _origin(data, split, target, snippets)
    moments = arguments.load_moments(key_moments)
    base, tokenizer, space = arguments.load_model_and_space(model, dtype, device, null_space)
    ground = studies.Base(base, tokenizer, space, moments)
    ground = _with_statistics(ground, model, out, config)
    study = studies.Study(ground, suite, config, generate=generate, data=origin)
    schedule = studies.Schedule(batch_size, every)
    searched: dict[str, Any] = {}
    with printing.kept(out):
        if search:
            probes = replace(suite, cases=apart, unedited=())
            chosen, searched = studies.choose(study, chosen, probes, out, progress=printing.say)
        found = studies.compare(study, chosen, out, schedule, seeds=orders, progress=printing.say)
    facts = {"out": str(out), "edits": edits, "search": searched, **found.to_json()}
    replace_file(out / "comparison.json", printing.json_text(facts))
    over = "over seeds" if len(orders) > 1 else "over cases"
    title = f"{edits} edits in batches of {batch_size}: means, 95 % intervals {over}"
    notes = [*_taken(searched), *_apart(found), *_undone(found), f"Written to {out}"]
    printing.show(as_json, facts, title, str(found), *notes)


def _origin(
    data: str, split: str | None, target: arguments.Target, snippets: Path | None
) -> dict[str, str]:
    """Where the cases come from, for the results."""
    from alphaedit_peft.studies import file_digest

    origin = {"name": Path(data).name}
    if split is not None:
        origin = {"name": data, "split": split}
    elif data != arguments.EMBEDDED:
        origin["sha256"] = file_digest(data)
    if target != "answers":
        origin["target"] = target
    if snippets is not None:
        origin["snippets_sha256"] = file_digest(snippets)
    return origin


def _taken(searched: dict[str, Any]) -> list[str]:
    """What was chosen for each method."""
    return [
        f"{name} at its best on {of['edits']} other edits: {of['setting']}, for {of['reason']}"
        for name, of in searched.items()
    ]


def _apart(found: Comparison) -> list[str]:
    """How far the first method is from the others, on the same cases."""
    if len(found.runs) == 1:
        return []
    return [f"Differences, with 95 % intervals\n{found.differences().text()}"]


def _undone(found: Comparison) -> list[str]:
    """A sentence on each method that did nothing: its settings may be for other models."""
    told = []
    for name in found.runs:
        now, before = found.final(name).get("efficacy_recall"), found.before.metrics
        if now is None or now.value > before["efficacy_recall"].value:
            continue
        told.append(f"{name} left its edits undone, which says little of the method")
        advice = STRENGTHS.get(name.partition("-")[0])
        if advice is not None:
            told[-1] += f": its defaults fit other models; try such as {advice.format(name)}"
    return told


def _with_statistics(ground: Base, model: str, out: Path, config: Any) -> Base:
    """The null space from the key moments where only these are given; the embedded model's own."""
    if ground.null_space is None and ground.key_moments is None and model == arguments.EMBEDDED:
        from alphaedit_peft import KeyMoments, embedded

        kept = out / "key_moments"
        if not kept.is_dir():
            texts = embedded.texts(arguments.STATISTICS_TEXTS)
            made = KeyMoments.collect(ground.model, ground.tokenizer, texts, config)
            made.save_pretrained(kept)
        ground = replace(ground, key_moments=arguments.load_moments(kept))
    if ground.null_space is None and ground.key_moments is not None:
        full = config.resolve(ground.model)[0]
        ground = replace(ground, null_space=ground.key_moments.null_space(config=full))
    return ground


def _methods(names: str, own: dict[str, dict[str, Any]]) -> tuple[Method, ...]:
    from alphaedit_peft.studies import find_methods

    found = find_methods(name.strip() for name in names.split(","))
    strange = sorted(set(own) - {method.name for method in found})
    if strange:
        raise ValueError(f"--set names methods {strange}, which --methods {names} does not")
    return tuple(method.with_settings(**own.get(method.name, {})) for method in found)


def _assignments(given: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``NAME=VALUE`` for all, and by method ``METHOD.NAME=VALUE``."""
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, setting = name.strip().rpartition(".")
        if not equals or not setting or (dot and not method):
            raise BadParameter(f"--set {text!r} is not NAME=VALUE or METHOD.NAME=VALUE")
        (own.setdefault(method, {}) if method else common)[setting] = arguments.parse_value(value)
    return common, own


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadParameter(f"--seeds {text!r} is not a list such as 0,1,2") from None
