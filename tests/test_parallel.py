"""Several processes share the work: what each does alone, and two of them against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from alphaedit_peft import AlphaEditConfig, EditPack, KeyMoments, parallel
from tests.conftest import CORPUS, ROOT, tiny_model

PREAMBLE = """
import os, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from pathlib import Path
from alphaedit_peft import AlphaEditConfig, Edit, KeyMoments, get_alphaedit_model
from alphaedit_peft import parallel, progress
from tests.conftest import CORPUS, tiny_model
from transformers import AutoTokenizer

out = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
"""

EDITING = """
progress.watched = lambda: True
base = tiny_model("llama")
# this process draws other contexts than the main one would
config = AlphaEditConfig(
    rewrite_layers=[1, 2], steps=6, num_contexts=2, context_length=4, tokens_per_batch=64,
    seed=parallel.rank(),
)
moments = KeyMoments.collect(base, tokenizer, CORPUS * 40, config, resume=out / "sums.safetensors")
moments.save_pretrained(out / "moments")
null_space = moments.null_space(0.02, "energy")
model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=null_space)
edits = [
    Edit(subject=subject, prompt="{} was born in", target_new=target)
    for subject, target in [("Anna", "Rome"), ("Albert", "Ulm"), ("Marie Curie", "Paris")]
]
report = model.edit(edits, batch_size=3)
model.save_pretrained(out / "pack")
model.to_pack().save_pretrained(out / f"of-{parallel.rank()}")
"""

FAILING = """
from alphaedit_peft.nullspace.corpus import token_batches

def texts():
    yield from CORPUS
    if parallel.rank() == 1:
        raise OSError("the disk of this process is gone")

config = AlphaEditConfig(rewrite_layers=[1, 2])
try:
    KeyMoments.collect(tiny_model("llama"), tokenizer, texts(), config)
except (OSError, parallel.OtherProcessError) as error:
    (out / f"error-{parallel.rank()}").write_text(f"{type(error).__name__}: {error}")
"""

FAILING_ANYWHERE = """
from alphaedit_peft import NullSpace
from alphaedit_peft.editing import batch
from alphaedit_peft.nullspace import moments
from alphaedit_peft.parallel import OtherProcessError

base = tiny_model("llama")
config = AlphaEditConfig(rewrite_layers=[1, 2], steps=2, contexts=[])
space = NullSpace.identity({1: 96, 2: 96})
model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
before = {name: value.clone() for name, value in model.state_dict().items()}
edits = [Edit("Anna", "{} was born in", "Rome"), Edit("Albert", "{} was born in", "Ulm")]

def gone(*_, **__):
    raise OSError("the disk of this process is gone")

def told(name, work):
    try:
        work()
    except (OSError, OtherProcessError) as error:
        (out / f"{name}-{parallel.rank()}").write_text(f"{type(error).__name__}: {error}")

solve_layers, combined = batch.solve_layers, moments._combined
if parallel.rank() == 1:
    batch.solve_layers, moments._combined = gone, gone
told("edit", lambda: model.edit(edits, progress=False))
told("statistics", lambda: KeyMoments.collect(base, tokenizer, CORPUS, config, progress=False))
batch.solve_layers, moments._combined = solve_layers, combined
assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
model.edit(edits, progress=False)  # all of them are in step again
if parallel.rank() == 1:
    os._exit(0)  # ended from outside
told("killed", lambda: model.edit(edits[:1], progress=False))
os._exit(0)
"""

SHARING = """
import json
state = torch.arange(5) * 10
def work(mine):
    seen.append(list(mine))
    return [torch.tensor(mine) * 2.0, torch.tensor([[i, i] for i in mine])]
seen = []
first, second = parallel.share([1, 2, 3, 4, 5], work)
alone = parallel.share([7], work)
found = {
    "rank": parallel.rank(), "count": parallel.count(), "main": parallel.is_main(),
    "seen": seen, "first": first.tolist(), "second": second.tolist(), "alone": alone[0].tolist(),
    "from_main": parallel.from_main(lambda: f"made by {parallel.rank()}"),
    "gathered": parallel.gathered(parallel.rank() + 10),
    "summed": parallel.summed(torch.tensor([1.0, parallel.rank()])).tolist(),
}
try:
    parallel.require_same(parallel.rank(), "the rank")
except RuntimeError as error:
    found["differs"] = str(error)
