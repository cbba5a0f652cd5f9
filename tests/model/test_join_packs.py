"""Joining packs in a model: all of them poured again, as if their edits had been made in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alphaedit_peft import Edit, EditPack
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.solve_layers import solve_layers
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.model.prepare import running
from tests.conftest import tiny_model
from tests.model.test_model import EDITS, logits, same_bits, weights, wrap
from tests.model.test_several_packs import assert_close, deltas, double, on_top

FIRST, SECOND = EDITS[:2], EDITS[2:]
BORN = Edit("Anna", "{} was born in", "Rome", id="born")
WORK = Edit("Anna", "{} works as a", "river", id="work")
ULM = Edit("Anna", "{} was born in", "Ulm", id="ulm")
AGAIN = Edit("Anna", "{} was  born in", " Rome", id="again")


def pack_of(tokenizer, *batches, **settings) -> EditPack:
    model = wrap(tiny_model("llama"), tokenizer, **{"steps": 4, **settings})
    for edits in batches:
        model.edit(edits, progress=False)
    return model.to_pack()


@pytest.fixture(scope="module")
def packs(tokenizer) -> tuple[EditPack, EditPack]:
    return pack_of(tokenizer, FIRST[:1], FIRST[1:]), pack_of(tokenizer, SECOND)


def poured_in_turn(model, packs) -> None:
    """Pour the packs' batches one by one with the stored z: what joining has to equal."""
    adapter = model.edit_adapters["default"]
    state = adapter.state()
    with torch.no_grad(), running(model, adapter, packs[0].contexts) as (runner, objective):
        for pack in packs:
            for batch in pack.batches:
                records = [record for record in pack.records if record.batch == batch]
                leaders = [runner.renderer.edit_rows(r.edit, runner.contexts) for r in records]
                values = pack.targets[[record.row for record in records]]
                keep, number = [True] * state.rank, state.next_batch
                solution = solve_layers(
                    runner, objective, leaders, values, state, keep, adapter.write
                )
                new = [
                    replace(record, row=state.rank + i, batch=number)
                    for i, record in enumerate(records)
                ]
                targets = torch.cat([state.targets, values.to(state.targets)])
                state = EditState(solution.factors, (*state.records, *new), targets)


def test_joining_equals_pouring_the_packs_in_turn(packs, tokenizer):
    model, reference = double(tokenizer), double(tokenizer)
    report = model.join(packs)
    poured_in_turn(reference, packs)
    wanted = {
        layer: LowRankDelta(layer_of.lora_A["default"].weight, layer_of.lora_B["default"].weight)
        for layer, layer_of in ((i, reference.edit_adapters["default"].layers[i]) for i in (0, 1))
    }
    assert_close(deltas(model, "default"), {k: v.dense().detach() for k, v in wanted.items()})
    assert report.joined == tuple(EDITS)
    assert report.set_aside == ()
    assert [record.batch for record in model.records] == [0, 1, 2, 2]


def test_joining_is_not_adding(packs, tokenizer):
    model = double(tokenizer)
    model.join(packs)
    added = {
        layer: sum(pack.factors[f"model.layers.{layer}.mlp.down_proj"].dense() for pack in packs)
        for layer in (0, 1)
    }
    with pytest.raises(AssertionError):
        assert_close(deltas(model, "default"), added, 1e-2)


def test_the_models_own_edits_come_first(packs, tokenizer):
    model = double(tokenizer)
    model.edit([BORN], progress=False)
    before = model.to_pack()
    model.join(packs)
    assert model.edits == [BORN, *EDITS]
    other = double(tokenizer)
    other.join([before, *packs])
    assert_close(deltas(model, "default"), deltas(other, "default"))
    parents = [{k: p[k] for k in ("operation", "name", "edits")} for p in model.to_pack().parents]
    assert parents == [{"operation": "join", "name": f"pack {i}", "edits": 2} for i in (1, 2)]


def test_what_a_joined_pack_had_lost_by_rounding_is_recorded(packs, tokenizer):
    rounded = packs[0].compress(dtype=torch.bfloat16)
    model = double(tokenizer)
    model.join([rounded])
    assert model.to_pack().parents[0]["compression"] == rounded.compression.to_json()


