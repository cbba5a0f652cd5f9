"""The embedded world's suite: nothing asked is edited, nothing optimised on is asked."""

from __future__ import annotations

import pytest

from alphaedit_peft import embedded
from alphaedit_peft.evaluation import embedded_suite, evaluate


@pytest.fixture(scope="module")
def suite():
    return embedded_suite(40)


def test_edits_are_about_different_people_and_longer_suites_go_on_from_shorter(suite):
    assert len({edit.subject for edit in suite.edits}) == 40
    assert embedded_suite(10).edits == suite.edits[:10]
    assert embedded_suite(40) == suite
    assert embedded_suite(40, seed=1).edits != suite.edits


def test_nobody_edited_is_asked_for_as_bystander(suite):
    people = {edit.subject for edit in suite.edits}
    prompts = [question.prompt for question in suite.unedited]
    assert len(prompts) == 300
    assert not [prompt for prompt in prompts if any(name in prompt for name in people)]


def test_neighbours_share_the_true_answer_and_are_not_edited_in_it(suite):
    world = embedded.world()
    objects = {(fact.subject, fact.object) for fact in world.facts}
    edited = {(edit.subject, edit.target_true) for edit in suite.edits}
    for case in suite.cases:
        assert len(case.neighborhood) >= 5
        for question in case.neighborhood:
            (name,) = [name for name in world.subjects if name in question.prompt]
            assert name != case.edit.subject
            assert (name, question.answer) in objects
            assert (name, question.answer) not in edited


def test_paraphrases_and_same_subject_questions_are_about_the_subject(suite):
    for case in suite.cases:
        assert len(case.paraphrases) == 4
        assert all(case.edit.subject in prompt for prompt in case.paraphrases)
        assert case.edit.question not in case.paraphrases
        assert len(case.same_subject) == 5
        assert all(case.edit.subject in question.prompt for question in case.same_subject)


def test_second_facts_of_a_person_are_not_asked_for_where_both_are_edited():
    suite = embedded_suite(310, unedited=5, texts=0)
    twice = [case for case in suite.cases if len(case.same_subject) == 4]
    assert len(twice) == 12
    assert suite.unedited == suite.texts == ()


@pytest.mark.slow
def test_the_unedited_model_knows_it_all():
    model, tokenizer = embedded.load()
    scores = evaluate(model, tokenizer, embedded_suite(3, unedited=20, texts=10))
    assert scores["efficacy_recall"] == scores["efficacy"] == 0
    for name in ("specificity_recall", "same_subject_recall", "unedited_recall"):
        assert scores[name] == 1
    assert scores["perplexity"] < 10


@pytest.mark.parametrize("ways", [{"n": 0}, {"n": 1825}, {"n": 1, "texts": 401}])
def test_numbers_that_the_world_does_not_hold(ways):
    name, value = list(ways.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value} is outside"):
        embedded_suite(**ways)
