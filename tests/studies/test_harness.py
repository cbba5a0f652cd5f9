"""General ability: a local task run by lm-evaluation-harness on a live edited model."""

from __future__ import annotations

import json
import sys

import pytest

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.studies.harness import ability_table, general_ability


@pytest.fixture
def task(tmp_path):
    """Twelve questions about the embedded world, each with four answers, as a task file."""
    records = embedded.records()[0:72:6]
    answers = [r["requested_rewrite"]["target_true"]["str"] for r in records]
    wrong = sorted(set(answers) | {r["requested_rewrite"]["target_new"]["str"] for r in records})
    lines = []
    for record, answer in zip(records, answers, strict=True):
        wanted = record["requested_rewrite"]
        new = wanted["target_new"]["str"]
        choices = [answer, new, *[w for w in wrong if w not in (answer, new)][:2]]
        question = wanted["prompt"].replace("{}", wanted["subject"])
        lines.append({"question": question, "choices": choices, "gold": 0})
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = {
        "task": "embedded_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "facts.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(config))
    return path, records


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_edited_fact_is_the_one_that_a_task_misses(task, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", exc_type=ImportError)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path, records = task
    base, tokenizer = embedded.load()
    base.train()
    before = general_ability(base, tokenizer, [path])
    assert base.training
    assert before["embedded_facts"]["acc"] == 1.0
    config = AlphaEditConfig(contexts=["It is so."])
    space = NullSpace.identity({0: 1024, 1: 1024})
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    wanted = records[0]["requested_rewrite"]
    target = wanted["target_new"]["str"]
    report = model.edit([Edit(wanted["subject"], wanted["prompt"], target)], progress=False)
    assert report.made[0].likeliest
    after = general_ability(model, tokenizer, [path])
    assert after["embedded_facts"]["acc"] == pytest.approx(11 / 12)
    with model.disable_adapter():
        assert general_ability(model, tokenizer, [path]) == before
    assert "embedded_facts  acc" in ability_table(before, after)


def test_two_findings_stand_side_by_side():
    before = {"sst2": {"acc": 0.5, "acc_stderr": 0.1}}
    after = {"sst2": {"acc": 0.25, "acc_stderr": 0.2}}
    head, row = ability_table(before, after).splitlines()
    assert head.split()[:5] == ["task", "metric", "before", "after", "change"]
    assert row.split() == ["sst2", "acc", "0.500", "0.250", "-0.250", "0.200"]
    with pytest.raises(ValueError, match=r"\['sst2'\] and \['rte'\] differ"):
        ability_table(before, {"rte": {}})


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install alphaedit_peft\[lm-eval\]"):
        general_ability(None, None, ["sst2"])


@pytest.mark.parametrize("tasks", [[], "sst2"])
def test_tasks_are_a_list(tasks):
    with pytest.raises(ValueError, match="tasks="):
        general_ability(None, None, tasks)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", "{", "a.json: it cannot be read as json"),
        ("a.yaml", "a: [", "a.yaml: it cannot be read as yaml"),
        ("a.yaml", "a: 1", "a.yaml is no task's config"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=named):
        general_ability(None, None, [tmp_path / name])


def test_a_task_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        general_ability(None, None, [tmp_path / "none.yaml"])
