"""The script that compares settings runs as its docstring says, on few edits."""

from __future__ import annotations

import json

import pytest

from tests.shared import FIGURES, run


@pytest.mark.slow
def test_it_measures_the_unedited_model_and_each_setting_asked_for(weights, tmp_path):
    out = tmp_path / "settings.json"
    words = ["--edits", "2", "--settings", "auto", "anchors", "--out", out]
    lines = run(FIGURES / "measure_settings.py", *words).splitlines()
    found = json.loads(out.read_text())
    assert [row["setting"] for row in found] == ["unedited", "auto", "anchors"]
    assert [line.split("\t") for line in lines] == [[str(v) for v in r.values()] for r in found]
    unedited, *edited = found
    for row in edited:
        assert row["efficacy"] > unedited["efficacy"]
        assert row["not_taken"] == 0
        assert row["perplexity"] == pytest.approx(unedited["perplexity"], rel=0.1)


@pytest.mark.slow
def test_plain_fast_and_autocast_edits_are_equally_good(weights, tmp_path):
    out = tmp_path / "paths.json"
    run(FIGURES / "compare_paths.py", "--edits", "4", "--out", out)
    plain, *others = json.loads(out.read_text())
    assert [row["way"] for row in (plain, *others)] == ["plain", "together", "autocast"]
    assert plain["efficacy"] == 1
    for row in others:
        for name in ("efficacy", "generalization", "specificity", "unedited_recall"):
            assert row[name] == pytest.approx(plain[name], abs=0.01)
        assert row["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)
