"""Datasets of edits, read into cases: CounterFact, zsRE, KnowEdit, and this package's own JSONL.

In: a file, a dataset's name with its split, or records at hand. Out: cases and a report. Reading
is strict: a field that is missing or wrong raises an error that names file, record and field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.cases import Case
from alphaedit_peft.evaluation.data.counterfact import (
    counterfact_case,
    is_counterfact,
    read_snippets,
)
from alphaedit_peft.evaluation.data.knowedit import is_knowedit, knowedit_case
from alphaedit_peft.evaluation.data.own import is_own, own_case
from alphaedit_peft.evaluation.data.records import DataError, DataReport, Record, raw_records, sift
from alphaedit_peft.evaluation.data.zsre import is_zsre, zsre_case

__all__ = ["LAYOUTS", "DataError", "DataReport", "read_cases"]

LAYOUTS = {
    "counterfact": is_counterfact,
    "zsre": is_zsre,
    "own": is_own,
    "knowedit": is_knowedit,
}


def read_cases(
    source: str | Path | Iterable[Mapping[str, Any]],
    layout: str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    target: str = "answers",
    snippets: str | Path | None = None,
) -> tuple[tuple[Case, ...], DataReport]:
    """Read a dataset of edits.

    Args:
        source: a JSON or JSON Lines file; the name of a dataset for ``datasets.load_dataset``;
            or records at hand, such as ``embedded.records()``.
        layout: ``counterfact`` (also multi_counterfact), ``zsre``, ``knowedit`` or ``own``; taken
            from the first record where not given.
        split: of a dataset; a file has none.
        limit: read this many records at most.
        target: for zsRE, which answer to teach: ``answers`` or ``alt``.
        snippets: for CounterFact, a file in the layout of ``attribute_snippets.json``.

    Returns:
        The cases, without repeated edits, and what was found.

    Raises:
        DataError: a record that is not what the layout says, or none at all.
        ValueError: an unknown layout or target.
        FileNotFoundError: no such file.
        ImportError: a dataset, without ``datasets`` installed.
    """
    name, values = raw_records(source, split)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} reads nothing; use 1 or more, or None for all")
    records = [Record.of(entry, name, number) for number, entry in enumerate(values[:limit])]
    if not records:
        raise DataError(f"{name} holds no record")
    layout = layout or _layout_of(records[0])
    read = _reader(layout, target, snippets)
    return sift(name, layout, [read(record) for record in records])


def _layout_of(record: Record) -> str:
    for layout, fits in LAYOUTS.items():
        if fits(record):
            return layout
    raise DataError(
        f"{record.source}, record {record.number} has the fields {sorted(record.values)}, which "
        f"fit no layout of {sorted(LAYOUTS)}; say which it is (layout=...)"
    )


def _reader(layout: str, target: str, snippets: str | Path | None) -> Callable[[Record], Case]:
    if snippets is not None and layout != "counterfact":
        raise ValueError(f"snippets={str(snippets)!r} belong to CounterFact, not to {layout}")
    readers: dict[str, Callable[[Record], Case]] = {
        "counterfact": counterfact_case,
        "zsre": partial(zsre_case, target=target),
        "knowedit": knowedit_case,
        "own": own_case,
    }
    if layout not in readers:
        raise ValueError(f"layout={layout!r} is unknown; use one of {sorted(readers)}")
    if snippets is not None:
        return partial(counterfact_case, snippets=read_snippets(snippets))
    return readers[layout]
