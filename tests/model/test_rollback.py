"""Taking edits back: from shared rows, step by step, and what a failed edit leaves."""

from __future__ import annotations

import math

import pytest
import torch

from alphaedit_peft import AlphaEditModel, Edit, NullSpace
from tests.conftest import tiny_model
from tests.model.test_model import EDITS, logits, wrap

BORN = Edit("Anna", "{} was born in", "Rome", id="born")
WORK = Edit("Anna", "{} works as a", "river", id="work")
ULM = Edit("Anna", "{} was born in", "Ulm", id="ulm")
OTHER = EDITS[0]


@pytest.fixture
def model(tokenizer):
    return wrap(tiny_model("llama"), tokenizer, contexts=[])


def reload(model, tokenizer, folder):
    model.save_pretrained(folder)
    return AlphaEditModel.from_pretrained(
        tiny_model("llama"),
        folder,
        tokenizer=tokenizer,
        null_space=NullSpace.identity({0: 96, 1: 96}),
    )


def ids(model) -> list[str]:
    return sorted(edit.id for edit in model.edits)


def same(one, other) -> bool:
    return all(
        torch.allclose(one.factors[k].dense(), other.factors[k].dense(), atol=1e-4)
        for k in one.factors
    )


@pytest.mark.parametrize("together", [True, False])
def test_an_edit_removed_from_a_shared_row_is_gone(model, tokenizer, together):
    alone = wrap(tiny_model("llama"), tokenizer, contexts=[])
    alone.edit([BORN], progress=False)
    model.edit([BORN, WORK] if together else [BORN], progress=False)
    if not together:
        model.edit([WORK], progress=False)
    model.remove_edits(["work"])
    assert ids(model) == ["born"]
    assert same(model, alone)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("poured_again", [True, False])
def test_rolling_back_one_by_one_equals_all_at_once(
    model, tokenizer, tmp_path, fresh, poured_again
):
    for edit in (BORN, WORK, OTHER):
        model.edit([edit], progress=False)
    if poured_again:
        model.repour()
    if fresh:
        model = reload(model, tokenizer, tmp_path)
    model.rollback()
    assert ids(model) == ["born", "work"]
    model.rollback()
    assert ids(model) == ["born"]
    alone = wrap(tiny_model("llama"), tokenizer, contexts=[])
    alone.edit([BORN], progress=False)
    assert same(model, alone)
    model.rollback()
    assert model.edits == []


def test_rollback_brings_a_replaced_edit_back(tokenizer, tmp_path):
    model = wrap(tiny_model("llama"), tokenizer, contexts=[], on_conflict="replace")
    model.edit([BORN], progress=False)
    first = {layer: delta.dense() for layer, delta in model.factors.items()}
    for edit in (ULM, OTHER):
        model.edit([edit], progress=False)
    assert ids(model) == ["france", "ulm"]
    loaded = reload(model, tokenizer, tmp_path)
    loaded.rollback()
    assert ids(loaded) == ["ulm"]
    loaded.rollback()
    assert ids(loaded) == ["born"]
    for layer, delta in loaded.factors.items():
        assert torch.allclose(delta.dense(), first[layer], atol=1e-4)


def test_a_replacement_that_is_not_made_replaces_nothing(tokenizer):
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.embed_tokens.weight[tokenizer("Anna")["input_ids"][-1]] *= 1e4
    still = {"learning_rate": 1e-6, "learning_rate_mode": "absolute"}
    model = wrap(base, tokenizer, contexts=[], on_conflict="replace", **still)
    model.edit([BORN], progress=False)
    report = model.edit([*EDITS[:3], ULM], progress=False)
    assert not report.results[3].made
    assert "born" in ids(model)
    assert "superseded" not in {record.role for record in model.records}


def test_a_batch_without_an_edit_is_no_batch(model, tokenizer, monkeypatch):
    model.edit([OTHER], progress=False)
    monkeypatch.setattr(model.alphaedit_config, "learning_rate", math.nan)
    report = model.edit([BORN], progress=False)
    assert "lower learning_rate" in report.results[0].reason
    model.rollback()
    assert model.edits == []
    with model.disable_adapter():
        plain = logits(model, tokenizer)
    assert torch.equal(logits(model, tokenizer), plain)


def test_inference_mode_is_refused_and_harms_nothing(model):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="edit outside of it"):
        model.edit([BORN], progress=False)
    model.edit([BORN], progress=False)
    assert ids(model) == ["born"]


def test_ids_are_a_list(model):
    model.edit([BORN], progress=False)
    with pytest.raises(TypeError, match="edit_ids='born' is one text; pass a list"):
        model.remove_edits("born")


def test_edits_stay_in_the_order_given_also_where_rows_are_shared(model):
    model.edit([BORN, OTHER, WORK], progress=False)
    assert [edit.id for edit in model.edits] == ["born", "france", "work"]
