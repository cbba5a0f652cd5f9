"""Protocols: what is made and judged when, and that a run that stops anywhere ends the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from alphaedit_peft import get_alphaedit_model, saving
from alphaedit_peft.evaluation import evaluate
from alphaedit_peft.studies import METHODS, Schedule, at_once, sequential, single
from alphaedit_peft.studies.protocols import RunFolder
from tests.conftest import ROOT

TWOS = Schedule(batch_size=2, every=1, order=3)


class Stopped(Exception):
    pass


def numbers(run) -> dict:
    """A run's findings without what it cost."""
    found = {k: v for k, v in run.to_json().items() if k != "seconds"}
    return found | {"cases": run.cases, "before": run.before}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def stopping_at(step: int):
    """A progress callback that raises at its n-th call."""
    calls = []

    def progress(text: str) -> None:
        calls.append(text)
        if len(calls) == step:
            raise Stopped

    return progress


def failing_at(step: int, own):
    """A method that raises at its n-th call, before it does anything."""
    calls = []

    def cut(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Stopped
        return own(self, *args, **kwargs)

    return cut


def by_hand(study):
    """A plain model edited batch by batch, without the studies."""
    return get_alphaedit_model(
        study.base.model,
        study.config,
        tokenizer=study.base.tokenizer,
        null_space=study.base.null_space,
        key_moments=study.base.key_moments,
    )


def test_a_sequence_is_judged_as_the_same_edits_made_by_hand(study, tmp_path):
    run = sequential(study, METHODS["alphaedit"], tmp_path, TWOS)
    cases = TWOS.ordered(study.suite.cases)
    model = by_hand(study)
    try:
        for i, checkpoint in enumerate(run.checkpoints, start=1):
            model.edit([case.edit for case in cases[2 * i - 2 : 2 * i]], progress=False)
            suite = replace(study.suite, cases=cases[: 2 * i])
            scores = evaluate(model, study.base.tokenizer, suite, baseline=run.before)
            assert (checkpoint.batches, checkpoint.edits) == (i, 2 * i)
            assert checkpoint.metrics == scores.metrics
        assert run.cases == scores.cases
    finally:
        model.unload()
    assert run.made == 6
    assert all(len(means) == 3 for means in run.final.by_batch.values())
    own = [c.metrics["efficacy_recall"] for c in run.cases]
    means = [sum(own[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert run.final.by_batch["efficacy_recall"] == pytest.approx(means)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_changes_the_model_and_gives_the_base_back(study, tmp_path, name):
    before = weights(study.base.model)
    run = at_once(study, METHODS[name].with_settings(steps=3), tmp_path)
    assert run.made == run.final.edits == 6
    new, old = run.final.metrics, run.before.metrics
    assert new["efficacy_probability"].value != old["efficacy_probability"].value
    after = weights(study.base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(parameter.grad is None for parameter in study.base.model.parameters())


@pytest.mark.parametrize(
    "name",
    ["alphaedit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rome", "finetuning"))],
)
def test_a_run_stopped_between_any_two_steps_ends_in_the_same_numbers(study, tmp_path, name):
    whole = sequential(study, METHODS[name], tmp_path / "whole", TWOS)
    steps = []
    for step in range(1, 7):
        with pytest.raises(Stopped):
            sequential(study, METHODS[name], tmp_path / "cut", TWOS, progress=stopping_at(1))
        steps.append((RunFolder(tmp_path / "cut", {}).state()[0], step))
    # every call went one step further: no batch and no judgement was made twice
    assert [state for state, _ in steps] == [1, 1, 2, 2, 3, 3]
    done = []
    cut = sequential(study, METHODS[name], tmp_path / "cut", TWOS, progress=done.append)
    assert done == []
    assert numbers(cut) == numbers(whole)


@pytest.mark.slow
def test_a_run_stopped_within_a_save_or_a_judgement_ends_in_the_same_numbers(
    study, tmp_path, monkeypatch
):
    whole = sequential(study, METHODS["memit"], tmp_path / "whole", TWOS)
    for name, step in (("keep", 2), ("add", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, name, failing_at(step, getattr(RunFolder, name)))
            with pytest.raises(Stopped):
                sequential(study, METHODS["memit"], tmp_path / "cut", TWOS)
    assert numbers(sequential(study, METHODS["memit"], tmp_path / "cut", TWOS)) == numbers(whole)


def test_a_state_without_its_lines_is_refused_and_old_states_are_swept(study, tmp_path):
    with pytest.raises(Stopped):
        sequential(study, METHODS["alphaedit"], tmp_path, TWOS, progress=stopping_at(3))
    results = tmp_path / "results.jsonl"
    lines = results.read_text()
    for rest in ("", lines.partition("\n")[0] + "\n"):  # emptied, and the head alone
        results.write_text(rest)
        with pytest.raises(ValueError, match=r"results\.jsonl lacks 2 batches .* past, 1 first"):
            sequential(study, METHODS["alphaedit"], tmp_path, TWOS)
    results.write_text(lines)
    (tmp_path / "state-0001").mkdir()  # a kill between the new state and the end of the old one
    (tmp_path / "state-0000").mkdir()
    sequential(study, METHODS["alphaedit"], tmp_path, TWOS)
    assert [path.name for path in tmp_path.glob("*state*")] == ["state-0003"]
    cases = tmp_path / "cases-0003.jsonl"
    cases.write_text(cases.read_text().partition("\n")[0] + "\n")
    with pytest.raises(ValueError, match=r"cases-0003\.jsonl lacks 6 cases .* was past"):
        sequential(study, METHODS["alphaedit"], tmp_path, TWOS)
    cases.unlink()
    with pytest.raises(ValueError, match=r"cases-0003\.jsonl lacks 6 cases"):
        sequential(study, METHODS["alphaedit"], tmp_path, TWOS)


def test_another_process_in_the_same_folder_is_refused(study, tmp_path):
    for run in (partial(sequential, schedule=TWOS), single):
        with (
            saving.alone(tmp_path / "run"),
            pytest.raises(BlockingIOError, match=r"run is being written by process"),
        ):
            run(study, METHODS["alphaedit"], tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_is_taken_up_where_it_was(study, tmp_path):
    program = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.studies.killed import main\n"
        "main(Path(sys.argv[2]), int(sys.argv[3]))\n"
    )
    words = [sys.executable, "-c", program, ROOT, tmp_path / "cut", "3"]  # after the second batch
    assert subprocess.run(words, cwd=ROOT, check=False, timeout=120).returncode == -9
    state, _ = RunFolder(tmp_path / "cut", {}).state()
    assert state == 2
    whole = sequential(study, METHODS["alphaedit"], tmp_path / "whole", TWOS)
    done = []
    cut = sequential(study, METHODS["alphaedit"], tmp_path / "cut", TWOS, progress=done.append)
    assert len(done) == 3  # the second judgement, the third batch, its judgement
    assert numbers(cut) == numbers(whole)


def test_a_single_edit_is_judged_as_in_a_model_of_its_own(study, tmp_path):
    run = single(study, METHODS["alphaedit"], tmp_path)
    for case, found in zip(study.suite.cases, run.cases, strict=True):
        model = by_hand(study)
        try:
            model.edit([case.edit], progress=False)
            alone = evaluate(model, study.base.tokenizer, [case], baseline=run.before)
        finally:
            model.unload()
        assert found == alone.cases[0]
    assert "perplexity" not in run.final.metrics
    assert run.made == 6


@pytest.mark.parametrize("name", ["alphaedit", "finetuning"])
def test_single_edits_go_on_after_a_stop(study, tmp_path, name):
    whole = single(study, METHODS[name], tmp_path / "whole")
    with pytest.raises(Stopped):
        single(study, METHODS[name], tmp_path / "cut", progress=stopping_at(4))
    done = []
    cut = single(study, METHODS[name], tmp_path / "cut", progress=done.append)
    assert len(done) == 2
    assert numbers(cut) == numbers(whole)


def test_orders_are_shuffles_that_a_seed_repeats(study):
    cases = study.suite.cases
    orders = [Schedule(order=seed).ordered(cases) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert {case.id for case in orders[2]} == {case.id for case in cases}
    assert Schedule().ordered(cases) == tuple(cases)


def test_judgements_are_made_as_often_as_asked_and_at_the_end(study, tmp_path):
    run = sequential(study, METHODS["alphaedit"], tmp_path, Schedule(2, every=2))
    assert [checkpoint.edits for checkpoint in run.checkpoints] == [4, 6]


def test_a_head_says_what_the_numbers_depend_on(study, tmp_path):
    head = at_once(study, METHODS["memit"], tmp_path).head
    assert head["base"]["digest"]
    assert head["null_space"] == study.base.null_space.digest()
    assert head["key_moments"] == study.base.key_moments.digest()
    assert head["config"]["objective"] == "memit"
    assert head["config"]["steps"] == 5
    assert {"torch", "alphaedit_peft", "python"} <= set(head["versions"])
    assert head["data"]["digest"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda study, m: (study, m.with_settings(steps=4)), r"config\.steps=5, not 4"),
        (lambda study, m: (replace(study, generate=True), m), r"judging\.generate=False, not True"),
        (
            lambda study, m: (replace(study, data={"name": "other"}), m),
            r"data\.name=nothing, not other",
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(study, tmp_path, change, named):
    sequential(study, METHODS["alphaedit"], tmp_path, TWOS)
    other, method = change(study, METHODS["alphaedit"])
    with pytest.raises(ValueError, match=f"was made with .*{named}"):
        sequential(other, method, tmp_path, TWOS)


@pytest.mark.parametrize(("batch_size", "every"), [(0, 1), (1, -1)])
def test_a_schedule_refuses_numbers_out_of_range(batch_size, every):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}, every={every}"):
        Schedule(batch_size, every)
