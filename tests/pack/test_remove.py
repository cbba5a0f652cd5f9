"""Removal from the file alone: the others' outputs stay, and what is left is told."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from alphaedit_peft import AlphaEditModel, NullSpace, algebra, get_alphaedit_model
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.edit_record import few
from tests.conftest import tiny_model

KEPT = [0, 1, 3]


def remove(pack, ids, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pack.without(ids, **settings)


def ids(pack, *rows):
    return [record.edit.id for record in pack.records if record.row in rows]


@pytest.fixture
def five(new_pack):
    return new_pack(rows=5)


def test_what_the_others_put_out_on_their_keys_stays(five):
    left = remove(five, ids(five, 2, 4))
    for name, delta in five.factors.items():
        keys = delta.A[KEPT]
        before = algebra.outputs(delta, keys)
        after = algebra.outputs(left.factors[name], keys)
        assert float((after - before).norm() / before.norm()) < 1e-6
        assert torch.equal(left.factors[name].A, keys)
        dropped = LowRankDelta(keys, delta.B[:, KEPT])
        moved = algebra.outputs(dropped, keys) - before
        assert float(moved.norm() / before.norm()) > 0.05  # what dropping the column does


def test_only_the_part_outside_the_span_of_the_others_goes(five):
    left = remove(five, ids(five, 2))
    for name, delta in five.factors.items():
        rest = delta.A[[0, 1, 3, 4]].double()
        projector = torch.linalg.pinv(rest) @ rest  # (d_in, d_in), onto the rows' span
        gone = delta.dense().double() @ (torch.eye(len(projector)) - projector)
        found = left.factors[name].dense().double()
        torch.testing.assert_close(found, delta.dense().double() - gone, rtol=1e-4, atol=1e-5)


def test_shares_are_what_the_other_rows_span(five):
    name = ids(five, 2)[0]
    shares = five.removal_shares([name])
    assert set(shares) == {name}
    for module, share in shares[name].items():
        A = five.factors[module].A.double()
        solution = torch.linalg.lstsq(A[[0, 1, 3, 4]].T, A[2]).solution
        within = A[[0, 1, 3, 4]].T @ solution
        assert share == pytest.approx(float(within.square().sum() / A[2].square().sum()))


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_shares_are_zero_at_right_angles_and_one_for_equal_keys(new_pack, alike):
    A = torch.eye(3, 12)
    A[2] = alike * A[1] + (1 - alike) * A[2]
    factors = {"model.layers.2.mlp.down_proj": LowRankDelta(A, torch.ones(6, 3))}
    pack = new_pack(factors=factors)
    name = ids(pack, 2)[0]
    assert pack.removal_shares([name])[name] == {pack.modules[0]: pytest.approx(alike)}


def test_an_edit_that_stays_in_force_is_warned_of(five):
    name = ids(five, 2)[0]
    share = max(five.removal_shares([name])[name].values())
    with pytest.warns(UserWarning, match=rf"1 of 1 .* '{name}' by \d+%.*remove_edits"):
        five.without([name], max_share=share - 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        five.without([name], max_share=share)


def test_rows_records_and_targets_are_numbered_anew(five):
    left = remove(five, ids(five, 2, 4))
    assert [record.row for record in left.records] == [0, 1, 2]
    assert left.edits == [five.edits[i] for i in KEPT]
    assert torch.equal(left.targets, five.targets[KEPT])
    assert left.parents[-1] == {"operation": "remove", "digest": five.digest(), "edits": 5}
    assert remove(dataclasses.replace(five, targets=None), ids(five, 2)).targets is None


def test_removing_all_leaves_an_empty_pack(five, tmp_path):
    left = remove(five, [edit.id for edit in five.edits])
    assert (left.rank, left.edits) == (0, [])
    assert all(delta.norm() == 0 for delta in left.factors.values())
    left.save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack").digest() == left.digest()


def test_what_is_left_is_saved_and_loaded_with_the_same_bits(five, tmp_path):
    left = remove(five, ids(five, 0))
    left.save_pretrained(tmp_path / "pack")
    loaded = EditPack.from_pretrained(tmp_path / "pack")
    assert loaded.digest() == left.digest()
    assert loaded.parents == left.parents


def test_equal_keys_that_stay_do_no_harm(new_pack):
    pack = new_pack(rows=4)
    for delta in pack.factors.values():
        delta.A[1] = delta.A[0]
    left = remove(pack, ids(pack, 3))
    for name, delta in pack.factors.items():
        before = algebra.outputs(delta, delta.A[:3])
        after = algebra.outputs(left.factors[name], delta.A[:3])
        assert float((after - before).norm() / before.norm()) < 1e-5
        assert float(left.factors[name].B.norm()) < 10 * float(delta.B.norm())


def shared_row(new_pack):
    edits = [Edit("Ada", prompt, "x") for prompt in ("{} lives in", "{} works as", "The dog of {}")]
    records = [EditRecord(edits[i], row, prefix="p") for i, row in enumerate((0, 0, 1))]
    return new_pack(rows=2, records=records), edits


def test_a_row_shared_with_a_parents_edit_cannot_go_from_the_file(new_pack):
    pack, edits = shared_row(new_pack)
    records = [dataclasses.replace(pack.records[0], role="protected"), *pack.records[1:]]
    pack = dataclasses.replace(pack, records=tuple(records))
    told = rf"\['{edits[0].id}'\] are a parent's and stay, so use AlphaEditModel.remove_edits"
    with pytest.raises(ValueError, match=told):
        pack.without([edits[1].id])


def test_one_of_several_edits_in_a_row_is_refused(new_pack):
    pack, edits = shared_row(new_pack)
    with pytest.raises(ValueError, match=rf"share a row with \['{edits[1].id}'\].*remove_edits"):
        pack.without([edits[0].id])
    left = remove(pack, [edits[0].id, edits[1].id])
    assert (left.edits, left.rank) == ([edits[2]], 1)


def replaced(new_pack):
    """Row 0 was replaced by row 2; rows 1 and 3 are other edits, 3 a parent's."""
    old, new = Edit("Ada", "{} lives in", "Rome"), Edit("Ada", "{}  lives in", "Bern")
    others = [Edit("Bob", "{} lives in", "Rome"), Edit("Cem", "{} lives in", "Oslo")]
    records = [
        EditRecord(old, 0, "superseded"),
        EditRecord(others[0], 1),
        EditRecord(new, 2, batch=1),
        EditRecord(others[1], 3, "protected"),
    ]
    return new_pack(rows=4, records=records), old, new, others


