"""The examples and the README's Python run as a reader would run them, and stay short."""

import json
import re

import pytest

from alphaedit_peft import AlphaEditConfig, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.evaluation import embedded_suite
from tests.conftest import ROOT
from tests.shared import FIGURES, run

EXAMPLES = ROOT / "examples"


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


@pytest.mark.slow
@pytest.mark.parametrize("page", ["my_model", "not_holding"])
def test_the_pages_for_a_first_model(weights, tmp_path, page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    script = tmp_path / "page.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    told = run(script, cwd=tmp_path)
    wanted = {"my_model": "[0, 1] model.layers.0.mlp.down_proj 1024", "not_holding": "(True,)"}
    assert wanted[page] in told


@pytest.mark.slow
def test_the_comparison_and_its_picture(weights, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--edits", "2", "--batch-size", "1", "--every", "1", "--seeds", "0"]
    words += ["--search", "2", "--methods", "alphaedit", "finetuning", "--folder", tmp_path]
    text = run(EXAMPLES / "compare_editors.py", *words)
    assert "alphaedit" in text
    assert "seconds an edit" in text
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["methods"]["alphaedit"]["final"]["efficacy"]["value"] == 1.0
    run(FIGURES / "plot_results.py", tmp_path / "results.json", tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


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
    text = run(EXAMPLES / "counterfact_benchmark.py", *words)
    assert "efficacy" in text
    assert (tmp_path / "alphaedit-0" / "results.jsonl").is_file()
