"""Comparisons: the same cases for all, intervals over seeds, nothing done twice."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from alphaedit_peft import AlphaEditConfig, Edit, EditPack, KeyMoments, NullSpace, embedded
from alphaedit_peft.evaluation import Case, Judging, Suite, embedded_suite
from alphaedit_peft.evaluation.summary import Estimate, bootstrap
from alphaedit_peft.solve_metric import SHARE
from alphaedit_peft.studies import METHODS, Base, Schedule, Study, choose, compare, find_methods
from alphaedit_peft.studies.compare import RIDGES, THRESHOLDS, WEIGHTS, over_seeds, shown
from alphaedit_peft.studies.tune import Grid, tune

THREES = Schedule(batch_size=3, every=1)
HALVES = slice(3), slice(3, 6)


@pytest.fixture(scope="module")
def compared(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    methods = find_methods(["alphaedit", "finetuning"])
    return folder, methods, compare(study, methods, folder, THREES, seeds=[0, 1])


def test_it_is_one_run_a_method_and_seed_on_the_same_orders(compared):
    _, _, found = compared
    assert {name: len(runs) for name, runs in found.runs.items()} == {
        "alphaedit": 2,
        "finetuning": 2,
    }
    for one, other in zip(*found.runs.values(), strict=True):
        assert [c.id for c in one.cases] == [c.id for c in other.cases]
    orders = [[case.id for case in run.cases] for run in found.runs["alphaedit"]]
    assert orders[0] != orders[1]


def test_finished_runs_are_read_and_not_made_again(compared, study):
    folder, methods, found = compared
    said = []
    again = compare(study, methods, folder, THREES, seeds=[0, 1], progress=said.append)
    assert again.to_json() == found.to_json()
    assert len(said) == 1  # the unedited model, known before


def test_its_table_has_a_column_a_method_after_the_unedited_model(compared):
    _, _, found = compared
    heads, rows = found.rows()
    assert heads == ["metric", "before", "alphaedit", "finetuning"]
    assert [row[0] for row in rows][:3] == ["efficacy", "generalization", "specificity"]
    assert rows[-1][0] == "seconds an edit"
    assert {len(row) for row in rows} == {len(heads)}
    assert str(found).count("\n") == len(rows)


def test_courses_begin_with_the_unedited_model(compared):
    _, _, found = compared
    course = found.course("alphaedit", "efficacy")
    assert [edits for edits, _ in course] == [0, 3, 6]
    assert course[-1][1] == found.final("alphaedit")["efficacy"]
    assert len(found.retention("alphaedit")) == 2


def test_intervals_over_seeds_are_students():
    found = over_seeds([{"x": Estimate(v, 0, 1, 9)} for v in (0.2, 0.4, 0.9)])["x"]
    mean, deviation = 0.5, math.sqrt((0.09 + 0.01 + 0.16) / 2)
    assert found.value == pytest.approx(mean)
    assert found.high - mean == pytest.approx(4.303 * deviation / math.sqrt(3))
    assert mean - found.low == pytest.approx(found.high - mean)
    assert found.n == 3
    one = Estimate(0.2, 0.1, 0.3, 9)
    assert over_seeds([{"x": one}]) == {"x": one}
    assert over_seeds([{"x": one}, {"y": one}]) == {}


def test_shares_are_shown_in_percent_with_half_the_interval():
    assert shown("efficacy", Estimate(0.5, 0.4, 0.6, 2), spread=True) == "50.0 ± 10.0"
    assert shown("perplexity", Estimate(5.5, 5, 6, 2)) == "5.50"
    assert shown("perplexity", None) == ""


@pytest.mark.parametrize(
    ("missing", "name"),
    [("null_space", "alphaedit"), ("key_moments", "memit"), ("null_space", "memit-projection")],
)
def test_missing_statistics_are_told_before_anything_runs(study, tmp_path, missing, name):
    without = replace(study, base=replace(study.base, **{missing: None}))
    with pytest.raises(ValueError, match=f"{name}.* needs .*{missing.replace('_', ' ')}"):
        compare(without, [METHODS["finetuning"], METHODS[name]], tmp_path, THREES)
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_the_tokenizer_cannot_place_is_told_before_anything_runs(study, tmp_path):
    asked = replace(study, suite=Suite([*study.suite.cases, Case(Edit("capi", "{}tal is", "on"))]))
    with pytest.raises(ValueError, match="subject 'capi' ends within a token in 'capital is'"):
        compare(asked, [METHODS["alphaedit"]], tmp_path, THREES)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="subject 'capi' ends within a token in 'capital is'"):
        tune(study.base, asked.suite, Grid(((0, 1),)), study.config)


@pytest.mark.parametrize(
    ("names", "seeds", "named"),
    [
        (["memit"], [], r"seeds=\[\]"),
        (["memit"], [1, 1], r"seeds=\[1, 1\]"),
        ([], [0], r"methods=\[\]"),
    ],
)
def test_nothing_or_the_same_twice_is_refused(study, tmp_path, names, seeds, named):
    methods = [METHODS[name] for name in names]
    with pytest.raises(ValueError, match=named):
        compare(study, methods, tmp_path, THREES, seeds=seeds)


def test_a_folder_of_another_comparison_is_refused(compared, study):
    folder, methods, _ = compared
    other = replace(study, suite=replace(study.suite, cases=study.suite.cases[:4]))
    with pytest.raises(ValueError, match=r"another study: data, cases differ"):
        compare(other, methods, folder, THREES, seeds=[0, 1])


def test_the_embedded_model_is_edited_in_a_row_by_two_editors(tmp_path):
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    base, tokenizer = embedded.load()
    space = NullSpace.identity({0: 1024, 1: 1024})  # all is free: no statistics to collect
    suite = embedded_suite(2, unedited=10, texts=2)
    config = AlphaEditConfig(contexts=[], num_contexts=0, on_conflict="replace")
    study = Study(Base(base, tokenizer, space), suite, config)
    methods = [METHODS["alphaedit"], METHODS["finetuning"].with_settings(steps=2)]
    found = compare(study, methods, tmp_path, Schedule(batch_size=1, every=1), seeds=[0])
    ours, theirs = (found.final(method.name) for method in methods)
    assert [edits for edits, _ in found.course("alphaedit", "efficacy")] == [0, 1, 2]
    assert found.before["efficacy"] == 0
    assert ours["efficacy"].value == 1
    assert theirs["efficacy"].value == 0  # two steps at GPT2-XL's rate change nothing
    assert ours["unedited_recall"].value > 0.9
    assert found.retention("alphaedit") == [1, 1]


def test_each_method_is_compared_at_its_best_on_other_cases(study, tmp_path):
    config = replace(study.config, moment_weight=None)
    probes, judged = (replace(study.suite, cases=study.suite.cases[part]) for part in HALVES)
    asked = replace(study, config=config, suite=judged)
    methods = find_methods(["alphaedit", "memit", "rome", "finetuning"])
    chosen, found = choose(asked, methods, probes, tmp_path)
    assert [method.name for method in chosen] == [method.name for method in methods]
    assert list(found) == ["alphaedit", "memit"]  # ROME's w is what makes it ROME
    assert chosen[2:] == methods[2:]
    for method in chosen[:2]:
        best, tried = found[method.name]["recommended"], found[method.name]["tried"]
        assert len(tried) == len(RIDGES) * len(THRESHOLDS) == len(WEIGHTS)
        assert found[method.name]["edits"] == 3
        assert {name: method.settings.get(name, best[name]) for name in best} == best
    assert "moment_weight" in chosen[1].settings
    said = []
    assert choose(asked, methods, probes, tmp_path, progress=said.append) == (chosen, found)
    assert said == []  # all was there
    set_before = methods[1].with_settings(moment_weight=3.0)
    assert choose(asked, [set_before], probes, tmp_path)[0] == (set_before,)
    with pytest.raises(ValueError, match=r"search.json is of another search: name another"):
        choose(asked, methods, judged, tmp_path)
    with pytest.raises(ValueError, match="'memit' needs key moments"):
        choose(replace(asked, base=replace(study.base, key_moments=None)), methods, probes, "new")


def test_differences_are_over_the_same_cases(compared, study, tmp_path):
    methods, found = compared[1:]
    ahead = found.ahead("alphaedit", "finetuning")["efficacy"]
    finals = [found.final(method.name)["efficacy"].value for method in methods]
    assert ahead.value == pytest.approx(finals[0] - finals[1])
    assert ahead.n == 2  # seeds
    assert found.ahead("alphaedit", "alphaedit")["specificity"].low == 0
    one = compare(study, methods, tmp_path, THREES)
    runs = [one.runs[method.name][0].cases for method in methods]
    apart = [a.metrics["efficacy"] - b.metrics["efficacy"] for a, b in zip(*runs, strict=True)]
    assert one.ahead("alphaedit", "finetuning")["efficacy"] == bootstrap(apart)
    heads, rows = one.differences()
    assert heads == ["metric", "alphaedit - finetuning"]
    assert rows[0][0] == "efficacy"
    assert " .. " in rows[0][1]
    assert one.to_json()["methods"]["finetuning"]["ahead_of"].keys() == {"alphaedit"}


def test_memit_edits_the_embedded_model_at_the_weight_that_auto_decides(weights, tmp_path):
    base, tokenizer = embedded.load()
    config = AlphaEditConfig(contexts=[], on_conflict="replace")
    moments = KeyMoments.collect(base, tokenizer, embedded.texts(800), config, progress=False)
    suite = embedded_suite(4, unedited=4, texts=2)
    study = Study(Base(base, tokenizer, key_moments=moments), suite, config)
    found = compare(study, [METHODS["memit"]], tmp_path, Schedule(batch_size=4))
    assert found.before["efficacy"] == 0
    assert found.final("memit")["efficacy_recall"].value == 1  # 0 at the papers' 15,000
    pack = EditPack.from_pretrained(tmp_path / "memit-0" / "state-0001")
    assert 50 < pack.config.moment_weight < 500
    decision = next(d for d in pack.decisions if d["name"] == "moment_weight")
    shares = [float(share) / 100 for share in re.findall(r"(\d+)% in layer", decision["reason"])]
    assert shares == pytest.approx([SHARE, SHARE], abs=0.05)


def test_a_study_asks_as_its_edits_are_made(study):
    other = replace(study, config=replace(study.config, separator=""))
    assert other.judging == Judging(separator="")
    assert replace(other, how=Judging()).judging == study.judging == Judging()
