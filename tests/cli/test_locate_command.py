"""``alphaedit locate`` and ``tune`` from the shell, on the embedded model."""

from __future__ import annotations

import pytest

from tests.report.test_browser import BROWSER, browse  # noqa: F401

QUICK = ("--limit", "1", "--samples", "1")


@pytest.mark.slow
def test_locate_shows_blocks_and_writes_a_page(embedded_model, run, browse, tmp_path):  # noqa: F811
    page = tmp_path / "located.html"
    text = run("locate", embedded_model, *QUICK, "--html", page).stdout
    assert "1 fact traced" in text
    assert text.split().count("subject") == 1 + 6  # once before two tables of three classes
    assert "Rewrite layers up to there: " in text
    assert "…" not in text  # eighty columns hold the tables
    assert "-0.00" not in text
    html = page.read_text(encoding="utf-8")
    assert "Average indirect effect: blocks 0 to 5" in html
    assert "last subject" in html
    if BROWSER is not None:
        dom, said = browse(html)
        assert said == ""
        assert "<output>1 in all</output>" in dom  # its script ran


@pytest.mark.slow
def test_locate_gives_all_numbers_as_json(embedded_model, run_json):
    values = run_json("locate", embedded_model, *QUICK, "--noise", "0")
    assert values["blocks"] == len(values["effects"]["mlp"]["last subject"]) == 6
    assert values["corrupted"]["value"] == pytest.approx(values["clean"]["value"], abs=1e-5)
    assert values["facts"][0]["classes"][-1] == "last"


@pytest.mark.slow
def test_tune_recommends_one_of_what_it_tried(
    shown,
    embedded_model,
    run,
    run_json,
    browse,  # noqa: F811
    tmp_path,
):
    folder, page = shown[0], tmp_path / "tuned.html"
    words = ["tune", embedded_model, "--edits", "2", "--null-space", folder / "null_space"]
    words += ["--layers", "0-1", "--clamps", "1", "--ridges", "0.05,0.5", "--thresholds", "0.02"]
    values = run_json(*words)
    assert [one["setting"]["rewrite_layers"] for one in values["tried"]] == [[0, 1], [0, 1]]
    assert values["recommended"] == values["tried"][0]["setting"]
    text = run(*words, "--html", page).stdout
    assert "2 settings tried on 2 edits" in text
    assert "Recommended: layers 0,1" in text
    assert "…" not in text  # eighty columns hold the table
    html = page.read_text(encoding="utf-8")
    assert "All that was tried" in html
    if BROWSER is not None:
        dom, said = browse(html)
        assert said == ""
        assert "<output>2 in all</output>" in dom


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("locate", "some/model"), "--data"),
        (("locate", "embedded", "--noise", "-1"), "--noise"),
        (("locate", "embedded", "--html", "page.txt"), "page.txt"),
        (("tune", "some/model"), "--data"),
        (("tune", "some/model", "--data", "cases.json"), "--texts"),
        (("tune", "embedded", "--ridges", "a,b"), "--ridges"),
        (("tune", "embedded", "--layers", "3-1"), "3-1"),
        (("tune", "embedded", "--edits", "1"), "--edits"),
    ],
)
def test_a_wrong_command_line_is_refused_before_any_work(run, words, named):
    assert named in run(*words, code=2).output


def test_a_page_in_no_folder_is_refused(run, tmp_path):
    result = run("locate", "embedded", "--html", tmp_path / "none" / "page.html", code=1)
    assert "there is no folder" in result.stderr


def test_texts_too_few_to_hold_some_out_are_refused(embedded_model, run, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("A line of text.\n" * 100, encoding="utf-8")
    result = run("tune", embedded_model, "--texts", path, code=1)
    assert "--texts holds 100 texts" in result.stderr
