"""``alphaedit edit``: edits from JSON Lines into a model, and the pack out.

In: a model, edits, a null space, and a pack to go on from where there is one. Out: the pack, and
the report of the run. It does what ``AlphaEditModel.edit`` and ``save_pretrained`` do; the pack is
saved after each batch, so that a run that stops or is killed keeps those that were finished.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.messages import shown
from alphaedit_peft.records import read_object
from alphaedit_peft.settings import EditOptions, about

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft import AlphaEditModel, Edit, EditReport


FIXED = (  # what a pack's edits were made with, and later ones must be too
    *("preset", "rewrite_layers", "rewrite_module", "block_module"),
    *("objective", "projection", "moment_weight", "threshold", "threshold_mode"),
    *("contexts", "num_contexts", "context_length", "chat_template", "separator", "seed"),
)


def edit(  # noqa: PLR0913
    model: arguments.ModelArgument,
    edits: Annotated[
        Path, Argument(metavar="EDITS", help="A file of edits: JSON Lines, a JSON list or CSV.")
    ],
    *,
    out: Annotated[Path, Option(metavar="PACK", help="Pack to write.")],
    null_space: arguments.NullSpaceOption = None,
    pack: Annotated[str | None, Option(metavar="PACK", help="Pack to go on from.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Edits solved together.")] = 100,
    config: Annotated[Path | None, Option(metavar="FILE", help="AlphaEditConfig as JSON.")] = None,
    layers: arguments.LayersOption = None,
    preset: Annotated[str | None, Option(help=f"{about('preset')}.")] = None,
    ridge: Annotated[float | None, Option(help=f"{about('ridge')}.")] = None,
    steps: Annotated[int | None, Option(help="Of each target value's search.")] = None,
    on_conflict: Annotated[str | None, Option(help=f"{about('on_conflict')}.")] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any other setting; can be repeated."),
    ] = None,
    key_moments: arguments.MomentsOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Make edits and write them as a pack.

    A line of EDITS has the place of the subject as {} or written out, and may have target_true,
    anchors (prompts whose answers are kept), paraphrases, neighborhood and an id; files of
    CounterFact, MQuAKE, zsRE, KnowEdit and EasyEdit are read as they are:

    {"subject": "Ada Lovelace", "prompt": "{} was born in", "target_new": "Vienna"}

    `alphaedit edit MODEL edits.jsonl --null-space ns --out pack`

    `alphaedit edit MODEL more.jsonl --null-space ns --pack pack --out pack` (goes on)

    Edits that did not take are listed with the reason, and do not change the exit code.
    """
    from alphaedit_peft import read_edits

    arguments.check_folder(out)
    given: dict[str, Any] = {"preset": preset, "rewrite_layers": arguments.parse_layers(layers)}
    given |= {"ridge": ridge, "steps": steps, "on_conflict": on_conflict}
    values = _settings(config, given, settings or [])
    wanted = read_edits(edits)
    moments = arguments.load_moments(key_moments)
    base, tokenizer, space = arguments.load_model_and_space(model, dtype, device, null_space)
    resources = {"tokenizer": tokenizer, "null_space": space, "key_moments": moments}
    edited = _model(base, pack, values, resources)
    report = _edit_and_save(edited, wanted, batch_size, out)
    facts = {"out": str(out), "edits_in_pack": len(edited.edits), **report.to_json()}
    printing.show(as_json, facts, *_parts(report, len(edited.edits), out))


def _settings(path: Path | None, given: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Settings from a JSON file, then from options, which win."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_object(path)
        except ValueError as error:
            raise ValueError(f"--config {error}") from error
    values |= {name: value for name, value in given.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise BadParameter(f"--set {assignment!r} is not NAME=VALUE")
        values[name.strip()] = arguments.parse_value(text)

    known = list(EditOptions().to_json())
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = get_close_matches(unknown[0], known, n=3, cutoff=0.5)
        told = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"settings {shown(unknown, 150)} are unknown; {told}docs/settings.md lists all"
        )
    return values


def _model(
    base: Any, pack: str | None, values: dict[str, Any], resources: dict[str, Any]
) -> AlphaEditModel:
    """A new editable model with these settings, or one that goes on from a pack."""
    from alphaedit_peft import AlphaEditConfig, get_alphaedit_model

    if pack is None:
        return get_alphaedit_model(base, AlphaEditConfig.from_json(values), **resources)
    fixed = sorted(set(values) & set(FIXED))
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed while going on from {pack}: its edits were made "
            "with its own; leave them out, or start a new pack"
        )
    edited: AlphaEditModel = arguments.load_pack(base, pack, resources)
    edited.alphaedit_config = replace(edited.alphaedit_config, **values)
    return edited


def _edit_and_save(
    edited: AlphaEditModel, wanted: tuple[Edit, ...], batch_size: int, out: Path
) -> EditReport:
    before = len(edited.records)

    def save() -> None:
        edited.save_pretrained(out)

    try:
        report = edited.edit(wanted, batch_size=batch_size, after_batch=save)
    except BaseException:
        if len(edited.records) > before:
            save()  # the last one may have been cut short
            printing.say(f"stopped; the finished batches ({len(edited.edits)} edits) are in {out}")
        raise
    save()
    return report


def _parts(report: EditReport, total: int, out: Path) -> list[Table | str]:
    """The report as tables and sentences."""
    took = len(report.made) - len(report.not_taken)
    decided = [(d.name, d.value, d.reason) for d in report.decisions]
    remarks = [(r.edit.question, r.edit.target_new.strip(), r.remark) for r in report if r.remark]
    aside = [(r.edit.question, r.edit.target_new.strip(), r.reason) for r in report.set_aside]
    columns = ["prompt", "new target", "why"]
    made = (
        f"{printing.count(len(report.made), 'edit')} made, {len(report.set_aside)} set aside; "
        f"{took} of {len(report.made)} new targets are now what the model says by itself."
    )
    return [
        *printing.filled(*printing.DECIDED, decided),
        *([_edit_table(report), _layer_table(report)] if report.made else []),
        *printing.filled("Not as asked for", columns, remarks),
        *printing.filled("Set aside", columns, aside),
        made,
        f"Written to {out}: {printing.count(total, 'edit')}",
    ]


def _edit_table(report: EditReport) -> Table:
    columns = ["prompt", "target", ">before", ">after", ">said", ">loss", ">steps", ">share"]
    asked = any(r.paraphrases for r in report.made)
    rows = [
        (
            r.edit.question,
            r.edit.target_new.strip(),
            printing.probability(r.probability_before),
            printing.probability(r.probability_after),
            r.likeliest,
            printing.probability(r.loss),
            r.steps,
            printing.probability(r.total_share),
            *[f"{sum(r.paraphrases)} of {len(r.paraphrases)}" if r.paraphrases else ""] * asked,
        )
        for r in report.made
    ]
    columns += [">paraphrases"] * asked
    return printing.table("Edits: P(target) before and after", columns, rows)


def _layer_table(report: EditReport) -> Table:
    columns = [">layer", ">rank", ">|Delta|", ">|W|", ">on edited keys", ">on preserved keys"]
    rows = [
        (x.layer, x.rank, x.delta_norm, x.weight_norm, x.edited_change, x.preserved_change)
        for x in report.layers
    ]
    return printing.table("Layers: the update, and how far it moves outputs", columns, rows)
