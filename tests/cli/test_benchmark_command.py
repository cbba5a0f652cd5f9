"""``alphaedit benchmark`` from the shell, on a shape of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import write_lines

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 300,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QUICK = ("--edits", 2, "--steps", 2, "--device", "cpu", "--statistics-tokens", 200)


@pytest.fixture
def shape(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE), encoding="utf-8")
    return path


@pytest.mark.slow
def test_it_measures_both_objectives_and_the_plain_way(run, shape, tmp_path):
    out = tmp_path / "found.json"
    words = ["benchmark", "--shape", shape, *QUICK, "--plain", "--plain-edits", 1, "--inference"]
    text = run(*words, "--batches", 2, "--repeats", 2, "--out", out).stdout
    for said in (
        "config.json: 0.2M parameters, float32, random weights",
        "all of them run (stop_loss 0)",
        *("alphaedit 2", "memit 1", "plain, scaled", "floor"),
        *("times MEMIT's time", "The plain way takes", "Matrix rates of this machine"),
        *("decomposed", "unmerged, rank 1000", "Written to"),
    ):
        assert said in " ".join(text.split())
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["head"]["settings"]["steps"] == 2
    assert found["head"]["model"]["random"] is True
    assert [len(session["batches"]) for session in found["sessions"]] == [2, 2]
    assert all(b["rows"] == b["edits"] == 2 for s in found["sessions"] for b in s["batches"])
    assert found["plain"]["edits"] == 1
    assert found["requests"] == "made up as counterfact"


@pytest.mark.slow
def test_json_on_stdout_is_what_the_file_holds(run_json, shape, tmp_path):
    out = tmp_path / "found.json"
    words = ["benchmark", "--shape", shape, *QUICK, "--objective", "alphaedit", "--no-floor"]
    words += ["--statistics", "random", "--dtype", "bfloat16", "--requests", "zsre", "--out", out]
    values = run_json(*words)
    assert values == json.loads(out.read_text(encoding="utf-8"))
    assert values["head"]["model"]["dtype"] == "bfloat16"
    assert values["sessions"][0]["floor"] is None
    assert values["alphaedit_to_memit"] is None
    assert set(values["statistics"]) == {"drawn", "first use by alphaedit"}


@pytest.mark.slow
def test_edits_of_ones_own_on_a_model_of_ones_own(shown, embedded_model, edits_file, run_json):
    words = ["benchmark", embedded_model, *QUICK, "--edits-file", edits_file, "--no-floor"]
    words += ["--null-space", shown[0] / "null_space", "--objective", "alphaedit"]
    values = run_json(*words, "--layers", "0-1")
    assert values["requests"] == edits_file.name
    assert values["head"]["statistics"] == "given"
    assert values["head"]["model"]["random"] is False
    assert values["sessions"][0]["batches"][0]["made"] == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "give either MODEL or --shape"),
        (("embedded", "--shape", "lab-gpt2"), "give either MODEL or --shape"),
        (("--shape", "lab-gpt2", "--objective", "rome"), "rome"),
        (("--shape", "lab-gpt2", "--edits", "0"), "--edits"),
        (("--shape", "lab-gpt2", "--layers", "3-1"), "3-1"),
        (("--shape", "lab-gpt2", "--out", "."), "is a folder"),
        (("--shape", "lab-gpt2", "--curves", "huge"), "huge"),
        (("embedded", "--null-space", "ns"), "MEMIT needs key moments"),
        (("embedded", "--plain-edits", "2"), "--plain-edits 2 is for the plain way; give --plain"),
        (
            ("embedded", "--plain", "--edits", "5", "--plain-edits", "7"),
            "--plain-edits 7 is more than the 5 edits of a batch; give 5 or fewer",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_before_any_work(run, words, named):
    assert named in " ".join(run("benchmark", *words, code=2).output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "gpt-9"), "shape 'gpt-9' is neither one of"),
        (("--shape", "lab-gpt2", "--device", "auto"), "--device auto spreads a checkpoint"),
        (("--shape", "lab-gpt2", "--device", "abacus"), "--device 'abacus' cannot be used"),
        (("--shape", "lab-gpt2", "--out", "no/such/file.json"), "there is no folder no/such"),
        (
            ("--shape", "lab-gpt2", "--edits-file", "none.jsonl"),
            "none.jsonl: there is no such file",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(run, words, said):
    assert said in run("benchmark", *words, code=1).stderr


def test_too_few_edits_of_ones_own_are_refused(run, shape, tmp_path):
    path = write_lines(
        tmp_path / "one.jsonl", {"subject": "w20", "prompt": "{} is w30", "target_new": "w40"}
    )
    words = ["benchmark", "--shape", shape, *QUICK, "--edits-file", path]
    assert "1 edits are too few for 1 batches of 2" in run(*words, code=1).stderr
