"""Target values found in bfloat16: close to float32's, in float32, and as good for an edit."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.targets import optimise_targets
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, runner_for, settings
from tests.shared import embedded_edits


def targets(family: str, tokenizer, **changes):
    runner = runner_for(tiny_model(family), tokenizer, settings(**changes))
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    return optimise_targets(runner, [Group((r,)) for r in rows])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_target_values_are_close_to_float32s_and_are_float32(family, tokenizer):
    exact = targets(family, tokenizer)
    found = targets(family, tokenizer, autocast="bfloat16")
    assert found.values.dtype == torch.float32
    assert torch.equal(found.hidden, exact.hidden)
    moved, wanted = found.values - found.hidden, exact.values - exact.hidden
    assert float(torch.cosine_similarity(moved, wanted).min()) > 0.98
    assert not torch.equal(moved, wanted)
    assert found.losses.tolist() == pytest.approx(exact.losses.tolist(), rel=0.05)


@pytest.mark.parametrize("value", ["float16", "bf16", True])
def test_dtypes_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"autocast={value!r} is unknown; use one of"):
        AlphaEditConfig(autocast=value)


@pytest.mark.slow
def test_as_many_edits_of_the_embedded_model_take():
    edits = embedded_edits(40, 2)
    said = {}
    base, tokenizer = embedded.load()
    space = NullSpace.from_texts(base, tokenizer, embedded.texts(800), AlphaEditConfig())
    for autocast in (None, "bfloat16"):
        base, tokenizer = embedded.load()
        config = AlphaEditConfig(autocast=autocast, num_contexts=2)
        model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
        report = model.edit(edits, progress=False)
        said[autocast] = [result.likeliest for result in report]
    assert said["bfloat16"] == said[None]
    assert sum(said[None]) > 10
