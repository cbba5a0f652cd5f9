"""Benchmark figures on pages: tables and pictures made of the JSON alone."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from alphaedit_peft.studies.benchmark import Findings, Forward, PlainSession, Session
from alphaedit_peft.studies.benchmark.pages import lines
from alphaedit_peft.studies.benchmark.timings import Batch, Floor
from tests.conftest import ROOT

WRITTEN = runpy.run_path(str(ROOT / "docs" / "figures" / "benchmark_tables.py"))
BEGIN, END, page_with, tables = (WRITTEN[n] for n in ("BEGIN", "END", "page_with", "tables"))

SECONDS = {"contexts": 1.0, "keys": 0.25, "targets": 6.0, "solve": 0.5, "write": 0.0, "score": 0.25}
HEAD = {
    "machine": {"processor": "a processor", "threads": 2, "versions": {"torch": "2.9"}},
    "model": {
        "name": "lab-llama",
        "random": True,
        "parameters": 58_000_000,
        "dtype": "float32",
        "autocast": None,
    },
    "settings": {"steps": 25, "stop_loss": 0.0},
    "statistics": "3584 tokens, random words",
    "plan": {"edits": 100, "repeats": 3},
}


@pytest.fixture
def found() -> dict:
    floor = Floor({"targets": {"float32": 10**12}}, {"targets": 3.0, "solve": 0.1}, 5000.0)
    first = Batch(100, 0, 100, 100, 25.0, SECONDS, (8.0, 9.0, 7.0), (1.0,) * 3, 50 * 2**20)
    second = Batch(100, 100, 100, 100, 25.0, SECONDS, (7.5,) * 3, (0.0,) * 3, 60 * 2**20)
    plain = PlainSession(10, 100, ({"targets": 4.0, "solve": 2.0},) * 3, 2**30, floor)
    sessions = (Session("alphaedit", (first, second), floor), Session("memit", (first,)))
    forwards = (Forward("base", 0, 256, 50.0), Forward("unmerged", 1000, 256, 75.0))
    values = Findings(HEAD, {"float32": 1e11}, {"collected": 3.0}, sessions, plain, forwards)
    return {**json.loads(json.dumps(values.to_json())), "requests": "made up as zsre"}


def test_a_line_for_each_batch_and_floor_and_the_plain_way(found):
    assert [line.name for line in lines(found)] == [
        *("alphaedit, batch 1", "its floor", "alphaedit, batch 2", "memit, batch 1"),
        *("plain, 10 of 100 edits, scaled", "its floor"),
    ]
    assert [line.total for line in lines(found)] == pytest.approx([8.0, 3.1, 7.5, 8.0, 42.0, 30.1])


def test_tables_hold_the_figures_and_how_far_they_are_from_the_floor(found):
    text = tables(found)
    assert "### lab-llama, float32, 100 edits made up as zsre" in text
    assert "| alphaedit, batch 1 | 1.000 | 0.250 | 6.000 | 0.500 |  | 0.250 | 8.000 | 50 |" in text
    assert "75 %, 2.0 x" in text  # of the targets: 6 of 8 seconds, twice 3
    assert "the plain way takes 6 (5.25 to 7) times AlphaEdit's" in text  # 42 to 8, 9, 7 less 1
    assert "| unmerged, rank 1,000 | 75.0 | 3,413 | 1.50 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_ratios_of_earlier_versions_are_read_too(found):
    text = tables(found | {"alphaedit_to_memit": 1.0764, "plain_to_ours": 5.094})
    assert "AlphaEdit takes 1.08 times MEMIT's seconds; the plain way takes 5.09 times" in text


def test_a_page_gets_the_tables_between_its_marks_and_keeps_the_rest(found):
    page = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
    once = page_with(page, [found])
    assert once.startswith("# Title\n\n")
    assert once.endswith(f"{END}\n\nThe end.\n")
    assert "old" not in once
    assert page_with(once, [found]) == once
    with pytest.raises(ValueError, match="the page needs the lines"):
        page_with("# Title\n", [found])


def test_the_projects_page_has_the_marks():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1


@pytest.mark.slow
def test_the_example_draws_pictures_and_fills_a_page(found, tmp_path):
    pytest.importorskip("matplotlib")
    point = {"seconds": 1.0, "state": 2**20, "memory": 2**20, "floor": None}
    points = [
        {**point, "curve": curve, "method": method, "at": at}
        for curve, methods in (("edits", ("ours", "plain")), ("depths", ("batch",)))
        for method in methods
        for at in (1, 2)
    ]
    (tmp_path / "model.json").write_text(json.dumps(found))
    (tmp_path / "curves.json").write_text(json.dumps({"curves": {"points": points}}))
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    data = [tmp_path / "model.json", tmp_path / "curves.json"]
    script = ROOT / "docs" / "figures" / "plot_benchmark.py"
    words = [script, *data, "--images", tmp_path, "--docs", page]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("profile", "growth"):
        assert (tmp_path / f"benchmark_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "### lab-llama, float32" in page.read_text(encoding="utf-8")
