"""The page of a pack, for people: what it says, how well it took, how full it is, where it is from.

In: an :class:`~alphaedit_peft.pack.EditPack`, and its null space where it is at hand. Out: one
self-contained HTML page. Everything on it is read from the pack; no model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.card import PLACE, base_name, loading, loading_code
from alphaedit_peft.pack.parents import parent_in_words, stands_on
from alphaedit_peft.pack.value import PackValue
from alphaedit_peft.report.charts import gauge, line_chart
from alphaedit_peft.report.layer_sections import (
    RowFigures,
    capacity_section,
    key_section,
    null_space_section,
    row_figures,
)
from alphaedit_peft.report.page import (
    Markup,
    Section,
    escaped,
    facts,
    page,
    paragraph,
    side_by_side,
    source,
    table,
)

_USE = """\
{loading}

# as any LoRA, with PEFT alone
{code.peft}

# or with alphaedit_peft, {purpose}
{code.own}"""


def pack_page(
    pack: PackValue, null_space: NullSpace | None = None, *, title: str = "Edit pack"
) -> str:
    """One HTML page that shows a pack to people; it needs no network and no other file.

    Args:
        pack: the pack.
        null_space: the one its edits were made with, for its spectrum and the room left.
        title: plain text.

    Raises:
        ValueError: ``null_space`` is not the one that the pack was made with.
    """
    if null_space is not None:
        null_space = _belonging(pack, null_space)
    rows = _row_figures(pack)
    sections = [
        Section("Edits", _edits(pack, rows)),
        Section("How well they took", _taking(pack)),
        capacity_section(pack, rows, null_space),
        key_section(pack, rows),
        null_space_section(pack, null_space),
        Section("Where it comes from", _origin(pack)),
        Section("How to load it", _use(pack)),
    ]
    return page(title, sections, _lead(pack))


def _belonging(pack: PackValue, null_space: NullSpace) -> NullSpace:
    """The null space at the pack's threshold.

    Raises:
        ValueError: it is another one, or the pack was made with MEMIT.
    """
    made = pack.null_space
    if made is None or not pack.rows_are_keys:
        raise ValueError(
            f"this pack (objective={pack.config.objective!r}) does not say which null space its "
            "rows come from; leave the null space out"
        )
    threshold, mode = made.get("threshold"), made.get("mode")
    if threshold is not None and (threshold, mode) != (
        null_space.threshold,
        null_space.threshold_mode,
    ):
        null_space = null_space.with_threshold(threshold, mode)
    if null_space.digest() != made.get("digest"):
        raise ValueError(
            f"this null space has digest {null_space.digest()}, and the pack was made with "
            f"{made.get('digest')}; give that one, or leave the null space out"
        )
    return null_space


def _row_figures(pack: PackValue) -> dict[str, RowFigures]:
    """By module; none where the rows are mixtures of keys."""
    if not pack.rank or (pack.compression is not None and pack.compression.mixed):
        return {}
    return {module: row_figures(delta) for module, delta in pack.factors.items()}


def _lead(pack: PackValue) -> str:
    count = len(pack.edits)
    changes = f"changes {count:,} fact{'' if count == 1 else 's'}" if count else "changes nothing"
    return (
        f"This adapter {changes} that the language model {base_name(pack)} tells. It was made by "
        "AlphaEdit, which keeps updates out of the directions that other knowledge uses, and it "
        "loads as a LoRA."
    )


def _edits(pack: PackValue, rows: Mapping[str, RowFigures]) -> Markup:
    overview = facts(
        [
            ("Base model", base_name(pack)),
            ("Edits", f"{len(pack.edits):,}"),
            ("Batches", len(pack.batches)),
            ("Layers", ", ".join(map(str, pack.layers)) or "none"),
            ("Rank", f"{pack.rank:,}"),
            ("Factors", f"{_size(pack.size_bytes)}, {str(pack.dtype).removeprefix('torch.')}"),
        ]
    )
    if not pack.records:
        return Markup(overview + paragraph("No edit has been made yet."))
    shared = _in_common(rows) if pack.rows_are_keys else {}
    known_before = any(record.edit.target_true for record in pack.records)
    others = any(record.role != "own" for record in pack.records)
    columns = ["prompt", *(["old target"] if known_before else []), "new target"]
    columns += ["P before", "P after", ">batch", ">row"]
    columns += [">in common"] if shared else []
    columns += [*(["role"] if others else []), "id"]
    cells = (
        [
            _prompt(record),
            *([record.edit.target_true] if known_before else []),
            Markup(f"<strong>{escaped(record.edit.target_new.strip())}</strong>"),
            gauge(record.probability_before),
            gauge(record.probability_after),
            record.batch,
            record.row,
            *([_percent(shared.get(record.row))] if shared else []),
            *([record.role] if others else []),
            Markup(f"<code>{escaped(record.edit.id)}</code>"),
        ]
        for record in pack.records
    )
    notes = (
        "P is the probability of the new target, before the edit's batch and right after it. Edits "
        "about one subject may share a row of the factors."
    )
    if shared:
        notes += (
            " In common: how much of the row's direction the other rows span, in the layer where "
            "that is most; so much of the edit would stay if it were removed without the model."
        )
    found = table(columns, cells, search="Find an edit")
    return Markup(overview + found + f'<p class="quiet">{escaped(notes)}</p>')


def _prompt(record: EditRecord) -> Markup:
    """The filled prompt, its subject in italics."""
    start, end = record.edit.subject_span
    text = record.edit.question
    return Markup(
        f"{escaped(text[:start])}<em>{escaped(text[start:end])}</em>{escaped(text[end:])}"
    )


def _in_common(rows: Mapping[str, RowFigures]) -> dict[int, float]:
    """The share of each row that the others span, in the layer where it is largest."""
    every = [figures.in_common.tolist() for figures in rows.values()]
    return {row: max(shares) for row, shares in enumerate(zip(*every, strict=True))}


def _taking(pack: PackValue) -> Markup:
    own = [record for record in pack.records if record.role == "own"]
    series = {}
    sentences = []
    for name, values in (
        ("before", [record.probability_before for record in own]),
        ("after", [record.probability_after for record in own]),
    ):
        found = sorted(value for value in values if value is not None)
        if found:
            series[name] = _spread(found)
            sentences.append(f"{median(found):.3f} {name} (lowest {found[0]:.3f})")
    if not series:
        return paragraph("The new targets' probabilities were not measured.")
    measured = sum(record.probability_after is not None for record in own)
    text = (
        f"The median probability of the new targets was {' and '.join(sentences)}; {measured:,} of "
        f"{len(own):,} edits were measured, each right after its batch."
    )
    chart = line_chart(
        "Probability of the new target, edits in order of it",
        series,
        x_label="share of the edits, %",
        y_range=(0.0, 1.0),
    )
    return Markup(paragraph(text) + side_by_side([chart]))


def _spread(values: list[float]) -> list[tuple[float, float]]:
    """Values in order, evenly over 0..100."""
    if len(values) == 1:
        return [(50.0, values[0])]
    return [(100 * i / (len(values) - 1), value) for i, value in enumerate(values)]


def _origin(pack: PackValue) -> Markup:
    pairs: list[tuple[str, object]] = [("Base model", base_name(pack))]
    if pack.base is not None:
        shape = ", ".join(f"{name} {value}" for name, value in sorted(pack.base.shape.items()))
        pairs += [("Fingerprint", f"{(pack.base.digest or 'not verifiable')[:32]} ({shape})")]
    if pack.compression is not None:
        pairs.append(("Compressed", str(pack.compression)))
    pairs += [(f"Version of {name}", value) for name, value in sorted(pack.versions.items())]
    parents = [Markup(f"<li>{escaped(parent_in_words(parent))}</li>") for parent in pack.parents]
    listed = f"<ul>{''.join(parents)}</ul>" if parents else ""
    above = "<h3>Made from other packs</h3>" if parents else ""
    reasons = [(d.get("name"), d.get("value"), d.get("reason")) for d in pack.decisions]
    if reasons:
        chosen = table(["setting", "value", "reason"], reasons)
        listed += f"<h3>Settings chosen by measurement</h3>{chosen}"
    contexts = [Markup(f"<li>{escaped(text or 'none')}</li>") for text in pack.contexts]
    settings = [
        (name, _setting(value))
        for name, value in sorted(pack.config.to_json().items())
        if value is not None and name != "base_model_name_or_path"
    ]
    return Markup(
        table(["what", "value"], pairs)
        + above
        + listed
        + f"<details><summary>{len(contexts)} texts put before the prompts</summary>"
        + f"<ol>{''.join(contexts)}</ol></details>"
        + "<details><summary>All settings</summary>"
        + table(["setting", "value"], settings)
        + "</details>"
    )


def _use(pack: PackValue) -> Markup:
    below = stands_on(pack)
    mixed = pack.compression is not None and pack.compression.mixed
    code = _USE.format(
        loading=loading_code(pack.config.base_model_name_or_path),
        code=loading(PLACE, "", below),
        purpose="to look at the edits" if mixed else "to go on editing, take edits back, merge",
    )
    more = ""
    if below:
        listed = "; ".join(
            f"parent {i} is {parent_in_words({**parent, 'operation': 'the pack'})}"
            for i, parent in enumerate(below, start=1)
        )
        more = paragraph(
            "It was made on top of other packs and acts as it was made only beside them, so these "
            f"are loaded first: {listed}."
        )
    return Markup(more + source(code))


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
