"""The page of evaluations: the numbers that were measured, from any file that holds them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alphaedit_peft.evaluation.summary import Estimate
from alphaedit_peft.report import (
    Finding,
    last_states,
    read_findings,
    scores_markdown,
    scores_page,
    scores_table,
    shift_between,
    shift_section,
)
from alphaedit_peft.report.charts import course_chart, interval_bars, scatter_chart
from tests.conftest import tiny_model
from tests.report.test_browser import BROWSER, browse  # noqa: F401
from tests.report.test_page import HOSTILE, Tags


def estimate(value, half=0.0, n=9):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def checkpoint(edits, share):
    return {
        "batches": edits // 2,
        "edits": edits,
        "metrics": {"efficacy": estimate(share, 0.1), "specificity": estimate(1 - share / 10)},
        "by_batch": {"efficacy": [share] * (edits // 2)},
    }


def run(name, order, shares):
    head = {"method": {"name": name}, "schedule": {"order": order}, "dtype": "float32"}
    points = [checkpoint(2 * (i + 1), share) for i, share in enumerate(shares)]
    return {"head": head, "checkpoints": points, "made": 4, "seconds": 2.0}


def comparison(**runs):
    return {
        "seeds": [0, 1],
        "before": {"efficacy": estimate(0.0), "specificity": estimate(1.0)},
        "methods": {name: {"runs": found} for name, found in runs.items()},
    }


@pytest.fixture
def compared(tmp_path):
    """A comparison's folder: two orders of one method, one of another."""
    values = comparison(
        ours=[run("ours", 0, (1.0, 0.9)), run("ours", 1, (1.0, 0.7))],
        theirs=[run("theirs", 0, (0.5, 0.25)), run("theirs", 1, (0.5, 0.25))],
    )
    folder = tmp_path / "compared"
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(values))
    return folder


def shown(page):
    return " ".join("".join(Tags(page).text).split())


def test_a_comparison_is_read_as_means_over_its_orders(compared):
    ours, theirs = read_findings([compared])
    assert ours.final["efficacy"].value == pytest.approx(0.8)
    assert [(edits, e.value) for edits, e in ours.course["efficacy"]] == [
        (0, 0.0),
        (2, 1.0),
        (4, pytest.approx(0.8)),
    ]
    assert (ours.over, ours.seconds, ours.by_batch["efficacy"]) == ("2 orders", 0.5, [0.8, 0.8])
    assert theirs.final["efficacy"].low == theirs.final["efficacy"].high == 0.25


def test_a_run_that_was_stopped_is_read_as_far_as_it_was_judged(tmp_path):
    values = run("ours", 0, (1.0, 0.9))
    lines = [
        {"run": values["head"]},
        {"batch": 1, "made": 2, "seconds": 3.0},
        {"judged": values["checkpoints"][0]},
    ]
    place = tmp_path / "ours-0"
    place.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 2, "ma'
    (place / "results.jsonl").write_text(text)
    for path in (place, tmp_path):
        (found,) = read_findings([path])
        assert (found.name, found.seconds) == ("ours", 1.5)
        assert found.final["efficacy"].value == 1.0
    assert (place / "results.jsonl").read_text() == text


