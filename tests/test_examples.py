"""The examples and the README's Python run as a reader would run them, and stay short."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, KeyMoments, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.evaluation import embedded_suite
from tests.conftest import ROOT
from tests.pack.conftest import make_pack

EXAMPLES, FIGURES = ROOT / "examples", ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def weights() -> None:
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")


def run(script: Path, *words: object, cwd: Path = ROOT) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_shorter_than_sixty_lines(script):
    assert len(script.read_text().splitlines()) < 60


@pytest.mark.slow
def test_quickstart(weights):
    text = run(EXAMPLES / "quickstart.py")
    assert text.count(" -> ") >= 3
    assert "The pack says the same with PEFT alone." in text


@pytest.mark.slow
def test_continue_editing(weights):
    assert "equal to the uninterrupted run" in run(EXAMPLES / "continue_editing.py")


@pytest.mark.slow
def test_join_packs(weights, tmp_path):
    text = run(EXAMPLES / "join_packs.py", "--edits", "4", "--folder", tmp_path / "packs")
    line = r"^(\w+) +first pack's edits +(\d+) % P [\d.]+  second pack's edits +(\d+) % P [\d.]+$"
    found = re.findall(line, text, re.MULTILINE)
    assert [state for state, *_ in found] == ["first", "second", "added", "joined", "poured"]
    assert found[-2:] == [("joined", "100", "100"), ("poured", "100", "100")]


@pytest.mark.slow
def test_remove_edits_and_compress_pack(weights, tmp_path):
    base, tokenizer = embedded.load()
    config = AlphaEditConfig(num_contexts=2, threshold=0.02, threshold_mode="energy")
    space = NullSpace.from_texts(base, tokenizer, embedded.texts(800), config, progress=False)
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    model.edit(embedded_suite(8).edits, progress=False)
    space.save_pretrained(tmp_path / "ns")
    model.save_pretrained(tmp_path / "pack")
    text = run(FIGURES / "remove_edits.py", "embedded", tmp_path / "pack", tmp_path / "ns")
    line = r"^\| ([\w ]+) \| ([\d.]+)% \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+) \|$"
    found = {state: [*map(float, row)] for state, *row in re.findall(line, text, re.MULTILINE)}
    assert list(found) == ["all edits", "without", "columns dropped", "remove_edits"]
    assert found["all edits"][0] == 0 == found["all edits"][2] - 100
    assert found["without"][0] < found["columns dropped"][0]
    for state in ("without", "remove_edits"):
        assert found[state][1] > 0.5 > 0.1 > found[state][3]
    assert "7 edits stay, 1 go; shares of these still in force: 0." in text
    text = run(EXAMPLES / "compress_pack.py", tmp_path / "pack")
    ranks = re.findall(r"^\| (\d) of 8 \| (\w+) \| [\d.]+% \| [\d.]+% \|$", text, re.MULTILINE)
    assert ranks[:2] == [("8", "bfloat16"), ("8", "float16")]
    assert [rank for rank, _ in ranks[2:]] == ["7", "7", "6", "4", "2"]


@pytest.mark.slow
def test_the_readme(weights, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    text = run(script, cwd=tmp_path)
    assert "1 edits made, 0 set aside, 1 say their target greedily" in text
    assert (tmp_path / "pack" / "adapter_model.safetensors").is_file()


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
