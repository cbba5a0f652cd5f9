"""``alphaedit evaluate`` and ``compare`` from the shell, on the embedded model."""

from __future__ import annotations

import json

import pytest

from alphaedit_peft import embedded


@pytest.fixture
def own_cases(tmp_path):
    """Two facts of the embedded world in the package's own layout."""
    lines = []
    for record in embedded.records()[120:128:7]:
        wanted = record["requested_rewrite"]
        lines.append(
            {
                "subject": wanted["subject"],
                "prompt": wanted["prompt"],
                "target_new": wanted["target_new"]["str"],
                "target_true": wanted["target_true"]["str"],
                "paraphrases": record["paraphrase_prompts"],
            }
        )
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_each_explains_itself_with_an_example(run, command):
    text = run(command, "--help").stdout
    assert f"alphaedit {command}" in text.partition("Options")[0]
    assert "--json" in text


def test_evaluate_judges_a_bare_model_and_keeps_the_cases(
    embedded_model, run, run_json, own_cases, tmp_path
):
    out = tmp_path / "scores.jsonl"
    words = ["evaluate", embedded_model, "--data", own_cases, "--out", out]
    values = run_json(*words)
    assert values["cases"] == 2
    assert values["metrics"]["efficacy"]["value"] == 0.0
    assert "before" not in values
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    result = run(*words)  # from the file
    assert "efficacy" in result.stdout
    assert out.read_text(encoding="utf-8").splitlines() == lines


def test_evaluate_shows_a_pack_before_and_after(shown, embedded_model, run, run_json, tmp_path):
    folder, _ = shown
    out = tmp_path / "scores.jsonl"
    words = ["evaluate", embedded_model, "--pack", folder / "pack", "--limit", "3", "--out", out]
    values = run_json(*words)
    assert values["cases"] == 3
    assert values["before"]["efficacy_recall"]["value"] == 0.0
    assert values["metrics"]["efficacy_recall"]["value"] == 1.0
    assert (tmp_path / "scores.before.jsonl").is_file()
    assert "before" in run(*words).stdout


def test_evaluate_asks_as_the_packs_edits_were_made(
    shown, embedded_model, run_json, own_cases, tmp_path
):
    words = ["edit", embedded_model, own_cases, "--null-space", shown[0] / "null_space"]
    words += ["--set", "separator=.", "--set", "steps=2", "--out", tmp_path / "pack"]
    made = run_json(*words)["results"][0]
    values = run_json("evaluate", embedded_model, "--pack", tmp_path / "pack", "--limit", "1")
    assert values["settings"]["separator"] == "."
    record = json.loads(own_cases.read_text(encoding="utf-8").splitlines()[0])
    tokenizer = embedded.load()[1]
    target = tokenizer("." + record["target_new"], add_special_tokens=False).input_ids
    for name, scores in (("after", values["metrics"]), ("before", values["before"])):
        told = made[f"probability_{name}"] ** (1 / len(target))  # a mean over its tokens
        assert scores["efficacy_probability"]["value"] == pytest.approx(told, rel=1e-3)


def test_evaluate_says_how_far_a_pack_moves_held_out_texts(
    shown, embedded_model, run, run_json, tmp_path
):
    folder, _ = shown
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(embedded.world().plain_sentences[:4]), encoding="utf-8")
    words = ["evaluate", embedded_model, "--pack", folder / "pack", "--limit", "1"]
    drift = run_json(*words, "--texts", texts)["drift"]
    assert drift["n"] == 4
    assert 0 < drift["low"] <= drift["value"] <= drift["high"] < 1
    assert "Drift over 4 texts: KL(before || after)" in run(*words, "--texts", texts).stdout
    assert "drift" not in run_json(*words)


def test_evaluate_needs_something_to_ask(run):
    result = run("evaluate", "embedded", code=2)
    assert "--data" in result.output


def test_evaluate_counts_perplexity_over_texts_and_refuses_other_files(
    embedded_model, run, run_json, own_cases, tmp_path
):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(embedded.world().plain_sentences[:3]) + "\n\n", encoding="utf-8")
    values = run_json("evaluate", embedded_model, "--data", own_cases, "--texts", texts)
    assert values["metrics"]["perplexity"]["n"] == 3
    broken = tmp_path / "broken.json"
    broken.write_text('[{"subject": 3}]', encoding="utf-8")
    result = run("evaluate", embedded_model, "--data", broken, code=1)
    assert "broken.json" in result.stderr
    result = run("evaluate", embedded_model, "--data", tmp_path / "none.json", code=1)
    assert "none.json is no file" in result.stderr


