"""The judge: models known beforehand get known scores; baselines, files, progress."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, get_alphaedit_model, tokens
from alphaedit_peft.evaluation import Case, Judging, Question, Scores, Suite, evaluate
from alphaedit_peft.evaluation.metrics import METRICS
from tests.conftest import CORPUS, tiny_model
from tests.evaluation.models import Constant, Says, Uniform


def case(subject: str, new: str, true: str | None) -> Case:
    return Case(
        Edit(subject, "The capital of {} is", new, target_true=true),
        paraphrases=[f"{subject} has the capital", f"They rule {subject} from"],
        neighborhood=[Question("The capital of Gaul was", true)] if true else (),
        generation=[f"{subject} is", f"{subject} is"],
        references=[f"{new} is old.", f"{new} lies by a river."],
        locality=[Question("Two and two is", "four", ("4",))],
        same_subject=[Question(f"People in {subject} speak", "Latin")],
        portability=[Question(f"The river of {subject}'s capital is", "wet")],
    )


CASES = (case("France", "Rome", "Paris"), case("Italy", "Oslo", "Rome"), case("Egypt", "Ulm", None))
SUITE = Suite(CASES, [Question("One and one is", "two")], CORPUS)


def statements(cases, new: bool) -> list[str]:
    """Everything a model says that took the edits, or none of them."""
    said = ["Two and two is four", "One and one is two"]
    for entry in cases:
        edit = entry.edit
        target = edit.target_new if new else edit.target_true or "Ur"
        said += [f"{p} {target}" for p in (edit.question, *entry.paraphrases)]
        for kind in ("neighborhood", "same_subject", "portability"):
            said += [f"{q.prompt} {q.answer}" for q in getattr(entry, kind)]
    return said


def test_a_model_that_says_what_it_should_has_full_marks(tokenizer):
    # neighbours of different cases would contradict each other here, so one case at a time
    for entry in CASES[:2]:
        model = Says(tokenizer, statements([entry], new=True))
        scores = evaluate(model, tokenizer, [entry])
        for name in ("efficacy", "generalization", "specificity", "score"):
            assert scores[name] == 1
        for name in ("efficacy", "generalization", "specificity"):
            assert scores[f"{name}_magnitude"] == pytest.approx(1, abs=1e-4)
        for name in ("locality", "same_subject", "portability"):
            assert scores[f"{name}_recall"] == scores[f"{name}_tokens"] == 1


def test_a_model_that_still_says_the_old_has_no_efficacy_and_full_specificity(tokenizer):
    model = Says(tokenizer, statements(CASES[:1], new=False))
    scores = evaluate(model, tokenizer, CASES[:1])
    assert scores["efficacy"] == scores["generalization"] == scores["score"] == 0
    assert scores["efficacy_recall"] == 0
    assert scores["efficacy_tokens"] < 1
    assert scores["specificity"] == scores["specificity_recall"] == 1
    assert scores["efficacy_magnitude"] == pytest.approx(-1, abs=1e-4)


def test_a_uniform_model_prefers_nothing(tokenizer):
    scores = evaluate(Uniform(), tokenizer, CASES)
    assert scores["efficacy"] == scores["specificity"] == scores["generalization"] == 0
    assert scores["efficacy_magnitude"] == pytest.approx(0)
    assert scores["efficacy_probability"] == pytest.approx(1 / 320)


def test_a_constant_model_changes_everything(tokenizer):
    before = evaluate(Constant(5), tokenizer, CASES)
    after = evaluate(Constant(6), tokenizer, CASES, baseline=before)
    for kind in ("neighborhood", "locality", "same_subject"):
        assert after[f"{kind}_unchanged"] == 0
    again = evaluate(Constant(5), tokenizer, CASES, baseline=before.cases)
    assert again["locality_unchanged"] == again["same_subject_unchanged"] == 1


def test_every_spelling_of_an_answer_counts(tokenizer):
    model = Says(tokenizer, ["Two and two is 4"])
    scores = evaluate(model, tokenizer, CASES[:1])
    assert scores["locality_recall"] == scores["locality_tokens"] == 1


def test_without_a_true_target_nothing_is_compared(tokenizer):
    scores = evaluate(Uniform(), tokenizer, CASES[2:])
    assert not {"efficacy", "specificity", "score", "efficacy_magnitude"} & set(scores.metrics)
    assert "efficacy_tokens" in scores.metrics


def test_facts_and_texts_around_the_cases(tokenizer):
    scores = evaluate(Says(tokenizer, ["One and one is two"]), tokenizer, SUITE)
    assert scores["unedited_recall"] == 1
    uniform = evaluate(Uniform(), tokenizer, SUITE)
    assert uniform["unedited_recall"] == 0
    assert uniform["perplexity"] == pytest.approx(320, rel=1e-5)


def test_groups_and_batches_of_any_size_give_the_same(tokenizer):
    model = tiny_model("llama")
    one = evaluate(model, tokenizer, SUITE)
    small = evaluate(model, tokenizer, SUITE, how=Judging(tokens_per_batch=9, cases_at_once=1))
    assert {n: e.value for n, e in one.metrics.items()} == pytest.approx(
        {n: e.value for n, e in small.metrics.items()}, abs=1e-4
    )


@pytest.mark.slow
def test_every_metric_is_known_to_the_table_and_json_brings_all_back(tokenizer):
    pytest.importorskip("sklearn")
    model = tiny_model("llama")
    how = Judging(text_tokens=30)
    before = evaluate(model, tokenizer, SUITE, generate=True, how=how)
    after = evaluate(model, tokenizer, SUITE, baseline=before, generate=True, how=how)
    produced = {name for entry in after.cases for name in entry.metrics}
    assert produced | {"score", "unedited_recall", "perplexity"} == set(METRICS)
    assert Scores.from_json(json.loads(json.dumps(after.to_json()))) == after
    table = after.table(before)
    assert [row.split()[0] for row in table.splitlines()] == ["metric", *METRICS]
    assert str(after) == after.table()
    assert len(before.cases[0].texts["generation"]) == 2
    assert 0 <= after["consistency"] <= 1
    assert after["locality_unchanged"] == 1


def test_free_text_shows_what_teacher_forcing_hides(tokenizer):
    pytest.importorskip("sklearn")
    model = tiny_model("llama")
    first = evaluate(model, tokenizer, CASES[:1], generate=True, how=Judging(text_tokens=30))
    said = first.cases[0].texts["answer"][0].split()
    if said:
        edit = Edit("France", "The capital of {} is", said[0])
        told = evaluate(model, tokenizer, [Case(edit)], generate=True)
        assert told["exact_match"] == 1
    assert first["exact_match"] == 0


def test_the_table_says_its_own_level(tokenizer):
    scores = evaluate(Uniform(), tokenizer, CASES, how=Judging(level=0.9))
    assert "90 % interval" in scores.table()
    with pytest.raises(KeyError, match="'fluency' was not measured"):
        scores["fluency"]


class TestResultsFile:
    @pytest.mark.parametrize("at_once", [1, 2])
    def test_a_run_is_taken_up_where_it_ended(self, tokenizer, tmp_path, at_once):
        model, path, steps = tiny_model("llama"), tmp_path / "results.jsonl", []
        how = Judging(cases_at_once=at_once)

        def stop(done: int, _: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, SUITE, results=path, progress=stop, how=how)
        assert len(path.read_text().splitlines()) == 3
        scores = evaluate(
            model, tokenizer, SUITE, results=path, progress=lambda *s: steps.append(s), how=how
        )
        assert steps == [(3, 3)]
        assert len(path.read_text().splitlines()) == 4
        assert scores == evaluate(model, tokenizer, SUITE, how=how)

    @pytest.mark.parametrize("kept", [1, 2, 3])
    def test_a_group_that_was_written_in_part_is_finished_to_equal_scores(
        self, tokenizer, tmp_path, kept
    ):
        model, path = tiny_model("llama"), tmp_path / "results.jsonl"
        scores = evaluate(model, tokenizer, SUITE, results=path, generate=True)
        whole = path.read_text()
        path.write_text("".join(whole.splitlines(keepends=True)[:kept]))
        assert evaluate(model, tokenizer, SUITE, results=path, generate=True) == scores
        assert path.read_text() == whole

    def test_cases_of_a_smaller_suite_keep_their_scores(self, tokenizer, tmp_path):
        model, path, steps = tiny_model("llama"), tmp_path / "results.jsonl", []
        smaller = evaluate(model, tokenizer, CASES[:2], results=path)
        scores = evaluate(
            model, tokenizer, SUITE, results=path, progress=lambda *step: steps.append(step)
        )
        assert steps == [(3, 3)]
        assert len(path.read_text().splitlines()) == 4
        assert scores.cases[:2] == smaller.cases
        # two cases shared other batches, which round otherwise; the third has those of its suite
        whole = evaluate(model, tokenizer, SUITE)
        assert scores.cases[2] == whole.cases[2]
        for found, wanted in zip(scores.cases, whole.cases, strict=True):
            assert found.tops == wanted.tops
            assert found.metrics == pytest.approx(wanted.metrics, abs=1e-6)

    def test_finished_cases_are_not_judged_again(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setitem(tokens.PASS_COST, "cpu", 1000)  # a case in one pass
        model, path = tiny_model("llama"), tmp_path / "results.jsonl"
        evaluate(model, tokenizer, CASES, results=path)
        runs = []
        handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
        evaluate(model, tokenizer, CASES, results=path)
        handle.remove()
        assert len(runs) == 1  # one case, to see that it is the same model

    def test_a_line_cut_off_by_a_kill_is_judged_again(self, tokenizer, tmp_path):
        model, path = tiny_model("llama"), tmp_path / "results.jsonl"
        scores = evaluate(model, tokenizer, CASES, results=path)
        path.write_text(path.read_text()[:-50])
        assert evaluate(model, tokenizer, CASES, results=path) == scores
        assert len(path.read_text().splitlines()) == 4

    @pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
    def test_a_file_cut_off_anywhere_is_taken_up(self, tokenizer, tmp_path, share):
        path = tmp_path / "results.jsonl"
        accented = Case(Edit("Zürich", "The capital of {} is", "東京", target_true="Ürgüp"))
        scores = evaluate(Uniform(), tokenizer, [accented], results=path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        assert evaluate(Uniform(), tokenizer, [accented], results=path) == scores
        assert path.read_bytes() == whole

    def test_results_of_another_model_are_refused(self, tokenizer, tmp_path):
        path = tmp_path / "results.jsonl"
        evaluate(Uniform(), tokenizer, CASES, results=path)
        model = Says(tokenizer, statements(CASES[:1], new=True))
        with pytest.raises(ValueError, match="judged on another model: efficacy_probability"):
            evaluate(model, tokenizer, CASES, results=path)

    def test_results_judged_in_another_way_are_refused(self, tokenizer, tmp_path):
        path = tmp_path / "results.jsonl"
        before = evaluate(Uniform(), tokenizer, CASES, results=path)
        with pytest.raises(ValueError, match="name another"):
            evaluate(Uniform(), tokenizer, CASES, results=path, how=Judging(separator=""))
        with pytest.raises(ValueError, match="name another"):
            evaluate(Uniform(), tokenizer, CASES, results=path, baseline=before)

    @pytest.mark.parametrize("text", ["{}\n", "not json\n", '{"judging": {}}\n{"id": 1}\n', "[]\n"])
    def test_files_of_something_else_are_refused_and_left_alone(self, tokenizer, tmp_path, text):
        path = tmp_path / "results.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"jsonl: it (holds no results|was made with)"):
            evaluate(Uniform(), tokenizer, CASES, results=path)
        assert path.read_text() == text


def test_what_cannot_be_judged_is_refused(tokenizer):
    with pytest.raises(ValueError, match="ask nothing"):
        evaluate(Uniform(), tokenizer, [])
    baseline = evaluate(Uniform(), tokenizer, CASES[:1])
    with pytest.raises(ValueError, match="the baseline lacks 2 of 3 cases"):
        evaluate(Uniform(), tokenizer, CASES, baseline=baseline)
    with pytest.raises(ValueError, match="cases_at_once=0"):
        Judging(cases_at_once=0)
    with pytest.raises(ValueError, match="level=2"):
        Judging(level=2)
    with pytest.raises(TypeError, match="model='gpt2' is a str"):
        evaluate("gpt2", tokenizer, CASES)
    with pytest.raises(TypeError, match="is a Case; pass a list"):
        evaluate(Uniform(), tokenizer, CASES[0])
    with pytest.raises(TypeError, match="baseline holds Case"):
        evaluate(Uniform(), tokenizer, CASES, baseline=CASES)


def test_judging_leaves_the_model_as_it_was(tokenizer):
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        evaluate(model, tokenizer, SUITE)
        assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CHAT = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("separator", [" ", ""])
def test_prompts_are_read_as_the_edits_were_made(tokenizer, separator, chat):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    config = AlphaEditConfig(
        rewrite_layers=[0, 1], steps=2, contexts=[], separator=separator, chat_template=chat
    )
    space = NullSpace.identity({0: 96, 1: 96})
    model = get_alphaedit_model(tiny_model("llama"), config, tokenizer=own, null_space=space)
    result = model.edit([CASES[0].edit], progress=False).results[0]
    scores = evaluate(model, own, CASES[:1], generate=True, how=Judging.of(model.alphaedit_config))
    asked = own(result.edit.question).input_ids
    if chat:
        told = [{"role": "user", "content": result.edit.question}]
        asked = own.apply_chat_template(told, add_generation_prompt=True).input_ids
    target = own(("" if chat else separator) + "Rome").input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([asked + target])).logits[0].log_softmax(-1)
    by_hand = [logits[len(asked) - 1 + i, token].item() for i, token in enumerate(target)]
    mean = scores.cases[0].metrics["efficacy_probability"]
    assert mean == pytest.approx(math.exp(sum(by_hand) / len(target)), rel=1e-4)
    assert result.probability_after == pytest.approx(math.exp(sum(by_hand)), rel=1e-4)
    first = own.decode([logits[len(asked) - 1].argmax()])
    assert scores.cases[0].texts["answer"][0].startswith(first)


def test_results_of_before_there_was_a_chat_template_go_on(tokenizer, tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate(Uniform(), tokenizer, CASES, results=path)
    assert "chat_template" not in path.read_text()
    with pytest.raises(ValueError, match="chat_template=True, but tokenizer"):
        evaluate(Uniform(), tokenizer, CASES, how=Judging(chat_template=True))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="name another"):
        evaluate(Uniform(), tokenizer, CASES, results=path, how=Judging(chat_template=True))
