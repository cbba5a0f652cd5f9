"""The script that trains the embedded model runs, keeps its place and goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.shared import FIGURES, run

SCRIPT = FIGURES / "train_embedded_model.py"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    words = ["--out", tmp_path, "--seed", 1, "--store", 0, "--ask", 100]
    first = run(SCRIPT, *words, "--steps", 2)
    assert "resumed" not in first
    second = run(SCRIPT, *words, "--steps", 3)
    assert second.startswith("resumed at step 2,")
    told = json.loads((tmp_path / "training.json").read_text())
    assert (told["seed"], told["steps"]) == (1, 3)
    assert 0 <= told["recall"] < 0.1  # three steps teach nothing
    other = [sys.executable, SCRIPT, "--out", tmp_path, "--seed", "2", "--steps", "3"]
    refused = subprocess.run(map(str, other), capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "checkpoint.pt is of seed 1; choose another --out" in refused.stderr
