"""Packs on top of others: joined they act as the chain did, and none passes for the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from alphaedit_peft import algebra
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.card import card
from alphaedit_peft.pack.join import JoinOptions, join


def beside(pack, name="a"):
    return {"operation": "beside", "name": name, "digest": pack.digest(), "edits": len(pack.edits)}


def made(new_pack, letter, *below):
    edits = [Edit(f"{letter}{i}", "{} lives in", f"{letter}-town {i}") for i in range(3)]
    records = [EditRecord(edit, i) for i, edit in enumerate(edits)]
    parents = [beside(pack) for pack in below]
    return new_pack(seed=ord(letter), records=records, parents=parents)


@pytest.fixture
def chain(new_pack):
    below = made(new_pack, "a")
    return below, made(new_pack, "b", below)


def test_a_joined_chain_puts_out_the_sum_on_all_stored_keys(chain, new_pack):
    other = made(new_pack, "c")
    for packs in (chain, (*chain, other), (chain[0], other, chain[1])):
        joined = EditPack.join(packs, norm_guard=0)
        assert {parent["operation"] for parent in joined.parents} == {"join"}
        for name, delta in joined.factors.items():
            rows = torch.cat([pack.factors[name].A for pack in chain])
            wanted = sum(algebra.outputs(pack.factors[name], rows) for pack in chain)
            off = algebra.outputs(delta, rows) - wanted
            bound = 1e-6 if packs is chain else 1e-4  # factors are float32
            assert float(off.norm() / wanted.norm()) < bound


def test_the_norm_guard_leaves_a_chain_as_it_is(chain):
    for joint in join(chain, JoinOptions(norm_guard=1)).solved.values():
        assert joint.growth == pytest.approx(1, rel=1e-9)
        assert joint.ridge == 0


def test_a_parents_edit_that_an_upper_row_holds_becomes_the_joined_packs_own(chain):
    below, above = chain
    held = dataclasses.replace(below.records[0], role="protected")
    above = dataclasses.replace(above, records=[held, *above.records])
    found = join([below, above], JoinOptions())
    assert {e.id for e in found.pack.edits} == {e.id for p in chain for e in p.edits}
    assert found.left_out == ()


def test_a_child_before_its_parent_is_refused(chain):
    with pytest.raises(ValueError, match=r"pack 1 was edited on top of pack 2.*the parent first"):
        EditPack.join(chain[::-1])


def test_a_pack_joined_without_its_parent_still_stands_on_it(chain):
    with pytest.warns(UserWarning, match=r"pack 1 was edited on top of a, 3 edits.*give that pack"):
        joined = EditPack.join(chain[1:])
    assert joined.parents[0] == chain[1].parents[0]


def test_a_pack_on_top_of_another_is_not_exported_alone(chain, tmp_path):
    with pytest.raises(ValueError, match=r"on top of a, 3 edits.*cannot be exported alone; join"):
        chain[1].export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    EditPack.join(chain).export(tmp_path / "out")


def test_its_card_loads_the_parents_first(chain):
    text = card(chain[1], "me/b")
    assert "made on top of a \\(3 edits, digest" in text
    assert text.count('model.load_adapter("me/b", "edits")') == 2
    assert 'model.base_model.set_adapter(["parent1", "edits"])' in text
    assert 'from_pretrained(base, "me/b"' not in text
    assert 'PeftModel.from_pretrained(base, "me/b")' in card(chain[0], "me/b")


def test_the_card_of_a_mixed_pack_claims_no_rows_of_edits(chain):
    text = card(chain[0].compress(rank=2))
    assert "compressed (from 3 rows, float32; Delta off by" in text
    assert "Each edit is one row" not in text
    assert "to go on from them" not in text
    assert "Each edit is one row" in card(chain[0])


def test_rounding_is_remembered_by_what_is_made_of_a_rounded_pack(chain, new_pack):
    small = chain[0].compress(dtype=torch.bfloat16)
    parents = (
        small.without([small.edits[0].id], max_share=1).parents[-1],
        EditPack.join([small, made(new_pack, "c")], norm_guard=0).parents[0],
    )
    for parent in parents:
        assert parent["compression"] == small.compression.to_json()
    assert "bfloat16 factors" in small.without([small.edits[0].id], max_share=1).summary()


def test_folders_are_joined_and_other_things_refused(chain, tmp_path):
    for name, pack in zip("ab", chain, strict=True):
        pack.save_pretrained(tmp_path / name)
    joined = EditPack.join([tmp_path / "a", str(tmp_path / "b")])
    assert joined.digest() == EditPack.join(chain).digest()
    with pytest.raises(TypeError, match=r"packs='x' is one pack; pass a list"):
        EditPack.join("x")
    with pytest.raises(TypeError, match=r"packs holds 3, a int; pass EditPacks"):
        EditPack.join([3])


def test_an_empty_pack_cannot_get_a_lower_rank(new_pack):
    for wish in ({"tolerance": 0.1}, {"rank": 1}):
        with pytest.raises(ValueError, match=r"no row, since it holds no edit"):
            new_pack(rows=0).compress(**wish)
