"""Real records and a real small model that knows them; skipped where the shared data is absent."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft.evaluation import Suite, evaluate, facts_of, read_cases
from tests import shared

pytestmark = [pytest.mark.shared_data, pytest.mark.slow]


@pytest.fixture(scope="module")
def loaded(shared_data):
    return shared.load_lm(shared_data / "counterfact-lm-7m")


def test_all_records_are_read(shared_data):
    for name, count in (
        ("counterfact_600.json", 600),
        ("counterfact_original_7.json", 7),
        ("zsre_eval_700.json", 700),
    ):
        cases, report = read_cases(shared_data / name)
        assert len(cases) == report.kept == count
    assert len(report.shared_subjects) == 122
    assert sum(number for _, number in report.shared_subjects) == 331


def test_scores_are_those_of_the_published_way_of_counting(shared_data, loaded):
    """One prompt at a time, all logits, a mean over the target's tokens, as in the papers' code."""
    model, tokenizer = loaded
    cases, _ = read_cases(shared.counterfact(shared_data, "counterfact-lm-7m")[:4])
    scores = evaluate(model, tokenizer, cases)

    def mean_log_prob(prompt: str, target: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        rows = range(start - 1, ids.shape[1] - 1)
        return sum(log_probs[i, ids[0, i + 1]].item() for i in rows) / len(rows)

    for case, found in zip(cases, scores.cases, strict=True):
        new, true = case.edit.target_new, case.edit.target_true
        prompts = [question.prompt for question in case.neighborhood]
        kept = [mean_log_prob(p, true) > mean_log_prob(p, new) for p in prompts]
        told = [mean_log_prob(p, new) > mean_log_prob(p, true) for p in case.paraphrases]
        assert found.metrics["specificity"] == pytest.approx(sum(kept) / len(kept))
        assert found.metrics["generalization"] == pytest.approx(sum(told) / len(told))


def test_the_model_holds_to_what_it_was_trained_on(shared_data, loaded):
    model, tokenizer = loaded
    cases, _ = read_cases(shared.counterfact(shared_data, "counterfact-lm-7m")[:12])
    suite = Suite(cases[:6], facts_of(cases[6:]), shared.wikitext(shared_data)[:5])
    scores = evaluate(model, tokenizer, suite)
    assert scores["efficacy"] == 0
    assert scores["specificity"] > 0.8
    assert scores["unedited_recall"] > 0.3
    assert scores["perplexity"] < 120


def test_zsre_records_are_judged_by_tokens(shared_data, loaded):
    model, tokenizer = loaded
    cases, _ = read_cases(shared_data / "zsre_eval_700.json", limit=3)
    before = evaluate(model, tokenizer, cases)
    scores = evaluate(model, tokenizer, cases, baseline=before)
    assert scores["locality_unchanged"] == 1
    assert 0 <= scores["locality_tokens"] <= 1
    assert "efficacy" not in scores.metrics
