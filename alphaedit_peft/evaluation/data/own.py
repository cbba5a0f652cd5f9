"""This package's own records: an edit's fields, with what to ask about it beside them.

In: records as ``edits.read_edits`` reads them, with the optional fields of a case. Out: cases.
A line can be as short as an edit; ``paraphrases`` and ``neighborhood`` are fields of an edit too.
"""

from __future__ import annotations

from dataclasses import fields, replace

from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.records import Record

TEXTS = ("generation", "references")
QUESTIONS = ("locality", "same_subject", "portability")


def is_own(record: Record) -> bool:
    """Whether a record looks like an edit of this package."""
    prompt = record.values.get("prompt")
    return isinstance(prompt, str) and "{}" in prompt and "target_new" in record.values


def own_case(record: Record) -> Case:
    """The case of one record.

    Args:
        record: the fields of :class:`Edit`, and those of :class:`Case`. ``locality``,
            ``same_subject``, ``portability`` hold objects with ``prompt``, ``answer`` and
            optional ``aliases``; so may ``neighborhood``, whose entries may also be prompts alone,
            whose answer is then ``target_true``.

    Raises:
        DataError: a field that is missing, wrong or unknown.
    """
    names = tuple(field.name for field in fields(Edit))
    record.allow(*names, *TEXTS, *QUESTIONS)
    neighborhood = _neighborhood(record)
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
        locality=_questions(record, "locality"),
        same_subject=_questions(record, "same_subject"),
        portability=_questions(record, "portability"),
    )


def _neighborhood(record: Record) -> tuple[Question, ...]:
    given = record.values.get("neighborhood") or ()
    if isinstance(given, (list, tuple)) and all(isinstance(entry, str) for entry in given):
        prompts = record.texts("neighborhood")
        return tuple(Question(prompt, record.text("target_true")) for prompt in prompts)
    return _questions(record, "neighborhood")


def _questions(record: Record, field: str) -> tuple[Question, ...]:
    found = []
    for entry in record.records(field):
        entry.allow("prompt", "answer", "aliases")
        found.append(Question(entry.text("prompt"), entry.text("answer"), entry.texts("aliases")))
    return tuple(found)