@pytest.mark.slow
def test_compare_prints_one_table_and_goes_on_in_its_folder(
    embedded_model, run, run_json, tmp_path
):
    words = [
        *("compare", embedded_model, "--edits", "2", "--batch-size", "1"),
        *("--methods", "alphaedit,finetuning", "--seeds", "0,1", "--out", tmp_path / "run"),
        *("--set", "finetuning.learning_rate=0.01", "--set", "num_contexts=0", "--set", "steps=10"),
    ]
    values = run_json(*words)
    assert set(values["methods"]) == {"alphaedit", "finetuning"}
    assert values["methods"]["alphaedit"]["final"]["efficacy"]["n"] == 2
    kept = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert kept["methods"].keys() == values["methods"].keys()
    result = run(*words)
    assert "alphaedit" in result.stdout
    assert "means, 95 % intervals over seeds" in result.stdout
    assert "finetuning left its edits undone" in result.stdout  # at ROME's bound
    assert "alphaedit left its edits undone" not in result.stdout
    assert "batch" not in result.stderr  # nothing was made again
    result = run(*words[:-1], "steps=11", code=1)
    assert "another" in result.stderr


def test_compare_reads_records_and_refuses_too_few(embedded_model, run, own_cases, tmp_path):
    words = ["compare", embedded_model, "--data", own_cases, "--edits", "3"]
    result = run(*words, "--out", tmp_path / "run", code=1)
    assert "holds 2 distinct cases, fewer than the 3 wanted" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--methods", "alphaedit,rom"], 1, "methods ['rom'] are unknown"),
        (["--set", "memit.steps=3", "--methods", "rome"], 1, "--set names methods ['memit']"),
        (["--set", "memit.stps=3"], 1, "memit has no settings ['stps']"),
        (["--set", "stps=3"], 1, "stps"),
        (["--set", "steps"], 2, "NAME=VALUE"),
        (["--seeds", "0,x"], 2, "--seeds"),
    ],
)
def test_compare_refuses_what_it_does_not_know(run, tmp_path, words, code, named):
    result = run("compare", "embedded", "--out", tmp_path / "run", *words, code=code)
    assert named in " ".join(result.output.split())


def test_compare_needs_data_for_another_model(run, tmp_path):
    result = run("compare", "some/model", "--out", tmp_path / "run", code=2)
    assert "--data" in result.output


@pytest.mark.slow
def test_records_are_read_with_their_reference_texts(embedded_model, run_json, tmp_path):
    pytest.importorskip("sklearn")
    record = embedded.records()[120]
    wanted = record["requested_rewrite"]
    wanted |= {"relation_id": "P1"}
    wanted["target_new"] |= {"id": "Q1"}
    record["generation_prompts"] = record["generation_prompts"][:1]
    data, snippets = tmp_path / "records.json", tmp_path / "snippets.json"
    data.write_text(json.dumps([record]), encoding="utf-8")
    text = f"It is {wanted['target_new']['str']}."
    entry = {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": text}]}
    snippets.write_text(json.dumps([entry]), encoding="utf-8")
    words = ["evaluate", embedded_model, "--data", data, "--generate"]
    assert "consistency" in run_json(*words, "--snippets", snippets)["metrics"]


def test_a_dataset_is_judged_by_name_and_split(embedded_model, run_json, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "facts"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(embedded.records()[120]), encoding="utf-8")
    words = ["evaluate", embedded_model, "--data", folder, "--split", "train"]
    assert run_json(*words)["metrics"]["efficacy"]["value"] == 0.0


def test_evaluate_teaches_either_answer_of_zsre(embedded_model, run_json, tmp_path):
    record = {
        **{"subject": "Zoren", "src": "Where does Zoren live?", "rephrase": "Zoren lives where?"},
        **{"answers": ["Lisbon"], "alt": "Vienna", "loc": "nq question: who", "loc_ans": "harp"},
    }
    data = tmp_path / "zsre.json"
    data.write_text(json.dumps([record]), encoding="utf-8")
    words = ["evaluate", embedded_model, "--data", data]
    assert "efficacy" not in run_json(*words)["metrics"]  # nothing to compare the answer with
    assert "efficacy" in run_json(*words, "--target", "alt")["metrics"]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--data", "embedded", "--split", "train"], 2, "--split train is for records"),
        (["--pack", "pack", "--target", "alt"], 2, "--target alt is for records"),
        (["--data", "embedded", "--snippets", "a.json"], 2, "--snippets a.json is for records"),
        (["--data", __file__, "--split", "train"], 1, "split='train' is for datasets"),
    ],
)
def test_ways_to_read_records_need_records(run, words, code, named):
    result = run("evaluate", "embedded", *words, code=code)
    assert named in " ".join(result.output.replace("│", " ").split())
