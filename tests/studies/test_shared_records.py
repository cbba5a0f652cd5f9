"""Real records, real models, end to end: CounterFact and zsRE in a sequence that goes on."""

from __future__ import annotations

import pytest

from alphaedit_peft import AlphaEditConfig, embedded
from alphaedit_peft.evaluation import Suite, facts_of, read_cases
from alphaedit_peft.studies import METHODS, Base, Schedule, Study, file_digest, sequential
from tests.shared import load_lm, wikitext


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.filterwarnings("ignore:.*tokens:UserWarning")
@pytest.mark.parametrize("name", ["counterfact-lm-7m", "stories260K-hf", "embedded"])
def test_records_are_edited_judged_and_read_again(shared_data, tmp_path, name):
    if name == "embedded":
        base, tokenizer = embedded.load()
        texts = embedded.texts(600)
    else:
        base, tokenizer = load_lm(shared_data / name)
        texts = wikitext(shared_data)[:200]
    config = AlphaEditConfig(steps=5, contexts=["It is so."], on_conflict="replace")
    ground = Base.from_texts(base, tokenizer, texts, config)
    for file, asked in (
        ("counterfact_600.json", ("efficacy", "generalization", "specificity")),
        ("zsre_eval_700.json", ("efficacy_tokens", "generalization_tokens", "locality_tokens")),
    ):
        cases, _ = read_cases(shared_data / file, limit=8)
        suite = Suite(cases[:3], facts_of(cases[3:]))
        data = {"name": file, "sha256": file_digest(shared_data / file)}
        study = Study(ground, suite, config, data=data)
        run = sequential(study, METHODS["alphaedit"], tmp_path / file, Schedule(2, 1))
        assert [checkpoint.edits for checkpoint in run.checkpoints] == [2, 3]
        assert set(asked) <= set(run.final.metrics)
        new, old = (x.metrics["efficacy_probability"].value for x in (run.final, run.before))
        assert new > old if name == "counterfact-lm-7m" else new != old
        said = []
        again = sequential(
            study, METHODS["alphaedit"], tmp_path / file, Schedule(2, 1), progress=said.append
        )
        assert again.to_json() == run.to_json()
        assert said == []
