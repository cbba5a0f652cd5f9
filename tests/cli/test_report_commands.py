"""``alphaedit report`` and ``alphaedit show``: tables, pages, and what they refuse."""

from __future__ import annotations

import json

import pytest

from alphaedit_peft import embedded


@pytest.fixture
def judged(tmp_path):
    """What ``evaluate --json`` prints."""
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    values = {"cases": 8, "metrics": {"efficacy": share, "fluency": share}, "settings": {"seed": 0}}
    path = tmp_path / "judged.json"
    path.write_text(json.dumps({**values, "before": {"efficacy": share}}))
    return path


@pytest.fixture
def records_file(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(embedded.records()[:3]))
    return path


def test_results_become_a_table_a_page_and_markdown(run, run_json, judged, tmp_path):
    page, text = tmp_path / "page.html", tmp_path / "scores.md"
    said = run("report", judged, "--html", page, "--markdown", text, "--title", "Mine").stdout
    assert "50.0 ± 25.0" in said
    assert f"Written to {page}" in said
    assert "<title>Mine</title>" in page.read_text(encoding="utf-8")
    assert "| judged | 50.0 ± 25.0 |" in text.read_text(encoding="utf-8")
    (found,) = run_json("report", judged)["findings"]
    assert (found["name"], found["final"]["efficacy"]["n"]) == ("judged", 8)


def test_a_record_is_shown_without_any_model(run, run_json, records_file, tmp_path):
    page = tmp_path / "record.html"
    said = run("show", "counterfact", records_file, "--case", 2, "--html", page).stdout
    rewrite = embedded.records()[2]["requested_rewrite"]
    assert f"Subject: {rewrite['subject']}; new target: {rewrite['target_new']['str']}" in said
    assert f"true target: {rewrite['target_true']['str']}" in said
    assert rewrite["target_new"]["str"] in page.read_text(encoding="utf-8")
    told = run_json("show", "counterfact", records_file, "--case", 2)
    assert told["case"]["edit"]["subject"] == rewrite["subject"]
    assert told["answers"][0]["before"] is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["report"], 2, "give results"),
        (["report", "nowhere.json"], 1, "nowhere.json is not there"),
        (["report", "x", "--pack", "p"], 2, "belong together"),
        (["report", "x", "--html", "page.txt"], 2, "must be a file's name in .html"),
        (["report", "x", "--html", "no/page.html"], 1, "there is no folder no"),
        (["show", "counterfact", "FILE", "--case", "9"], 1, "holds 3 records, 0 to 2"),
        (["show", "counterfact", "nowhere.json"], 1, "nowhere.json: there is no such file"),
        (["show", "zsre", "FILE"], 1, "records.json, record 0, field subject is missing"),
        (["show", "counterfact", "FILE", "--pack", "p"], 2, "give --model too"),
        (["show", "else", "FILE"], 2, "else"),
    ],
)
def test_nonsense_is_refused(run, records_file, monkeypatch, words, code, message):
    monkeypatch.chdir(records_file.parent)
    result = run(*(records_file if word == "FILE" else word for word in words), code=code)
    told = " ".join((result.output + result.stderr).replace("│", " ").split())
    assert message in told
    assert [path.name for path in records_file.parent.iterdir()] == ["records.json"]


@pytest.mark.slow
def test_a_pack_is_asked_before_and_after_and_its_shift_is_drawn(shown, run_json, tmp_path):
    folder, findings = shown
    words = ["--model", "embedded", "--pack", folder / "pack"]
    page = tmp_path / "page.html"
    told = run_json("show", "own", folder / "edits.jsonl", *words, "--html", page)
    asked = told["answers"][0]
    assert asked["wanted"].strip() == findings.edits[0].target_new.strip()
    assert asked["after"]["wanted"] > asked["before"]["wanted"]
    assert "which holds this edit" in page.read_text(encoding="utf-8")
    kept = tmp_path / "kept.txt"
    kept.write_text("\n".join(q for edit in findings.edits[:2] for q in edit.neighborhood))
    found = run_json("report", *words, "--prompts", kept, "--html", page)["moved"]
    assert [one["where"].split(",")[0] for one in found] == ["After block 1", "After block 5"]
    last = {name: sum(far) / len(far) for name, far in found[1]["relative_move"].items()}
    assert last["edited prompts"] > last["prompts to be kept"]
    assert "What moved inside" in page.read_text(encoding="utf-8")
