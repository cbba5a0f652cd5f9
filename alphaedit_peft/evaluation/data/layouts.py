"""The layouts of datasets, each a row of ``LAYOUTS``: what a record asks beside its edit.

In: a file, a dataset's name with its split, or records at hand. Out: cases and a report. Reading
is strict: a field that is missing or wrong raises an error that names file, record and field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from alphaedit_peft import edits
from alphaedit_peft.edits import CASE_FIELDS, Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.sources import DataReport, raw_records, sift
from alphaedit_peft.messages import shown
from alphaedit_peft.records import Record, read_records
from alphaedit_peft.text_files import fault

Snippets = Mapping[tuple[str, str], tuple[str, ...]]


def read_cases(
    source: str | Path | Iterable[Mapping[str, Any] | Record],
    layout: str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    target: str = "answers",
    snippets: str | Path | None = None,
) -> tuple[tuple[Case, ...], DataReport]:
    """Read a dataset of edits.

    Args:
        source: a file of JSON, JSON Lines or CSV; the name of a dataset for
            ``datasets.load_dataset``; or records at hand, such as ``embedded.records()``.
        layout: ``counterfact`` (also multi_counterfact), ``mquake``, ``zsre``, ``knowedit`` (also
            EasyEdit's requests) or ``own``; taken from the first record where not given.
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
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} reads nothing; use 1 or more, or None for all")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not a field to learn from; use one of {TARGETS}")
    name, records = raw_records(source, split, limit)
    if not records:
        raise fault(name, "there is no record in it", "give at least one")
    layout = layout or edits.layout_of(records[0])
    if layout is None:
        wrong = f"the fields {shown([*records[0].values], 150)} fit no layout of {[*LAYOUTS]}"
        raise fault(records[0].where, wrong, "say which it is (layout=...)")
    if snippets is not None and layout != "counterfact":
        raise ValueError(f"snippets={str(snippets)!r} belong to CounterFact, not to {layout}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={shown(layout)} is unknown; use one of {sorted(LAYOUTS)}")
    read: Callable[[Record], Case | tuple[Case, ...]] = LAYOUTS[layout]
    if layout == "zsre":
        read = partial(zsre_case, target=target)
    elif snippets is not None:
        read = partial(counterfact_case, snippets=read_snippets(snippets))
    return sift(name, layout, [read(record) for record in records])


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
    (edit,) = edits.rewrite_edits(record)
    rewrite = record.record("requested_rewrite")
    true = rewrite.record("target_true").text("str")
    references: tuple[str, ...] = ()
    if snippets is not None:
        key = (rewrite.text("relation_id"), rewrite.record("target_new").text("id"))
        if key not in snippets:
            wrong = f"={shown(key[1], 80)} has no snippets for {shown(key[0], 80)}"
            raise rewrite.error("target_new.id", wrong)
        references = snippets[key]
    return Case(
        edit=_alone(edit),
        paraphrases=edit.paraphrases,
        neighborhood=tuple(Question(prompt, true) for prompt in edit.neighborhood),
        generation=record.texts("generation_prompts"),
        references=references,
    )


