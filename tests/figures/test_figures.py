"""Scripts that draw the docs' pictures and measure their figures run, with tiny numbers."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from alphaedit_peft import KeyMoments
from tests.pack.conftest import make_pack
from tests.shared import FIGURES, run


def test_the_picture_is_drawn_from_the_demos_json(tmp_path):
    pytest.importorskip("matplotlib")
    asked = [
        {
            "kind": kind,
            "answers": {
                "base": {"probability_new": 0.0, "probability_true": 1.0},
                "edited": {"probability_new": 0.9, "probability_true": 0.8},
            },
        }
        for kind in ("edit", "paraphrase", "same subject", "bystander")
    ]
    (tmp_path / "demo.json").write_text(json.dumps({"questions": asked}))
    run(FIGURES / "plot_demo.py", tmp_path / "demo.json", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_pictures_of_packs_are_drawn_from_their_files(tmp_path):
    pytest.importorskip("matplotlib")
    lower, other = make_pack(rows=5), make_pack(rows=3, seed=1)
    names = [f"Else {row}" for row in range(3)]
    records = [
        replace(record, edit=replace(record.edit, subject=name, id=""), prefix=name)
        for record, name in zip(other.records, names, strict=True)
    ]
    parent = {"operation": "beside", "name": "a", "digest": lower.digest(), "edits": 5}
    upper = replace(other, records=[*records[:2], replace(records[2], role="protected")])
    upper = replace(upper, parents=(parent,))
    for name, pack in (("a", lower), ("b", replace(other, records=records)), ("c", upper)):
        pack.save_pretrained(tmp_path / name)
    run(FIGURES / "plot_packs.py", tmp_path / "a", tmp_path / "b", tmp_path / "packs.png")
    run(FIGURES / "plot_rows.py", tmp_path / "a", tmp_path / "c", tmp_path / "rows.png")
    run(FIGURES / "draw_pack.py", tmp_path / "a", tmp_path / "format.png")
    moments = KeyMoments({0: torch.diag(torch.logspace(-4, 0, 8))}, 80, {0: "m"})
    moments.null_space(0.02, "energy").save_pretrained(tmp_path / "ns")
    run(FIGURES / "plot_null_space.py", tmp_path / "ns", tmp_path / "spectrum.png")
    for name in ("packs", "rows", "format", "spectrum"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_picture_of_a_packs_page(tmp_path):
    make_pack().save_pretrained(tmp_path / "pack")
    run(FIGURES / "picture_page.py", tmp_path / "pack", tmp_path / "page.png", "--height", "300")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_of_eigenvectors_is_measured(tmp_path):
    found = json.loads(run(FIGURES / "measure_decomposition.py", 96, tmp_path / "found.json"))
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert (found["d_in"], found["stored"][0]) == (96, 96)
    assert found["off_orthonormal"] < 1e-4
    assert found["seconds"] >= 0 <= found["peak_bytes"]


@pytest.mark.slow
def test_editing_on_and_on_is_judged_after_each_batch(weights, tmp_path):
    out = tmp_path / "lifelong.json"
    words = ["--edits", "4", "--batch-size", "2", "--ridges", "none", "--texts", "400"]
    words += ["--results", out]
    text = run(FIGURES / "lifelong.py", *words)
    assert "embedded, none | not by 4 | not by 4" in text
    (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    assert [row["edits"] for row in rows] == [2, 4]
    assert all(row["all"] == 1.0 and not row["warned"] for row in rows)
    assert rows[0]["used"] < rows[1]["used"] < 0.33


@pytest.mark.slow
def test_every_block_is_traced_and_edited(weights, tmp_path):
    pytest.importorskip("matplotlib")
    text = run(
        FIGURES / "plot_locating.py", tmp_path / "locate.png", "--facts", "1", "--texts", "400"
    )
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| block", *(f"| {block}" for block in range(5))]
    assert {len(row) for row in rows} == {8}
    assert (tmp_path / "locate.png").read_bytes().startswith(b"\x89PNG")