def test_what_an_edit_replaced_goes_with_it(new_pack):
    pack, _, new, others = replaced(new_pack)
    left = remove(pack, [new.id])
    assert [(r.edit, r.row, r.role) for r in left.records] == [
        (others[0], 0, "own"),
        (others[1], 1, "protected"),
    ]


def test_what_an_edit_replaced_stays_with_it(new_pack):
    pack, old, _, others = replaced(new_pack)
    left = remove(pack, [others[0].id])
    assert [(r.row, r.role) for r in left.records] == [
        (0, "superseded"),
        (1, "own"),
        (2, "protected"),
    ]
    assert left.records[0].edit == old
    for name, delta in pack.factors.items():
        assert torch.equal(left.factors[name].B[:, 0], delta.B[:, 0])  # no longer kept exact
        keys = delta.A[[2, 3]]
        after = algebra.outputs(left.factors[name], keys)
        torch.testing.assert_close(after, algebra.outputs(delta, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", ["protected", "superseded"])
def test_only_a_packs_own_edits_can_be_removed(new_pack, role):
    pack = new_pack(rows=1, records=[EditRecord(Edit("Ada", "{} is", "x", id="a"), 0, role)])
    with pytest.raises(ValueError, match=r"edit ids \['a'\] are not in this pack; it has \[\]"):
        pack.without(["a"])


def test_unusable_ids(five):
    with pytest.raises(ValueError, match=r"edit ids \['nobody'\] are not in this pack; it has \["):
        five.without([five.edits[0].id, "nobody"])
    with pytest.raises(TypeError, match=r"ids='abc' is one text; pass a list of ids"):
        five.without("abc")
    assert few([f"e{i:02}" for i in range(2000)], 2) == "['e00', 'e01'] and 1998 more"
    with pytest.raises(ValueError, match=r"ids=\[\] names no edit"):
        five.without([])
    with pytest.raises(ValueError, match=r"max_share=2 is a share"):
        five.without(["x"], max_share=2)


def test_memits_rows_are_refused(new_pack):
    pack = new_pack(config=AlphaEditConfig(objective="memit"))
    with pytest.raises(ValueError, match=r"objective='memit', whose rows are not projected keys"):
        pack.without([pack.edits[0].id])


def test_a_model_goes_on_from_what_is_left(tokenizer, tmp_path):
    def load(folder):
        return AlphaEditModel.from_pretrained(
            tiny_model("llama"), folder, tokenizer=tokenizer, null_space=identity
        )

    identity = NullSpace.identity({0: 96, 1: 96})
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=[], steps=3)
    model = get_alphaedit_model(
        tiny_model("llama"), config, tokenizer=tokenizer, null_space=identity
    )
    names = ("Anna", "Bob", "Cem")
    edits = [Edit(f"{name} Smith", "{} was born in", "Rome", id=name) for name in names]
    model.edit(edits, batch_size=2, progress=False)
    remove(model.to_pack(), ["Anna"]).save_pretrained(tmp_path / "left")
    left = load(tmp_path / "left")
    left.edit([Edit("Dan", "{} works as a", "nurse", id="Dan")], progress=False)
    left.rollback()
    assert [edit.id for edit in left.edits] == ["Bob", "Cem"]
    left.repour()
    assert [record.row for record in left.records] == [0, 1]
    remove(model.to_pack(), names).save_pretrained(tmp_path / "none")
    none = load(tmp_path / "none")
    none.edit(edits[:1], progress=False)
    assert [edit.id for edit in none.edits] == ["Anna"]
