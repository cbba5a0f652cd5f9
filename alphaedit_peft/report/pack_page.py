"""The page of a pack, for people: what it says, how well it took, how full it is, where it is from.

In: a pack, and its null space where it is at hand. Out: one self-contained HTML page. Everything on
it is read from the pack; no model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from alphaedit_peft.pack.card import PLACE, base_name, loading, loading_code
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.pack.parents import parent_in_words, stands_on
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

if TYPE_CHECKING:
    from alphaedit_peft.nullspace import NullSpace

_USE = """\
{loading}

# as any LoRA, with PEFT alone
{code.peft}

# or with alphaedit_peft, {purpose}
{code.own}"""


def pack_page(
    pack: PackContents, null_space: NullSpace | None = None, *, title: str = "Edit pack"
) -> str:
    """One HTML page that shows a pack to people; it needs no network and no other file.

    Args:
        null_space: the one its edits were made with, for its spectrum and the room left.

    Raises:
        ValueError: ``null_space`` is not the one that the pack was made with.
    """
    if null_space is not None:
        null_space = _belonging(pack, null_space)
    # rows that are mixtures of keys have no figures
    known = {} if pack.mixed or not pack.rank else pack.factors
    rows = {module: row_figures(delta) for module, delta in known.items()}
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


def _belonging(pack: PackContents, null_space: NullSpace) -> NullSpace:
    """The null space at the pack's threshold; ValueError where the pack was not made with it."""
    made = pack.null_space
    if made is None or not pack.rows_are_keys:
        raise ValueError(
            f"this pack (objective={pack.config.objective!r}) does not say which null space its "
            "rows come from; leave the null space out"
        )
    threshold, mode = made.get("threshold"), made.get("mode")
    given = null_space.threshold, null_space.threshold_mode
    if threshold is not None and (threshold, mode) != given:
        null_space = null_space.with_threshold(threshold, mode)
    if null_space.digest() != made.get("digest"):
        raise ValueError(
            f"this null space has digest {null_space.digest()}, and the pack was made with "
            f"{made.get('digest')}; give that one, or leave the null space out"
        )
    return null_space


def _lead(pack: PackContents) -> str:
    count = len(pack.edits)
    changes = f"changes {count:,} fact{'' if count == 1 else 's'}" if count else "changes nothing"
    return (
        f"This adapter {changes} that the language model {base_name(pack)} tells. It was made by "
        "AlphaEdit, which keeps updates out of the directions that other knowledge uses, and it "
        "loads as a LoRA."
    )


def _edits(pack: PackContents, rows: Mapping[str, RowFigures]) -> Markup:
    size, dtype = pack.size_bytes, str(pack.dtype).removeprefix("torch.")
    shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    overview = facts(
        [
            ("Base model", base_name(pack)),
            ("Edits", f"{len(pack.edits):,}"),
            ("Batches", len(pack.batches)),
            ("Layers", ", ".join(map(str, pack.layers)) or "none"),
            ("Rank", f"{pack.rank:,}"),
            ("Factors", f"{shown}, {dtype}"),
        ]
    )
    if not pack.records:
        return Markup(overview + paragraph("No edit has been made yet."))
    shared: dict[int, float] = {}
    if pack.rows_are_keys:  # how much of each row the others span, in the layer where most
        every = [figures.in_common.tolist() for figures in rows.values()]
        shared = {row: max(shares) for row, shares in enumerate(zip(*every, strict=True))}
    columns: list[tuple[str, bool, Callable[[EditRecord], object]]] = [
        ("prompt", True, _prompt),
        ("old target", any(r.edit.target_true for r in pack.records), lambda r: r.edit.target_true),
        ("new target", True, lambda r: _within("strong", r.edit.target_new.strip())),
        ("P before", True, lambda r: gauge(r.probability_before)),
        ("P after", True, lambda r: gauge(r.probability_after)),
        (">batch", True, lambda r: r.batch),
        (">row", True, lambda r: r.row),
        (">in common", bool(shared), lambda r: f"{shared[r.row]:.0%}" if r.row in shared else None),
        ("role", any(r.role != "own" for r in pack.records), lambda r: r.role),
        ("id", True, lambda r: _within("code", r.edit.id)),
    ]
    kept = [(name, show) for name, wanted, show in columns if wanted]
    cells = ([show(record) for _, show in kept] for record in pack.records)
    notes = (
        "P is the probability of the new target, before the edit's batch and right after it. Edits "
        "about one subject may share a row of the factors."
    )
    if shared:
        notes += (
            " In common: how much of the row's direction the other rows span, in the layer where "
            "that is most; so much of the edit would stay if it were removed without the model."
        )
    found = table([name for name, _ in kept], cells, search="Find an edit")
    return Markup(overview + found + f'<p class="quiet">{escaped(notes)}</p>')


