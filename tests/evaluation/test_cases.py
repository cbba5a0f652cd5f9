"""Cases and suites: what they refuse, when they are equal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alphaedit_peft import Edit
from alphaedit_peft.evaluation import Case, Question, Suite, facts_of

EDIT = Edit("France", "The capital of {} is", "Rome", target_true="Paris")
CASE = Case(EDIT, paraphrases=["France's capital is"], locality=[Question("I like", "tea")])


def test_a_digest_changes_with_anything_that_is_asked():
    changes = (
        {"paraphrases": ()},
        {"locality": (Question("I like", "wine"),)},
        {"portability": (Question("The mayor of France's capital is", "Gualtieri"),)},
        {"edit": replace(EDIT, target_new="Oslo", id="")},
    )
    digests = {CASE.digest, *(replace(CASE, **change).digest for change in changes)}
    assert len(digests) == 5
    assert replace(CASE).digest == CASE.digest


def test_lists_become_tuples_and_answers_come_once():
    assert CASE.paraphrases == ("France's capital is",)
    assert Question("p", "a", ["b", "a"]).answers == ("a", "b")


def test_facts_of_cases_are_what_was_true_before():
    unknown = Case(Edit("Italy", "{} is", "big"))
    assert facts_of([CASE, unknown]) == (Question("The capital of France is", "Paris"),)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"edit": "France"}, TypeError, "edit='France' is a str"),
        ({"paraphrases": "one text"}, TypeError, "paraphrases='one text' must be a list"),
        ({"generation": [3]}, TypeError, "generation=3 is a int"),
        ({"references": [" "]}, ValueError, "references=' ' is empty"),
        ({"locality": ["a prompt"]}, TypeError, "locality holds 'a prompt'"),
        ({"neighborhood": Question("a", "b")}, TypeError, "must be a list of Question"),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Case(**{"edit": EDIT, **fields})


@pytest.mark.parametrize("question", [("", "a"), ("p", " ")])
def test_empty_questions_are_refused(question):
    with pytest.raises(ValueError, match="is empty"):
        Question(*question)


@pytest.mark.parametrize(
    ("cases", "error", "message"),
    [
        ([], ValueError, r"cases=\[\] ask nothing"),
        ([CASE, CASE], ValueError, f"edit '{EDIT.id}' is there twice"),
        ([EDIT], TypeError, "each entry must be a Case"),
        (CASE, TypeError, "is a Case; pass a list of Case"),
    ],
)
def test_suites_without_distinct_cases_are_refused(cases, error, message):
    with pytest.raises(error, match=message):
        Suite(cases)