(out / f"found-{parallel.rank()}.json").write_text(json.dumps(found))
"""


def launch(script: str, out: Path, processes: int) -> str:
    """Run a script in processes, as ``accelerate launch`` does on GPUs."""
    path = out / "script.py"
    path.write_text(PREAMBLE + script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python = [sys.executable, *(torchrun if processes > 1 else [])]
    found = subprocess.run(
        [*python, str(path), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stderr


@pytest.fixture
def out(tmp_path, tokenizer):
    def folder(name: str) -> Path:
        tokenizer.save_pretrained(tmp_path / name / "tokenizer")
        return tmp_path / name

    return folder


def test_one_process_does_all_of_it_itself():
    assert (parallel.count(), parallel.rank(), parallel.is_main()) == (1, 0, True)
    assert parallel.gathered("a") == ["a"]
    assert parallel.from_main(lambda: 3) == 3
    matrix = torch.ones(2)
    assert parallel.summed(matrix) is matrix
    seen = []
    (found,) = parallel.share([1, 2], lambda mine: (seen.append(mine), [torch.tensor(mine)])[1])
    assert (found.tolist(), seen) == ([1, 2], [[1, 2]])
    parallel.require_same(1, "one")
    with pytest.raises(KeyError), parallel.in_step():
        raise KeyError("own errors pass")


@pytest.mark.parametrize("name", parallel.LAUNCHED)
def test_an_environment_without_all_of_a_launchers_variables_is_one_process(monkeypatch, name):
    for each in parallel.LAUNCHED:
        monkeypatch.setenv(each, "2")
    monkeypatch.delenv(name)
    assert parallel.count() == 1


@pytest.mark.slow
def test_two_processes_share_and_sum(out):
    folder = out("two")
    launch(SHARING, folder, 2)
    zero, one = (json.loads((folder / f"found-{r}.json").read_text()) for r in (0, 1))
    assert (zero["rank"], zero["main"], one["rank"], one["main"]) == (0, True, 1, False)
    assert (zero["seen"], one["seen"]) == ([[1, 3, 5], [7]], [[2, 4], [7]])
    for found in (zero, one):
        assert found["first"] == [2, 4, 6, 8, 10]
        assert found["second"] == [[i, i] for i in range(1, 6)]
        assert (found["alone"], found["count"]) == ([14], 2)
        assert (found["from_main"], found["gathered"]) == ("made by 0", [10, 11])
        assert found["summed"] == [2, 1]
        assert "the rank differs between process 0 and process 1" in found["differs"]


@pytest.mark.slow
def test_where_one_process_fails_the_others_say_so_instead_of_waiting(out):
    folder = out("failing")
    launch(FAILING, folder, 2)
    assert (folder / "error-1").read_text() == "OSError: the disk of this process is gone"
    assert (
        (folder / "error-0")
        .read_text()
        .startswith(
            "OtherProcessError: process 1 of 2 failed (OSError: the disk of this process is gone)"
        )
    )


@pytest.mark.slow
def test_a_process_that_fails_anywhere_ends_the_others_with_its_reason(out):
    folder = out("anywhere")
    launch(FAILING_ANYWHERE, folder, 2)
    reason = "OSError: the disk of this process is gone"
    for name in ("edit", "statistics"):
        assert (folder / f"{name}-1").read_text() == reason
        told = (folder / f"{name}-0").read_text()
        assert told.startswith(f"OtherProcessError: process 1 of 2 failed ({reason})")
    told = (folder / "killed-0").read_text()
    assert told.startswith("OtherProcessError: process 0 of 2 lost the others (")


def begun(folder: Path, tokenizer) -> int:
    """Leave a checkpoint of part of the corpus, as one interrupted process does."""

    def texts():
        yield from CORPUS * 32
        raise KeyboardInterrupt

    config = AlphaEditConfig(rewrite_layers=[1, 2], tokens_per_batch=64)
    path = folder / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        KeyMoments.collect(
            tiny_model("llama"), tokenizer, texts(), config, resume=path, progress=False
        )
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["notes"])["counts"]["tokens"]


@pytest.mark.slow
def test_two_processes_end_with_one_pack_and_the_numbers_of_one_process(out, tokenizer):
    one, two = out("one"), out("two")
    assert begun(two, tokenizer) > 0, "the two go on from there"
    bars = launch(EDITING, one, 1), launch(EDITING, two, 2)
    assert [bar.count("edits:   0%|") for bar in bars] == [1, 1], "only the main process shows it"
    packs = [EditPack.from_pretrained(two / name) for name in ("of-0", "of-1", "pack")]
    assert len({pack.digest() for pack in packs}) == 1
    assert len({pack.contexts for pack in packs}) == 1
    alone = EditPack.from_pretrained(one / "pack")
    assert alone.contexts == packs[0].contexts
    for name, delta in alone.factors.items():
        torch.testing.assert_close(packs[0].factors[name].A, delta.A, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packs[0].factors[name].B, delta.B, rtol=1e-2, atol=1e-3)
    notes = [json.loads((at / "moments" / "key_moments.json").read_text()) for at in (one, two)]
    assert notes[0] == notes[1], "token counts, hashes and provenance"
