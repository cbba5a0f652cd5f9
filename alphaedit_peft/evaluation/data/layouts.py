"""The layouts of datasets, each a row of ``LAYOUTS``: how it is known, how a record becomes a case.

In: a file, a dataset's name with its split, or records at hand. Out: cases and a report. Reading
is strict: a field that is missing or wrong raises an error that names file, record and field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.records import (
    DataError,
    DataReport,
    Record,
    raw_records,
    read_list,
    sift,
)

Snippets = Mapping[tuple[str, str], tuple[str, ...]]


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
    records = [Record(entry, name, number) for number, entry in enumerate(values[:limit])]
    if not records:
        raise DataError(f"{name} holds no record")
    layout = layout or _layout_of(records[0])
    if snippets is not None and layout != "counterfact":
        raise ValueError(f"snippets={str(snippets)!r} belong to CounterFact, not to {layout}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {sorted(LAYOUTS)}")
    read = LAYOUTS[layout][1]
    if layout == "zsre":
        read = partial(zsre_case, target=target)
    elif snippets is not None:
        read = partial(counterfact_case, snippets=read_snippets(snippets))
    return sift(name, layout, [read(record) for record in records])


def _layout_of(record: Record) -> str:
    for layout, (fits, _) in LAYOUTS.items():
        if fits(record):
            return layout
    raise DataError(
        f"{record.source}, record {record.number} has the fields {sorted(record.values)}, which "
        f"fit no layout of {sorted(LAYOUTS)}; say which it is (layout=...)"
    )


def counterfact_case(record: Record, snippets: Snippets | None = None) -> Case:
    """The case of a record of CounterFact or multi_counterfact, as ROME and MEMIT have them.

    Args:
        record: with ``requested_rewrite``, ``paraphrase_prompts``, ``neighborhood_prompts``,
            ``generation_prompts``; the ids of targets may be missing. ``attribute_prompts`` are
            left out: the metrics of the papers do not use them.
        snippets: reference texts by relation id and target id (``read_snippets``).

    Raises:
        DataError: a field that is missing or wrong.
    """
    rewrite = record.record("requested_rewrite")
    new, true = (rewrite.record(name) for name in ("target_new", "target_true"))
    try:
        edit = Edit(
            subject=rewrite.text("subject"),
            prompt=rewrite.text("prompt"),
            target_new=new.text("str"),
            target_true=true.text("str"),
        )
    except DataError:
        raise
    except ValueError as error:
        raise rewrite.error("prompt", f": {error}") from error
    references: tuple[str, ...] = ()
    if snippets is not None:
        key = (rewrite.text("relation_id"), new.text("id"))
        if key not in snippets:
            raise rewrite.error("target_new.id", f"={key[1]!r} has no snippets for {key[0]}")
        references = snippets[key]
    return Case(
        edit=edit,
        paraphrases=record.texts("paraphrase_prompts"),
        neighborhood=tuple(
            Question(prompt, true.text("str")) for prompt in record.texts("neighborhood_prompts")
        ),
        generation=record.texts("generation_prompts"),
        references=references,
    )


def read_snippets(path: str | Path) -> Snippets:
    """CounterFact's ``attribute_snippets.json``: texts by (relation id, target id).

    Raises:
        DataError: a file of another layout.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for number, values in enumerate(read_list(Path(path))):
        entry = Record(values, Path(path).name, number)
        texts = tuple(sample.text("text") for sample in entry.records("samples"))
        key = (entry.text("relation_id"), entry.text("target_id"))
        found[key] = found.get(key, ()) + texts
    return found


TARGETS = ("answers", "alt")
NQ = "nq question: "


