"""The demo: what it says is what was measured, in tables, in JSON and in its exit code."""

import json
from dataclasses import replace

import pytest

from alphaedit_peft import EditPack, NullSpace, read_edits
from alphaedit_peft.cli import demo_run
from alphaedit_peft.cli.demo_run import KINDS, Answer


@pytest.fixture
def findings(shown):
    return shown[1]


@pytest.fixture
def demo(run, monkeypatch, findings):
    """Run the command on findings that were made before, or on changed ones."""

    def runs(*words, found=findings, code=0):
        monkeypatch.setattr(demo_run, "demonstrate", lambda folder, tell: found)
        return run("demo", *words, code=code)

    return runs


def test_the_base_is_restored_and_the_pack_is_the_same_elsewhere(findings):
    assert findings.restored
    assert findings.same("plain PEFT")
    assert findings.same("merged")


def test_the_base_knows_the_facts_and_the_edits_change_some(findings):
    assert findings.right("edit", "base")[0] == 0
    for kind in ("same subject", "bystander"):
        right, total = findings.right(kind, "base")
        assert right >= 0.9 * total
    assert findings.right("edit", "edited")[0] >= 9
    for kind, least in (("paraphrase", 0.85), ("bystander", 0.9), ("same subject", 0.8)):
        right, total = findings.right(kind, "edited")
        assert right >= least * total


def test_the_exam_asks_about_ten_people_and_all_relations():
    edits, questions = demo_run.exam()
    assert len({edit.subject for edit in edits}) == 10
    counts = {kind: sum(q.kind == kind for q in questions) for kind in KINDS}
    assert counts == {"edit": 10, "paraphrase": 20, "same subject": 50, "bystander": 100}
    assert all(q.new != q.true for q in questions if q.kind != "same subject")


def test_the_folder_holds_what_was_used(shown):
    folder, findings = shown
    assert read_edits(folder / "edits.jsonl") == findings.edits
    assert EditPack.from_pretrained(folder / "pack").digest() == findings.pack.digest()
    assert NullSpace.from_pretrained(folder / "null_space").layers == findings.pack.layers


def test_the_tables_show_what_was_counted(demo, findings):
    text = demo().stdout
    for kind in KINDS:
        right, total = findings.right(kind, "edited")
        assert f"{right} of {total}" in text
    assert "original bits" in text
    assert f"{len(findings.questions)} of {len(findings.questions)} answers the same" in text


def test_json_holds_every_answer(demo, findings):
    values = json.loads(demo("--json").stdout)
    assert len(values["questions"]) == len(findings.questions)
    assert values["restored_bit_for_bit"]
    assert set(values["questions"][0]["answers"]) == {"base", "edited", "plain PEFT", "merged"}


def test_a_base_that_was_not_restored_is_an_error(demo, findings):
    result = demo(found=replace(findings, restored=False), code=1)
    assert "WEIGHTS DIFFER" in result.stdout
    assert result.stderr.startswith("alphaedit: the pack did not behave the same everywhere")


def test_other_answers_elsewhere_are_an_error(demo, findings):
    other = [Answer("nothing", 0.0, 0.0), *findings.answers["merged"][1:]]
    changed = replace(findings, answers={**findings.answers, "merged": other})
    assert not changed.same("merged")
    values = json.loads(demo("--json", found=changed, code=1).stdout)
    assert values["merged_answers_the_same"] is False


@pytest.mark.slow
def test_a_newcomer_sees_it_in_a_minute_without_warnings(embedded_model, shell, tmp_path):
    resource = pytest.importorskip("resource")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = shell("demo", "--out", tmp_path / "demo", OMP_NUM_THREADS="1")
    # processor time, which other work on the machine does not change
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used < 60
    assert (done.returncode, done.stderr) == (0, "")
    assert "original bits" in done.stdout
    assert (tmp_path / "demo" / "pack" / "adapter_config.json").is_file()