def test_joined_edits_are_removed_rolled_back_and_gone_on_from(packs, tokenizer, tmp_path):
    model = double(tokenizer)
    model.join(packs)
    model.remove_edits(["curie"])
    assert model.edits == [EDITS[0], *SECOND]
    model.rollback()
    assert model.edits == EDITS[:1]
    alone = double(tokenizer)
    alone.join([pack_of(tokenizer, FIRST[:1])])
    assert_close(deltas(model, "default"), deltas(alone, "default"), 1e-4)
    model.edit([BORN], progress=False)
    model.save_pretrained(tmp_path)
    assert EditPack.from_pretrained(tmp_path).edits == [EDITS[0], BORN]


def test_packs_are_given_as_values_or_folders(packs, tokenizer, tmp_path):
    for name, pack in zip("ab", packs, strict=True):
        pack.save_pretrained(tmp_path / name)
    model, other = double(tokenizer), double(tokenizer)
    model.join([tmp_path / "a", str(tmp_path / "b")])
    other.join(packs)
    assert_close(deltas(model, "default"), deltas(other, "default"), 1e-30)
    assert [p["name"] for p in model.to_pack().parents] == ["pack 'a'", "pack 'b'"]


@pytest.mark.parametrize("rule", ["error", "first", "last"])
@pytest.mark.parametrize(
    ("other", "why"), [(ULM, "contradict each other: 'Anna was born in'"), (WORK, "have one key")]
)
def test_conflicts_by_text_and_by_key_follow_the_rule(tokenizer, rule, other, why):
    one, two = pack_of(tokenizer, [BORN, EDITS[0]]), pack_of(tokenizer, [other, EDITS[1]])
    model = double(tokenizer)
    if rule == "error":
        with pytest.raises(ValueError, match=f"born of pack 1 and {other.id} of pack 2 {why}"):
            model.join([one, two])
        assert model.edits == []
        return
    report = model.join([one, two], on_conflict=rule)
    ((lost, reason),) = report.set_aside
    assert lost == {"first": other, "last": BORN}[rule]
    assert why in reason
    assert f"(on_conflict='{rule}')" in reason
    kept = BORN if rule == "first" else other
    assert sorted(e.id for e in model.edits) == sorted(["france", "curie", kept.id])
    assert {delta.rank for delta in model.factors.values()} == {3}


def test_an_edit_that_lost_is_made_again_together_with_its_fellow(tokenizer):
    model = double(tokenizer)
    packs = [pack_of(tokenizer, [BORN]), pack_of(tokenizer, [WORK])]
    report = model.join(packs, on_conflict="first")
    model.edit([edit for edit, _ in report.set_aside], progress=False)
    assert sorted(edit.id for edit in model.edits) == ["born", "work"]


def test_the_same_edit_in_two_packs_is_kept_once(tokenizer):
    model = double(tokenizer)
    report = model.join([pack_of(tokenizer, [BORN]), pack_of(tokenizer, [AGAIN, EDITS[0]])])
    assert report.joined == (BORN, EDITS[0])
    assert report.set_aside == ((AGAIN, "edit born of pack 1 already says so"),)
    double_of = pack_of(tokenizer, [BORN])
    assert (
        model.join([double_of]).set_aside[0][1] == "edit born of adapter 'default' already says so"
    )
    assert {delta.rank for delta in model.factors.values()} == {2}


def test_one_id_for_two_edits_is_refused(tokenizer):
    other = replace(EDITS[0], id="born")
    with pytest.raises(ValueError, match="id 'born' names two edits: 'Anna was born in' -> 'Rome'"):
        double(tokenizer).join([pack_of(tokenizer, [BORN]), pack_of(tokenizer, [other])])


