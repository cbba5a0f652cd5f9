"""Real records on real pretrained models, end to end; skipped where the shared data is absent."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from alphaedit_peft import AlphaEditConfig, AlphaEditModel, NullSpace, get_alphaedit_model
from alphaedit_peft.editing.batch import score
from alphaedit_peft.model.prepare import running
from tests import shared
from tests.conftest import PEFT_ALONE

pytestmark = [pytest.mark.shared_data, pytest.mark.slow, PEFT_ALONE]


def share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def edited(folder, name: str, edits, tokens: int, **settings):
    base, tokenizer = shared.load_lm(folder / name)
    config = AlphaEditConfig(**settings)
    texts = shared.wikitext(folder)
    space = NullSpace.from_texts(base, tokenizer, texts, config, max_tokens=tokens, progress=False)
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    return model, model.edit(edits, progress=False), space


def prefers_new(model, prompts) -> float:
    """Share of (prompt, new, true) where the new target has the higher mean log-probability."""
    with running(model, model.edit_adapters["default"]) as (runner, _):
        rows = [
            [runner.renderer.target_row(prompt, target) for prompt, *targets in prompts
             for target in [targets[i]]]
            for i in (0, 1)
        ]  # fmt: skip
        new, true = (score(runner, part) for part in rows)
    pairs = zip(new, true, strict=True)
    return share(n.log_prob / n.num_tokens > t.log_prob / t.num_tokens for n, t in pairs)


def test_fifty_counterfact_records_on_a_model_that_knows_them(shared_data, tmp_path, capsys):
    records = shared.counterfact(shared_data, "counterfact-lm-7m")[:50]
    edits = [shared.counterfact_edit(record) for record in records]
    model, report, _ = edited(shared_data, "counterfact-lm-7m", edits, 60_000)
    figures = {
        "efficacy": prefers_new(model, [(e.question, e.target_new, e.target_true) for e in edits]),
        "generalization": prefers_new(
            model, [(p, e.target_new, e.target_true) for e in edits for p in e.paraphrases]
        ),
        "specificity": 1 - prefers_new(
            model, [(p, e.target_new, e.target_true) for e in edits for p in e.neighborhood]
        ),
    }  # fmt: skip
    with capsys.disabled():
        print(f"\n{report}\ncounterfact-lm-7m, 50 edits: {figures}")
    assert len(report.made) == 50
    assert figures["efficacy"] >= 0.6
    assert figures["generalization"] >= 0.4
    assert figures["specificity"] >= 0.75
    model.save_pretrained(tmp_path)
    again, tokenizer = shared.load_lm(shared_data / "counterfact-lm-7m")
    ids = tokenizer(edits[0].question, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(ids).logits
        theirs = PeftModel.from_pretrained(again, tmp_path)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("source", ["counterfact", "zsre"])
def test_twenty_records_on_a_real_llama(shared_data, source, tmp_path, capsys):
    if source == "zsre":
        edits = shared.zsre_edits(shared_data, 20)
    else:
        edits = [shared.counterfact_edit(r) for r in shared.counterfact(shared_data)[:20]]
    # 64 dimensions hold few null directions: protect less, and trust keys less
    settings = {"threshold": 0.1, "threshold_mode": "energy", "ridge": 1.0}
    model, report, space = edited(shared_data, "stories260K-hf", edits, 20_000, **settings)
    with capsys.disabled():
        print(f"\n{report}")
    assert len(report.made) + len(report.set_aside) == 20
    before, after = (
        torch.tensor([getattr(r, f"probability_{when}") for r in report.made], dtype=torch.float64)
        .log()
        .mean()
        for when in ("before", "after")
    )
    assert after > before
    model.save_pretrained(tmp_path)
    base, tokenizer = shared.load_lm(shared_data / "stories260K-hf")
    loaded = AlphaEditModel.from_pretrained(base, tmp_path, tokenizer=tokenizer, null_space=space)
    assert [edit.id for edit in loaded.edits] == [r.edit.id for r in report.made]
    loaded.rollback()
    assert loaded.edits == []
