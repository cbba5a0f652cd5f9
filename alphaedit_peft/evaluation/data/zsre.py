"""zsRE records in the layout of MEND's ``zsre_mend_eval.json``.

In: records with ``subject``, ``src``, ``rephrase``, ``answers``, ``alt``, ``loc``, ``loc_ans``.
Out: cases. The papers teach the right answer, ``answers[0]``, which the model rarely knows; MEND
taught ``alt``, a wrong one.
"""

from __future__ import annotations

from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.records import Record

TARGETS = ("answers", "alt")
NQ = "nq question: "


def is_zsre(record: Record) -> bool:
    """Whether a record looks like zsRE's."""
    return {"src", "subject", "loc"} <= set(record.values)


def zsre_case(record: Record, target: str = "answers") -> Case:
    """The case of one record.

    Args:
        record: in MEND's layout, with EasyEdit's ``portability`` where it is there.
        target: which field holds the new target: ``answers`` (its first entry, as MEMIT and
            AlphaEdit do) or ``alt``; with ``alt``, ``answers`` gives the true target.

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
    return Case(
        edit=edit,
        paraphrases=(record.text("rephrase"),),
        locality=(Question(_question(record.text("loc")), record.text("loc_ans")),),
        portability=_portability(record) if target == "alt" else (),
    )


def _question(loc: str) -> str:
    # Natural Questions come without their question mark, which MEMIT adds
    return loc + "?" if loc.startswith(NQ) and not loc.endswith("?") else loc


def _portability(record: Record) -> tuple[Question, ...]:
    """EasyEdit's questions follow from ``alt``; a relation alone (no question) is read past."""
    if not record.has("portability"):
        return ()
    found = record.record("portability")
    answers = found.alternatives("New Answer")
    return (Question(found.text("New Question"), answers[0], answers[1:]),)
