"""The examples of this package run as a reader would run them, with tiny numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alphaedit_peft import embedded
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def weights() -> None:
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")


def run(script: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_comparison_and_its_picture(weights, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--edits", "2", "--batch-size", "1", "--every", "1", "--seeds", "0"]
    words += ["--methods", "alphaedit", "finetuning", "--folder", tmp_path]
    text = run("examples/compare_editors.py", *words)
    assert "alphaedit" in text
    assert "seconds an edit" in text
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["methods"]["alphaedit"]["final"]["efficacy"]["value"] == 1.0
    run("docs/figures/plot_results.py", tmp_path / "results.json", tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_editing_on_and_on_is_judged_after_each_batch(weights, tmp_path):
    out = tmp_path / "lifelong.json"
    words = ["--edits", "4", "--batch-size", "2", "--ridges", "none", "--texts", "400"]
    words += ["--results", out]
    text = run("docs/figures/lifelong.py", *words)
    assert "embedded, none | not by 4 | not by 4" in text
    (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    assert [row["edits"] for row in rows] == [2, 4]
    assert all(row["all"] == 1.0 and not row["warned"] for row in rows)
    assert rows[0]["used"] < rows[1]["used"] < 0.33


@pytest.mark.slow
def test_every_block_is_traced_and_edited(weights, tmp_path):
    pytest.importorskip("matplotlib")
    text = run(
        "docs/figures/plot_locating.py", tmp_path / "locate.png", "--facts", "1", "--texts", "400"
    )
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| block", *(f"| {block}" for block in range(5))]
    assert {len(row) for row in rows} == {8}
    assert (tmp_path / "locate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("counterfact-lm-7m", "counterfact_600.json"),
        ("counterfact-lm-7m", "zsre_eval_700.json"),
    ],
)
def test_the_benchmark_on_shared_records(shared_data, tmp_path, model, data):
    words = [shared_data / model, shared_data / data, "--folder", tmp_path]
    words += ["--texts", shared_data / "wikitext2_valid.txt", "--max-tokens", "20000"]
    words += ["--edits", "3", "--batch-size", "2", "--methods", "alphaedit"]
    text = run("examples/counterfact_benchmark.py", *words)
    assert "efficacy" in text
    assert (tmp_path / "alphaedit-0" / "results.jsonl").is_file()