def _prompt(record: EditRecord) -> Markup:
    """The filled prompt, its subject in italics."""
    start, end = record.edit.subject_span
    text = record.edit.question
    return Markup(escaped(text[:start]) + _within("em", text[start:end]) + escaped(text[end:]))


def _within(tag: str, text: str) -> Markup:
    return Markup(f"<{tag}>{escaped(text)}</{tag}>")


def _taking(pack: PackContents) -> Markup:
    own = [record for record in pack.records if record.role == "own"]
    series, sentences = {}, []
    for name in ("before", "after"):
        values = [getattr(record, f"probability_{name}") for record in own]
        if found := sorted(value for value in values if value is not None):
            # evenly over 0..100
            last = len(found) - 1
            series[name] = [(100 * i / last if last else 50.0, v) for i, v in enumerate(found)]
            sentences.append(f"{median(found):.3f} {name} (lowest {found[0]:.3f})")
    if not series:
        return paragraph("The new targets' probabilities were not measured.")
    measured = sum(record.probability_after is not None for record in own)
    text = (
        f"The median probability of the new targets was {' and '.join(sentences)}; {measured:,} of "
        f"{len(own):,} edits were measured, each right after its batch."
    )
    title, x_label = "Probability of the new target, edits in order of it", "share of the edits, %"
    chart = line_chart(title, series, x_label=x_label, y_range=(0.0, 1.0))
    return Markup(paragraph(text) + side_by_side([chart]))


def _origin(pack: PackContents) -> Markup:
    pairs: list[tuple[str, object]] = [("Base model", base_name(pack))]
    if pack.base is not None:
        shape = ", ".join(f"{name} {value}" for name, value in sorted(pack.base.shape.items()))
        pairs += [("Fingerprint", f"{(pack.base.digest or 'not verifiable')[:32]} ({shape})")]
    if pack.compression is not None:
        pairs.append(("Compressed", str(pack.compression)))
    pairs += [(f"Version of {name}", value) for name, value in sorted(pack.versions.items())]
    parents = "".join(_within("li", parent_in_words(parent)) for parent in pack.parents)
    listed = f"<h3>Made from other packs</h3><ul>{parents}</ul>" if parents else ""
    if pack.decisions:
        columns = ["setting", "value", "reason"]
        chosen = [(d.get("name"), d.get("value"), d.get("reason")) for d in pack.decisions]
        listed += f"<h3>Settings chosen by measurement</h3>{table(columns, chosen)}"
    contexts = "".join(_within("li", text or "none") for text in pack.contexts)
    settings = [
        (name, ", ".join(map(str, v if isinstance(v, (list, tuple)) else [v])))
        for name, v in sorted(pack.config.to_json().items())
        if v is not None and name != "base_model_name_or_path"
    ]
    hidden = [
        (f"{len(pack.contexts)} texts put before the prompts", f"<ol>{contexts}</ol>"),
        ("All settings", table(["setting", "value"], settings)),
    ]
    folded = (f"<details><summary>{name}</summary>{html}</details>" for name, html in hidden)
    return Markup(table(["what", "value"], pairs) + listed + "".join(folded))


def _use(pack: PackContents) -> Markup:
    below = stands_on(pack.parents)
    more = "to look at the edits" if pack.mixed else "to go on editing, take edits back, merge"
    start = loading_code(pack.config.base_model_name_or_path)
    code = _USE.format(loading=start, code=loading(PLACE, "", below), purpose=more)
    if not below:
        return source(code)
    listed = "; ".join(
        f"parent {i} is {parent_in_words({**parent, 'operation': 'the pack'})}"
        for i, parent in enumerate(below, start=1)
    )
    text = (
        "It was made on top of other packs and acts as it was made only beside them, so these "
        f"are loaded first: {listed}."
    )
    return Markup(paragraph(text) + source(code))