@pytest.mark.parametrize("end", [".jsonl", ".txt", ""])
def test_judged_cases_are_gathered_with_those_of_before(tmp_path, end):
    def write(path, shares):
        lines = [{"judging": {"seed": 0}}] + [
            {"id": f"e{i}", "digest": f"d{i}", "metrics": {"efficacy": s}, "tops": {}, "texts": {}}
            for i, s in enumerate(shares)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(tmp_path / f"mine{end}", (1.0, 0.0, 1.0, 1.0))
    write(tmp_path / f"mine.before{end}", (0.0, 0.0, 1.0, 0.0))
    (found,) = read_findings([tmp_path / f"mine{end}"])
    assert (found.before["efficacy"].value, found.final["efficacy"].value) == (0.25, 0.75)


def test_findings_of_one_name_are_told_apart(compared, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((compared / "comparison.json").read_text())
    names = [found.name for found in read_findings([compared, other, other])]
    assert len(set(names)) == 6
    assert names[:3] == ["compared: ours", "compared: theirs", "other: ours (1)"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{}", r"fields \['metrics', 'settings'\] are missing"),
        ("a.json", "[1]", "list"),
        ("a.json", "{", "Expecting"),
        ("a.jsonl", "", "holds no results"),
        ("a.jsonl", '{"run": {}}\n', r"fields \['judging'\] are missing"),
        ("a.jsonl", '{"judging": {}}\n', "no case in it was judged"),
        ("a.json", json.dumps(comparison(x=[])), "holds no results"),
        ("a.json", json.dumps(comparison(x=[run("x", 0, ())])), "was not judged yet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_findings([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_what_is_not_there_or_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not there"):
        read_findings([tmp_path / "nothing"])
    with pytest.raises(ValueError, match=r"neither comparison\.json nor results\.jsonl"):
        read_findings([tmp_path])


def test_the_table_has_the_columns_of_the_paper_and_the_unedited_model_first(compared):
    heads, rows = scores_table(read_findings([compared]))
    assert heads == ["", "efficacy", "specificity"]
    assert [row[0] for row in rows] == ["unedited", "ours", "theirs"]
    assert rows[2][1] == "25.0 ± 0.0"


def test_the_page_and_the_markdown_say_the_same_numbers(compared):
    found = read_findings([compared])
    page, text = scores_page(found, title="Two"), scores_markdown(found, "Two")
    for number in ("80.0 ± ", "25.0 ± 0.0", "over 2 orders", "float32", "0.50"):
        assert number in shown(page)
        assert number in text
    for heading in ("Over the edits", "By age of the edits", "What the numbers depend on"):
        assert f"{heading}</h2>" in page
    assert page.count('stroke-dasharray="') == 0  # two lines have colours of their own


def test_hostile_names_stay_text():
    found = [
        Finding(
            HOSTILE,
            HOSTILE,
            {},
            {
                "efficacy": Estimate(math.nan, math.nan, math.nan, 1),
                "fluency": Estimate(2, 1, 3, 1),
            },
            origin={HOSTILE: [HOSTILE]},
        )
    ]
    tags = Tags(scores_page(found, title=HOSTILE))
    assert tags.names.count("script") == 1
    assert "img" not in tags.names
    assert not tags.open
    line = scores_markdown(found, "a | b\nc")
    assert "<script>" not in line.replace("\\<", "")
    assert line.startswith("# a \\| b c\n")
    with pytest.raises(ValueError, match="nothing to show"):
        scores_page([])


@pytest.mark.parametrize(
    "chart",
    [
        interval_bars("t", [("a", Estimate(math.nan, 0, 0, 1), 0)]),
        course_chart("t", {"a": []}),
        scatter_chart("t", {"a": [((0.0, math.inf), (0.0, 0.0))]}),
    ],
)
def test_a_chart_without_numbers_says_so(chart):
    assert "Nothing to draw." in chart


def test_a_bar_and_its_interval_end_where_their_numbers_are():
    chart = interval_bars("t", [("a", Estimate(0.5, 0.25, 1.5, 4), 0)], full=1.0)
    assert 'width="103.0"' in chart  # half of 206
    assert "H336.0" in chart  # an interval beyond the axis ends at its end


def test_the_projection_keeps_distances_within_its_plane():
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(7, 2))[0].T  # (2, 7)
    before = torch.randn(5, 2) @ plane + 3.0
    after = before + torch.randn(5, 2) @ plane
    found = shift_between("here", {"kept": before}, {"kept": after})
    moved = (found.after["kept"] - found.before["kept"]).norm(dim=1)
    assert torch.allclose(moved, (after - before).double().norm(dim=1), atol=1e-5)
    assert sum(found.explained) == pytest.approx(1.0, abs=1e-6)
    want = (after - before).norm(dim=1) / before.norm(dim=1)
    assert torch.allclose(found.relative["kept"].float(), want, atol=1e-5)
    text = shown(shift_section([found]).html)
    assert f"{100 * float(found.relative['kept'].max()):.2f} %" in text


def test_a_shift_of_nothing_is_no_shift_and_other_shapes_are_refused():
    states = torch.randn(3, 4)
    assert not shift_between("x", {"a": states}, {"a": states}).relative["a"].any()
    with pytest.raises(ValueError, match="ask the same"):
        shift_between("x", {"a": states}, {"b": states})
    with pytest.raises(ValueError, match="at least two"):
        shift_between("x", {"a": states[:1]}, {"a": states[:1]})


def test_last_states_are_those_of_the_last_token_in_any_batch(tokenizer):
    model = tiny_model("gpt2")
    prompts = ["The capital of France is", "Paris", "I think that you are"]
    blocks = ["transformer.h.1", "transformer.h.3"]
    together = last_states(model, tokenizer, prompts, blocks)
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model.eval()(ids, output_hidden_states=True).hidden_states[2][0, -1]
    assert torch.allclose(together[0][0], plain, atol=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        last_states(model, tokenizer, [], blocks)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_opens_in_a_browser_without_complaint(browse, compared):  # noqa: F811
    states = torch.randn(4, 6)
    moved = shift_between(HOSTILE, {HOSTILE: states}, {HOSTILE: states + 0.1})
    dom, said = browse(scores_page(read_findings([compared]), more=[shift_section([moved])]))
    assert said == ""
    assert dom.count("<svg") >= 7
    assert dom.count("<script") == 1