def read_snippets(path: str | Path) -> Snippets:
    """CounterFact's ``attribute_snippets.json``: texts by (relation id, target id).

    Raises:
        DataError: a file of another layout.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for entry in read_records(path):
        texts = tuple(sample.text("text") for sample in entry.records("samples"))
        key = (entry.text("relation_id"), entry.text("target_id"))
        found[key] = found.get(key, ()) + texts
    return found


def mquake_cases(record: Record) -> tuple[Case, ...]:
    """The cases of a record of MQuAKE, one for each of its edits.

    Args:
        record: with ``requested_rewrite``, a list; ``questions``, which follow from all of its
            edits, with ``new_answer`` and ``new_answer_alias``, are asked with the last of them.

    Raises:
        DataError: a field that is missing or wrong.
    """
    *first, last = (Case(_alone(e), e.paraphrases) for e in edits.rewrite_edits(record))
    answers = record.alternatives("new_answer")
    if _filled(record.values.get("new_answer_alias", ())):
        answers += record.alternatives("new_answer_alias")
    follows = tuple(Question(q, answers[0], answers[1:]) for q in record.texts("questions"))
    return (*first, replace(last, portability=follows))


TARGETS = ("answers", "alt")
NQ = "nq question: "


def zsre_case(record: Record, target: str = "answers") -> Case:
    """The case of a record of zsRE, whose edit is ``edits.zsre_edit``.

    Args:
        record: with ``loc``, ``loc_ans``, and EasyEdit's ``portability`` where it is there.
        target: which field holds the new target.

    Raises:
        DataError: a field that is missing or wrong.
    """
    edit = edits.zsre_edit(record, target)
    asked = record.text("loc")
    # Natural Questions come without their question mark, which MEMIT adds
    asked += "?" if asked.startswith(NQ) and not asked.endswith("?") else ""
    locality = (Question(asked, record.text("loc_ans")),)
    portability: tuple[Question, ...] = ()
    # it follows from ``alt``
    if target == "alt" and record.has("portability"):
        found = record.record("portability")
        ways = found.alternatives("New Answer")
        portability = (Question(found.text("New Question"), ways[0], ways[1:]),)
    return Case(_alone(edit), edit.paraphrases, locality=locality, portability=portability)


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
    asked = ("locality", "same_subject", "portability")
    record.allow(*(field.name for field in fields(Edit)), *CASE_FIELDS)
    edit = edits.own_edit(record)
    near = record.values.get("neighborhood") or ()
    if isinstance(near, (list, tuple)) and all(isinstance(entry, str) for entry in near):
        prompts = record.texts("neighborhood")
        neighborhood = tuple(Question(prompt, record.text("target_true")) for prompt in prompts)
    else:
        neighborhood = _own_questions(record, "neighborhood")
    return Case(
        edit=_alone(edit),
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


def knowedit_case(record: Record) -> Case:
    """The case of a record of KnowEdit, or of EasyEdit's own requests.

    Args:
        record: as ``edits.easyedit_edit`` reads it; with ``portability`` and ``locality``, where
            they are there, or ``locality_prompt`` and ``locality_ground_truth``. The first of
            several answers is the answer, the others are its aliases. Locality prompts that name
            the subject ask for other facts of it.

    Raises:
        DataError: a field that is missing or wrong.
    """
    edit = edits.easyedit_edit(record)
    locality = _knowedit_questions(record, "locality")
    if record.has("locality_prompt"):
        asked, right = (
            record.alternatives(f"locality_{name}") for name in ("prompt", "ground_truth")
        )
        locality += tuple(Question(prompt, right[0], right[1:]) for prompt in asked[:1])
    return Case(
        edit=_alone(edit),
        paraphrases=edit.paraphrases,
        locality=tuple(q for q in locality if edit.subject not in q.prompt),
        same_subject=tuple(q for q in locality if edit.subject in q.prompt),
        portability=_knowedit_questions(record, "portability"),
    )


def _knowedit_questions(record: Record, field: str) -> tuple[Question, ...]:
    """Prompts and their answers; those without any answer (there are some) ask nothing."""
    if not record.has(field):
        return ()
    kinds = record.record(field)
    found = []
    for entry in (entry for kind in kinds.values for entry in _entries(kinds, kind)):
        if not entry.has("ground_truth") or _filled(entry.values["ground_truth"]):
            answers = entry.alternatives("ground_truth")
            found.append(Question(entry.text("prompt"), answers[0], answers[1:]))
    return tuple(found)


def _entries(kinds: Record, kind: str) -> tuple[Record, ...]:
    """A list of questions, as in KnowEdit, or EasyEdit's one object: of a question, or of lists."""
    if not isinstance(kinds.values[kind], Mapping):
        return kinds.records(kind)
    only = kinds.record(kind)
    prompts, answers = (only.values.get(name) for name in ("prompt", "ground_truth"))
    if not isinstance(prompts, (list, tuple)):
        return (only,)
    if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
        raise only.error("ground_truth", f"={shown(answers, 80)} has no answer for each prompt")
    return tuple(
        replace(only, values={"prompt": prompt, "ground_truth": answer})
        for prompt, answer in zip(prompts, answers, strict=True)
    )


def _filled(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_filled(entry) for entry in value)
    return not isinstance(value, str) or bool(value.strip())


def _alone(edit: Edit) -> Edit:
    """The edit without what its case asks in its own fields."""
    return replace(edit, paraphrases=(), neighborhood=())


# what a record is known by stands in edits.LAYOUTS
LAYOUTS: dict[str, Callable[[Record], Case | tuple[Case, ...]]] = {
    "counterfact": counterfact_case,
    "mquake": mquake_cases,
    "zsre": zsre_case,
    "own": own_case,
    "knowedit": knowedit_case,
}
