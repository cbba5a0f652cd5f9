"""What outlives a process: going on from a pack, and loading one without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, get_alphaedit_model
from tests.conftest import tiny_model

LAYERS = [0, 1]
EDITS = [
    Edit("France", "The capital of {} is", "Rome", id="0"),
    Edit("Marie Curie", "{} was born in", "Paris", id="1"),
    Edit("Albert Einstein", "{} works as a", "river", id="2"),
    Edit("Anna Smith", "the mother tongue of {} is", "French", id="3"),
    Edit("Italy", "The capital of {} is", "Paris", id="4"),
]

GO_ON = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from alphaedit_peft import AlphaEditModel, NullSpace, read_edits

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = AlphaEditModel.from_pretrained(
    base,
    folder + "/half",
    tokenizer=AutoTokenizer.from_pretrained(folder + "/base"),
    null_space=NullSpace.from_pretrained(folder + "/null_space"),
)
model.edit(read_edits(folder + "/rest.jsonl"), batch_size=1, progress=False)
model.save_pretrained(folder + "/continued")
"""

LOAD_PLAINLY = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
ids = torch.arange(12).reshape(2, 6)
plain = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/whole"
).eval()
native = AutoModelForCausalLM.from_pretrained(folder + "/base")
native.load_adapter(folder + "/whole")
native.eval()
with torch.no_grad():
    found = {"peft": plain(ids).logits, "transformers": native(ids).logits}
save_file({name: logits.contiguous() for name, logits in found.items()}, folder + "/logits")
print("alphaedit_peft" in sys.modules)
"""


def in_new_process(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def run(request, tokenizer, tmp_path_factory):
    """(folder, model) of a run of five batches, saved after the third and at the end."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    NullSpace.identity(dict.fromkeys(LAYERS, 96)).save_pretrained(folder / "null_space")
    model = get_alphaedit_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        AlphaEditConfig(rewrite_layers=LAYERS, steps=6, stop_loss=0.0, num_contexts=2),
        tokenizer=AutoTokenizer.from_pretrained(folder / "base"),
        null_space=NullSpace.from_pretrained(folder / "null_space"),
    )
    model.edit(EDITS[:3], batch_size=1, progress=False)
    model.save_pretrained(folder / "half")
    model.edit(EDITS[3:], batch_size=1, progress=False)
    model.save_pretrained(folder / "whole")
    return folder, model


def test_a_new_process_goes_on_with_the_same_bits(run):
    from alphaedit_peft import write_edits

    folder, _ = run
    write_edits(EDITS[3:], folder / "rest.jsonl")
    in_new_process(GO_ON, folder)
    for name in ("adapter_model.safetensors", "alphaedit/targets.safetensors"):
        whole, continued = (load_file(folder / kind / name) for kind in ("whole", "continued"))
        assert whole.keys() == continued.keys()
        assert all(torch.equal(whole[key], continued[key]) for key in whole)
    assert next(iter(whole.values())).shape[0] == len(EDITS)


@torch.no_grad()
def test_a_process_without_this_package_computes_the_same(run):
    folder, model = run
    assert in_new_process(LOAD_PLAINLY, folder).split() == ["False"]
    ids = torch.arange(12).reshape(2, 6)
    ours = model.eval()(ids).logits
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, ours, atol=1e-3)
    for logits in load_file(folder / "logits").values():
        torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)