def test_packs_that_do_not_go_together_are_refused_and_change_nothing(packs, tokenizer):
    model = double(tokenizer)
    model.join(packs)
    before, records = weights(model), model.records
    other_layers = pack_of(tokenizer, [BORN], rewrite_layers=[0])
    other_base = wrap(tiny_model("llama", seed=1), tokenizer).to_pack()
    good = pack_of(tokenizer, [BORN])
    spaces = {**good.null_space, "threshold": 0.5}
    for pack, sentence in (
        (other_layers, r"pack 2 changes \['model.layers.0.* rewrite layers are \[0, 1\]"),
        (other_base, "pack 2 cannot be joined: this pack was made for another model"),
        (replace(good, targets=None), "pack 2 was saved without target values"),
        (replace(good, null_space=spaces), r"pack 2 was made with .*\['threshold'\] differ"),
        (pack_of(tokenizer, [BORN, *EDITS[:1]]).compress(rank=1), r"cannot join it \(pack 2\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.join([good, pack])
    assert same_bits(weights(model), before)
    assert model.records == records


def test_arguments_that_do_not_fit_are_refused(packs, tokenizer):
    model = double(tokenizer)
    with pytest.raises(ValueError, match=r"packs=\[\] names no pack"):
        model.join([])
    with pytest.raises(TypeError, match="packs='folder' is one pack; pass a list"):
        model.join("folder")
    with pytest.raises(TypeError, match="packs holds 5, a int; pass EditPacks, folders or Hub ids"):
        model.join([5])
    with pytest.raises(ValueError, match="on_conflict='keep' is unknown; use one of"):
        model.join(packs, on_conflict="keep")
    with pytest.raises(FileNotFoundError):
        model.join([Path("nowhere")])


def test_a_join_that_is_interrupted_leaves_no_trace(packs, tokenizer, monkeypatch):
    model = double(tokenizer)
    model.edit([BORN], progress=False)
    before, plain = weights(model), logits(model, tokenizer)
    adapter, calls = model.edit_adapters["default"], []
    write = adapter.write

    def fail_at_the_end(layer, delta):
        calls.append(layer)
        if delta.rank == 5:
            monkeypatch.undo()
            raise KeyboardInterrupt
        write(layer, delta)

    monkeypatch.setattr(adapter, "write", fail_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        model.join(packs)
    assert len(calls) > 2
    assert same_bits(weights(model), before)
    assert torch.equal(logits(model, tokenizer), plain)
    assert model.edits == [BORN]


def test_a_chain_is_joined_into_one_pack(tokenizer):
    chain = on_top(tokenizer, below=[BORN, *FIRST], above=[WORK, *SECOND])
    parent, child = chain.to_pack("default"), chain.to_pack("b")
    model = double(tokenizer)
    with pytest.raises(ValueError, match=r"pack 1 stands on pack 'default' .* nor active"):
        model.join([child])
    report = model.join([parent, child])
    assert report.set_aside == ()
    assert sorted(e.id for e in model.edits) == sorted(e.id for e in chain.edits)
    one = double(tokenizer)
    one.edit([BORN, *FIRST], progress=False)
    one.edit([WORK, *SECOND], progress=False)
    one.repour()
    assert_close(deltas(model, "default"), deltas(one, "default"), 1e-5)
    assert {record.role for record in model.records} == {"own"}


def test_packs_are_joined_on_top_of_an_active_one(packs, tokenizer):
    for above in ([BORN], []):
        chain = on_top(tokenizer, below=FIRST, above=above)
        chain.join([packs[1]], adapter_name="b")
        joined = chain.edit_adapters["b"]
        assert joined.edits == [*above, *SECOND]
        assert [r.edit for r in joined.journal.records if r.role == "protected"] == FIRST
        assert joined.journal.records[0].row == 0
    assert chain.to_pack("default").edits == FIRST


@pytest.mark.parametrize("rule", ["error", "first", "last"])
def test_what_a_pack_stands_on_is_not_changed_by_joining(tokenizer, rule):
    other = replace(FIRST[0], target_new="Ulm", id="other")
    chain = on_top(tokenizer, below=FIRST, above=[BORN])
    before = chain.to_pack("b").digest()
    if rule == "first":
        report = chain.join([pack_of(tokenizer, [other])], on_conflict=rule, adapter_name="b")
        assert report.joined == (BORN,)
        assert [edit for edit, _ in report.set_aside] == [other]
        return
    sentence = {"error": "keep one of them", "last": "belongs to a pack that this one stands on"}
    with pytest.raises(ValueError, match=f"france of adapter 'default'.*{sentence[rule]}"):
        chain.join([pack_of(tokenizer, [other])], on_conflict=rule, adapter_name="b")
    assert chain.to_pack("b").digest() == before
