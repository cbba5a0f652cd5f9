"""Each command on the embedded model: what it writes, prints, and says in JSON."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import (
    AlphaEditModel,
    EditPack,
    KeyMoments,
    NullSpace,
    embedded,
    read_edits,
    saving,
)
from alphaedit_peft.nullspace import moments

FAST = ("--set", "num_contexts=0", "--set", "steps=3")


@pytest.fixture
def null_space(shown):
    return shown[0] / "null_space"


@pytest.fixture
def pack(shown):
    return shown[0] / "pack"


def test_nullspace_writes_what_it_measured(embedded_model, run_json, run, tmp_path):
    out, moments = tmp_path / "ns", tmp_path / "moments"
    words = ["nullspace", "embedded", "--out", out, "--layers", "0-1", "--max-tokens", 12_000]
    values = run_json(*words, "--moments-out", moments, "--resume", tmp_path / "sums.safetensors")
    found = NullSpace.from_pretrained(out)
    assert [row["layer"] for row in values["layers"]] == list(found.layers) == [0, 1]
    assert [row["kept"] for row in values["layers"]] == [found.null_dimension(n) for n in (0, 1)]
    assert values["tokens"] == KeyMoments.from_pretrained(moments).tokens == 12_000
    assert "its own texts" in run("inspect", out).stdout
    again = run_json(*words, "--resume", tmp_path / "sums.safetensors")
    assert again["layers"] == values["layers"]


def test_nullspace_reads_a_text_file_and_another_threshold(embedded_model, run_json, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(embedded.texts(1200)), encoding="utf-8")
    words = ["--layers", "0", "--threshold", "200", "--threshold-mode", "rank"]
    values = run_json("nullspace", "embedded", "--texts", texts, "--out", tmp_path / "ns", *words)
    (layer,) = values["layers"]
    assert layer["width"] - layer["kept"] == 200
    assert values["provenance"]["corpus"] == "texts.txt"


def test_edit_writes_a_pack_and_reports_each_edit(null_space, run_json, edits_file, tmp_path):
    out = tmp_path / "pack"
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--out", out]
    values = run_json(*words, "--ridge", "0.1", "--set", "ridge_mode=relative", *FAST)
    written = EditPack.from_pretrained(out)
    assert tuple(written.edits) == read_edits(edits_file)
    assert [r["edit"]["id"] for r in values["results"]] == [e.id for e in written.edits]
    assert all(r["made"] and r["steps"] <= 3 for r in values["results"])
    assert (written.config.ridge, written.contexts) == (0.1, ())


def test_edit_goes_on_from_a_pack(null_space, pack, run, edits_file, tmp_path):
    out = tmp_path / "longer"
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--pack", pack]
    text = run(*words, "--out", out, "--steps", "3", "--batch-size", "1").stdout
    before, after = EditPack.from_pretrained(pack), EditPack.from_pretrained(out)
    assert after.edits == [*before.edits, *read_edits(edits_file)]
    assert len(after.batches) == len(before.batches) + 2
    assert after.config.steps == 3
    assert "2 edits made, 0 set aside" in text
    assert "12 edits" in text


def test_edit_says_why_an_edit_was_set_aside(null_space, pack, run, shown, tmp_path):
    repeated = shown[0] / "edits.jsonl"
    words = ["edit", "embedded", repeated, "--null-space", null_space, "--pack", pack]
    text = run(*words, "--out", tmp_path / "same").stdout
    assert "0 edits made, 10 set aside" in text
    assert "already says" in text


def test_edit_says_what_it_decided_and_why_an_edit_did_not_take(
    null_space, run, edits_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "600")
    out = tmp_path / "pack"
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--out", out, *FAST]
    text = run(*words, "--set", "clamp_factor=0.01").stdout
    assert text.count("not the likeliest: its target value stopped at the clamp") == 2
    assert "raise clamp_factor (now 0.01)" in text
    decided = EditPack.from_pretrained(out).decisions
    assert {"rewrite_layers", "threshold", "ridge"} <= {d["name"] for d in decided}
    for told in (text, run("inspect", out).stdout):
        for decision in decided:
            assert decision["reason"] in told


def test_edit_says_how_many_paraphrases_an_edit_holds_in(
    null_space, run, edits_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "600")
    first, second = map(json.loads, edits_file.read_text().splitlines())
    first["paraphrases"] = [first["prompt"].replace("{}", first["subject"]), "The dog ran to the"]
    first["paraphrases"].append("The train from London to")
    edits_file.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--set", "num_contexts=0"]
    text = run(*words, "--out", tmp_path / "pack").stdout
    assert "1 of 3" in text
    assert text.count("it holds only as phrased") == 1


def test_edit_takes_settings_from_a_file_and_options_win(
    null_space, run, edits_file, tmp_path, capsys
):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"steps": 9, "num_contexts": 0, "seed": 4}))
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--config", settings]
    run(*words, "--out", tmp_path / "pack", "--steps", "2")
    config = EditPack.from_pretrained(tmp_path / "pack").config
    assert (config.steps, config.seed) == (2, 4)


def test_edits_that_contradict_need_a_rule(null_space, pack, run, shown, tmp_path):
    edit = read_edits(shown[0] / "edits.jsonl")[0]
    other = tmp_path / "other.jsonl"
    values = {"subject": edit.subject, "prompt": edit.prompt, "target_new": "Klingon"}
    other.write_text(json.dumps(values))
    words = ["edit", "embedded", other, "--null-space", null_space, "--pack", pack]
    words += ["--out", tmp_path / "out", "--steps", "2"]
    assert "contradict" in run(*words, code=1).stderr
    assert not (tmp_path / "out").exists()
    run(*words, "--on-conflict", "replace")
    assert "Klingon" in [e.target_new for e in EditPack.from_pretrained(tmp_path / "out").edits]


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "terminated"),
        (lambda: int("x"), 1, "invalid literal"),
    ],
)
def test_a_run_that_stops_keeps_its_finished_batches(
    null_space, run, edits_file, tmp_path, monkeypatch, stop, code, said
):
    whole = AlphaEditModel.edit

    def stops(self, edits, batch_size, *, after_batch):
        whole(self, edits[:1], progress=False, after_batch=after_batch)
        assert len(EditPack.from_pretrained(tmp_path / "pack").edits) == 1  # already
        stop()

    monkeypatch.setattr(AlphaEditModel, "edit", stops)
    words = ["edit", "embedded", edits_file, "--null-space", null_space, *FAST]
    result = run(*words, "--out", tmp_path / "pack", code=code)
    *_, kept, last = result.stderr.splitlines()
    assert kept == f"alphaedit: stopped; the finished batches (1 edits) are in {tmp_path / 'pack'}"
    assert last.startswith(f"alphaedit: {said}")
    assert len(EditPack.from_pretrained(tmp_path / "pack").edits) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edits.jsonl", "pack"]


def test_a_pass_that_is_stopped_says_where_its_sums_are(embedded_model, run, tmp_path, monkeypatch):
    add = moments._add

    def last(*words):
        add(*words)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(moments, "_add", last)
    sums = tmp_path / "sums"
    result = run("nullspace", "embedded", "--out", tmp_path / "ns", "--resume", sums, code=143)
    *_, kept, said = result.stderr.splitlines()
    assert kept.startswith(f"alphaedit: stopped; what is finished is in {sums}, and the same comm")
    assert said == "alphaedit: terminated"
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["nullspace", "embedded", "--max-tokens", 500, "--resume", "sums", "--out", "o"], "sums"),
        (["nullspace", "embedded", "--max-tokens", 1500, "--out", "ns"], "ns"),
        (["merge", "embedded", "PACK", "--out", "merged"], "merged"),
        (["inspect", "PACK", "--html", "page.html"], "page.html"),
        (["compress", "PACK", "--rank", 5, "--out", "small"], "small"),
        (["evaluate", "embedded", "--data", "embedded", "--limit", 30, "--out", "j"], "j"),
        (["compare", "embedded", "--edits", 20, "--out", "run"], "run/key_moments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_full_disk_is_said_with_the_name_of_what_could_not_be_written(
    pack, run, tmp_path, monkeypatch, full_disk, words, names
):
    monkeypatch.chdir(tmp_path)
    result = run(*(pack if word == "PACK" else word for word in words), code=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"alphaedit: saving {names} failed: ")
    assert "File too large" in last
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "j"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "j"]


def test_an_output_that_another_command_writes_or_nobody_may(pack, run, tmp_path, monkeypatch):
    out = tmp_path / "small"
    words = ["compress", pack, "--rank", 5, "--out"]
    with saving.alone(out):
        assert "small is being written by process" in run(*words, out, code=1).stderr
    run(*words, out)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    page = tmp_path / "page.html"
    assert "nothing may be written there" in run("inspect", pack, "--html", page, code=1).stderr
    if os.path.isdir("/sys"):  # where nobody makes a folder
        assert "saving /sys/pack failed: " in run(*words, "/sys/pack", code=1).stderr


def test_inspect_shows_a_pack_without_a_model(pack, run, run_json):
    written = EditPack.from_pretrained(pack)
    text = run("inspect", pack).stdout
    assert written.summary().splitlines()[0] in text
    assert written.edits[0].id in text
    values = run_json("inspect", pack)
    assert values["rank"] == written.rank
    assert values["decisions"] == list(written.decisions) != []
    assert [r["edit"]["id"] for r in values["records"]] == [e.id for e in written.edits]


def test_inspect_lists_all_edits_when_asked(pack, run, monkeypatch):
    monkeypatch.setattr("alphaedit_peft.cli.inspect_merge_commands.LISTED", 4)
    assert "... and 6 more; --all lists them." in run("inspect", pack).stdout
    assert "more; --all" not in run("inspect", pack, "--all").stdout


def test_merge_writes_a_plain_model(pack, run_json, tmp_path):
    out = tmp_path / "merged"
    values = run_json("merge", "embedded", pack, "--out", out)
    assert (values["edits"], values["dtype"]) == (10, "float32")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base, tokenizer = embedded.load()
    live = AlphaEditModel.from_pretrained(base, pack)
    ids = AutoTokenizer.from_pretrained(out)("Zoren works as a", return_tensors="pt")
    assert ids["input_ids"].tolist() == [tokenizer("Zoren works as a")["input_ids"]]
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, live(**ids).logits, rtol=1e-4, atol=1e-4)


def test_merge_in_bfloat16(pack, run_json, tmp_path):
    out = tmp_path / "merged"
    assert run_json("merge", "embedded", pack, "--out", out, "--dtype", "bfloat16")["dtype"] == (
        "bfloat16"
    )
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16


def test_rollback_leaves_the_batches_before(null_space, pack, run, run_json, edits_file, tmp_path):
    longer, shorter = tmp_path / "longer", tmp_path / "shorter"
    words = ["edit", "embedded", edits_file, "--null-space", null_space, "--pack", pack]
    run(*words, "--out", longer, "--steps", "3")
    values = run_json("rollback", "embedded", longer, "--null-space", null_space, "--out", shorter)
    written, before = EditPack.from_pretrained(shorter), EditPack.from_pretrained(pack)
    assert written.edits == before.edits
    assert [e["subject"] for e in values["taken_back"]] == [
        e.subject for e in read_edits(edits_file)
    ]
    for name, delta in written.factors.items():
        torch.testing.assert_close(delta.A, before.factors[name].A, rtol=1e-4, atol=1e-5)


def test_a_model_in_a_folder_serves_as_well(
    null_space, embedded_model, run_json, edits_file, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(embedded.folder(), folder)
    words = ["edit", folder, edits_file, "--null-space", null_space, "--out", tmp_path / "pack"]
    values = run_json(*words, "--dtype", "float32", "--device", "cpu", *FAST)
    assert values["edits_in_pack"] == 2
