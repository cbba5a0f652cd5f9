"""KnowEdit records: wiki_recent, wiki_counterfact and its zsRE.

In: records with ``subject``, ``prompt``, ``target_new``, ``portability``, ``locality``. Out: cases.
Answers may be texts, lists of aliases, or lists of such lists; the first is the answer, the others
are its aliases. Locality prompts that name the subject ask for other facts of it.
"""

from __future__ import annotations

from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.records import Record


def is_knowedit(record: Record) -> bool:
    """Whether a record looks like KnowEdit's."""
    whole = "{}" not in str(record.values.get("prompt"))
    return {"subject", "prompt", "target_new"} <= set(record.values) and whole


def knowedit_case(record: Record) -> Case:
    """The case of one record.

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
    locality = _questions(record, "locality")
    field = next((f for f in ("rephrase", "rephrase_prompt") if record.has(f)), None)
    return Case(
        edit=edit,
        paraphrases=record.alternatives(field) if field else (),
        locality=tuple(q for q in locality if subject not in q.prompt),
        same_subject=tuple(q for q in locality if subject in q.prompt),
        portability=_questions(record, "portability"),
    )


def _questions(record: Record, field: str) -> tuple[Question, ...]:
    if not record.has(field):
        return ()
    kinds = record.record(field)
    entries = [entry for kind in kinds.values if kinds.has(kind) for entry in kinds.records(kind)]
    return tuple(question for entry in entries for question in _entry(entry))


def _entry(entry: Record) -> tuple[Question, ...]:
    """A prompt and its answers; prompts without any answer (there are some) ask nothing."""
    if entry.has("ground_truth") and not _filled(entry.values["ground_truth"]):
        return ()
    answers = entry.alternatives("ground_truth")
    return (Question(entry.text("prompt"), answers[0], answers[1:]),)


def _filled(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_filled(entry) for entry in value)
    return not isinstance(value, str) or bool(value.strip())