def zsre_case(record: Record, target: str = "answers") -> Case:
    """The case of a record of zsRE, as in MEND's ``zsre_mend_eval.json``.

    Args:
        record: with ``subject``, ``src``, ``rephrase``, ``answers``, ``alt``, ``loc``, ``loc_ans``,
            and EasyEdit's ``portability`` where it is there.
        target: which field holds the new target: ``answers``, the right answer, which a model
            rarely knows (its first entry, as MEMIT and AlphaEdit do), or ``alt``, a wrong one, as
            MEND did; with ``alt``, ``answers`` gives the true target.

    Raises:
        DataError: a field that is missing or wrong.
        ValueError: another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not a field to learn from; use one of {TARGETS}")
    subject, answers = record.text("subject"), record.alternatives("answers")
    edit = Edit(
        subject=subject,
        prompt=record.prompt_with_slot("src", subject),
        target_new=record.text("alt") if target == "alt" else answers[0],
        target_true=answers[0] if target == "alt" else None,
    )
    paraphrase, asked = record.text("rephrase"), record.text("loc")
    # Natural Questions come without their question mark, which MEMIT adds
    asked += "?" if asked.startswith(NQ) and not asked.endswith("?") else ""
    locality = (Question(asked, record.text("loc_ans")),)
    portability: tuple[Question, ...] = ()
    # it follows from ``alt``
    if target == "alt" and record.has("portability"):
        found = record.record("portability")
        ways = found.alternatives("New Answer")
        portability = (Question(found.text("New Question"), ways[0], ways[1:]),)
    return Case(edit, (paraphrase,), locality=locality, portability=portability)


def _is_own(record: Record) -> bool:
    prompt = record.values.get("prompt")
    return isinstance(prompt, str) and "{}" in prompt and "target_new" in record.values


def own_case(record: Record) -> Case:
    """The case of one of this package's own records, as short as an edit where nothing is asked.

    Args:
        record: the fields of :class:`Edit`, and those of :class:`Case`. ``locality``,
            ``same_subject``, ``portability`` hold objects with ``prompt``, ``answer`` and
            optional ``aliases``; so may ``neighborhood``, whose entries may also be prompts alone,
            whose answer is then ``target_true``.

    Raises:
        DataError: a field that is missing, wrong or unknown.
    """
    names = tuple(field.name for field in fields(Edit))
    asked = ("locality", "same_subject", "portability")
    record.allow(*names, "generation", "references", *asked)
    near = record.values.get("neighborhood") or ()
    if isinstance(near, (list, tuple)) and all(isinstance(entry, str) for entry in near):
        prompts = record.texts("neighborhood")
        neighborhood = tuple(Question(prompt, record.text("target_true")) for prompt in prompts)
    else:
        neighborhood = _own_questions(record, "neighborhood")
    given = {name: record.values[name] for name in names if name in record.values}
    given |= {"neighborhood": [question.prompt for question in neighborhood]}
    try:
        edit = Edit.from_dict(given)
    except (TypeError, ValueError) as error:
        raise record.error("prompt", f": {error}") from error
    return Case(
        edit=replace(edit, paraphrases=(), neighborhood=()),
        paraphrases=record.texts("paraphrases"),
        neighborhood=neighborhood,
        generation=record.texts("generation"),
        references=record.texts("references"),
        **{field: _own_questions(record, field) for field in asked},
    )


def _own_questions(record: Record, field: str) -> tuple[Question, ...]:
    found = []
    for entry in record.records(field):
        entry.allow("prompt", "answer", "aliases")
        found.append(Question(entry.text("prompt"), entry.text("answer"), entry.texts("aliases")))
    return tuple(found)


def _is_knowedit(record: Record) -> bool:
    whole = "{}" not in str(record.values.get("prompt"))
    return {"subject", "prompt", "target_new"} <= set(record.values) and whole


def knowedit_case(record: Record) -> Case:
    """The case of a record of KnowEdit: wiki_recent, wiki_counterfact or its zsRE.

    Args:
        record: with ``subject``, ``prompt``, ``target_new``, ``portability``, ``locality``. Answers
            may be texts, lists of aliases, or lists of such lists; the first is the answer, the
            others are its aliases. Locality prompts that name the subject ask for other facts of
            it.

    Raises:
        DataError: a field that is missing or wrong.
    """
    subject = record.text("subject")
    edit = Edit(
        subject=subject,
        prompt=record.prompt_with_slot("prompt", subject),
        target_new=record.alternatives("target_new")[0],
        target_true=record.alternatives("ground_truth")[0] if record.has("ground_truth") else None,
    )
    locality = _knowedit_questions(record, "locality")
    field = next((f for f in ("rephrase", "rephrase_prompt") if record.has(f)), None)
    return Case(
        edit=edit,
        paraphrases=record.alternatives(field) if field else (),
        locality=tuple(q for q in locality if subject not in q.prompt),
        same_subject=tuple(q for q in locality if subject in q.prompt),
        portability=_knowedit_questions(record, "portability"),
    )


def _knowedit_questions(record: Record, field: str) -> tuple[Question, ...]:
    """Prompts and their answers; those without any answer (there are some) ask nothing."""
    if not record.has(field):
        return ()
    kinds = record.record(field)
    found = []
    for entry in (entry for kind in kinds.values for entry in kinds.records(kind)):
        if not entry.has("ground_truth") or _filled(entry.values["ground_truth"]):
            answers = entry.alternatives("ground_truth")
            found.append(Question(entry.text("prompt"), answers[0], answers[1:]))
    return tuple(found)


def _filled(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_filled(entry) for entry in value)
    return not isinstance(value, str) or bool(value.strip())


# name -> (whether a record looks like it, the case of a record), the first that fits is taken
LAYOUTS: dict[str, tuple[Callable[[Record], bool], Callable[[Record], Case]]] = {
    "counterfact": (lambda record: "requested_rewrite" in record.values, counterfact_case),
    "zsre": (lambda record: {"src", "subject", "loc"} <= set(record.values), zsre_case),
    "own": (_is_own, own_case),
    "knowedit": (_is_knowedit, knowedit_case),
}
