"""The page of a record: every prompt once, what should follow, and the answers given."""

from __future__ import annotations

import pytest

from alphaedit_peft import Edit
from alphaedit_peft.evaluation import Case, Question
from alphaedit_peft.report import Answer, ask, prompts_of, record_page
from tests.conftest import tiny_model
from tests.report.test_browser import BROWSER, browse  # noqa: F401
from tests.report.test_page import HOSTILE, Tags


def a_case(text="Paris"):
    return Case(
        Edit("Anna Smith", "{} was born in", text, "Rome"),
        paraphrases=("Anna Smith comes from",),
        neighborhood=(Question("Marie Curie was born in", "Rome"),),
        locality=(Question("nq question: who plays the violin?", "Anna"),),
        generation=("Anna Smith's city is", "Anna Smith's city is"),
    )


def test_every_prompt_is_there_once_with_what_should_follow():
    found = [(p.part, p.wanted, p.rival) for p in prompts_of(a_case())]
    assert found == [
        ("request", "Paris", "Rome"),
        ("paraphrase", "Paris", "Rome"),
        ("neighborhood", "Rome", "Paris"),
        ("locality", "Anna", None),
        ("generation", None, None),
    ]


def test_answers_are_what_the_model_says_greedily_and_how_probable_targets_are(tokenizer):
    model, prompts = tiny_model("gpt2"), prompts_of(a_case())
    found = ask(model, tokenizer, prompts, answer_tokens=2, text_tokens=5)
    assert len(found) == len(prompts)
    assert all(0 < a.wanted < 1 for a, p in zip(found, prompts, strict=True) if p.wanted)
    assert (found[3].rival, found[4].wanted) == (None, None)
    assert found[0].text != ""
    with pytest.raises(ValueError, match="answer_tokens=0"):
        ask(model, tokenizer, prompts, answer_tokens=0)


def test_the_page_shows_prompts_answers_and_probabilities():
    case = a_case()
    before = [Answer(f"said {i}", 0.25, 0.5) for i in range(5)]
    after = [Answer(f"then {i}", 0.75, 0.125) for i in range(5)]
    text = " ".join("".join(Tags(record_page(case, before, after)).text).split())
    for prompt in prompts_of(case):
        assert prompt.text in text
    for told in ("said 0", "then 4", "0.250", "0.750", "Paris, after", "12.5", "{} was born in"):
        assert told in text
    without = record_page(case)
    assert "P before" not in without
    assert "<svg" not in without


def test_answers_that_do_not_belong_are_refused():
    answers = [Answer("x", 0.1)] * 5
    with pytest.raises(ValueError, match="needs before"):
        record_page(a_case(), None, answers)
    with pytest.raises(ValueError, match="4 answers to 5 prompts"):
        record_page(a_case(), answers[:4])


def hostile_page():
    case = a_case(HOSTILE)
    answers = [Answer(HOSTILE, 0.5, float("nan")) for _ in prompts_of(case)]
    return record_page(case, answers, answers, title=HOSTILE, lead=HOSTILE)


def test_hostile_texts_stay_text():
    found = Tags(hostile_page())
    assert found.names.count("script") == 1
    assert "img" not in found.names
    assert not found.open


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_opens_in_a_browser_without_complaint(browse):  # noqa: F811
    dom, said = browse(hostile_page())
    assert said == ""
    assert dom.count("<script") == 1
