"""Packs joined from their files: each keeps its outputs, and contradictions are settled."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.join import JoinOptions, join

NAME = "model.layers.2.mlp.down_proj"
SHAPE = {"model_type": "llama", "layers": 12, "hidden": 6, "intermediate": 12, "vocab": 99}


def edits(letter, count):
    return [Edit(f"{letter}{i}", "{} lives in", f"{letter}-town {i}") for i in range(count)]


@pytest.fixture
def make(new_pack):
    """A pack with edits of its own, by letter; each edit has its row and its batch."""

    def makes(letter, rows=3, **changes):
        records = [EditRecord(e, i, batch=2 * i) for i, e in enumerate(edits(letter, rows))]
        return new_pack(rows=rows, seed=ord(letter), **{"records": records, **changes})

    return makes


def off(delta, pack, name):
    """How far the joined outputs on a pack's keys are from the pack's, relative."""
    wanted = algebra.outputs(pack.factors[name], pack.factors[name].A)
    found = algebra.outputs(delta, pack.factors[name].A)
    return float((found - wanted).norm() / wanted.norm())


def test_joined_outputs_are_each_packs_own_and_added_ones_are_not(make):
    packs = [make("a"), make("b", 4)]
    joined = EditPack.join(packs, norm_guard=0)
    for name in joined.modules:
        pairs = [pack.factors[name] for pack in packs]
        added = LowRankDelta(torch.cat([d.A for d in pairs]), torch.cat([d.B for d in pairs], 1))
        for pack in packs:
            assert off(joined.factors[name], pack, name) < 1e-5
            assert off(added, pack, name) > 0.1


def test_a_pack_joined_with_itself_or_nothing_is_itself(make, new_pack):
    pack = make("a")
    for packs in ([pack], [pack, pack], [new_pack(rows=0), pack], [pack, new_pack(rows=0)]):
        joined = EditPack.join(packs)
        assert joined.edits == pack.edits
        for name, delta in pack.factors.items():
            torch.testing.assert_close(
                joined.factors[name].dense(), delta.dense(), rtol=1e-4, atol=1e-4
            )
    assert EditPack.join([new_pack(rows=0)]).rank == 0


def test_edits_rows_batches_targets_and_parents_are_stacked(make):
    packs = [make("a", 2), make("b", 3)]
    joined = EditPack.join(packs, names=["A", "B"])
    assert joined.edits == [*packs[0].edits, *packs[1].edits]
    assert [r.row for r in joined.records] == [0, 1, 2, 3, 4]
    assert [r.batch for r in joined.records] == [0, 1, 2, 3, 4]
    assert torch.equal(joined.targets, torch.cat([packs[0].targets, packs[1].targets]))
    assert joined.parents == (
        {"operation": "join", "name": "A", "digest": packs[0].digest(), "edits": 2},
        {"operation": "join", "name": "B", "digest": packs[1].digest(), "edits": 3},
    )
    without = dataclasses.replace(packs[1], targets=None)
    assert EditPack.join([packs[0], without]).targets is None


def test_packs_that_the_joined_ones_stand_on_are_still_named(make):
    below, other = make("a"), make("b")
    parents = [
        {"operation": "beside", "name": name, "digest": digest, "edits": 3}
        for name, digest in (("below", below.digest()), ("elsewhere", "ef"))
    ]
    upper = dataclasses.replace(make("c"), parents=({"operation": "remove"}, *parents))
    packs = [below, upper, dataclasses.replace(other, parents=parents[1:])]
    with pytest.warns(UserWarning, match=r"on top of elsewhere, .*not among those joined"):
        joined = EditPack.join(packs, norm_guard=0)
    assert [p["operation"] for p in joined.parents] == ["beside", "join", "join", "join"]
    assert joined.parents[0] == parents[1]


def test_a_joined_pack_is_saved_and_joined_again(make, tmp_path):
    joined = EditPack.join([make("a"), make("b")])
    joined.save_pretrained(tmp_path / "pack")
    loaded = EditPack.from_pretrained(tmp_path / "pack")
    assert loaded.digest() == joined.digest()
    assert len(EditPack.join([loaded, make("c")], norm_guard=0).edits) == 9


def test_superseded_rows_are_left_behind(make):
    pack = make("a")
    old = EditRecord(Edit("a1", "{} lives in", "Elsewhere"), 0, "superseded")
    records = [old, *(r for r in pack.records if r.row > 0)]
    joined = EditPack.join([dataclasses.replace(pack, records=records), make("b")])
    assert joined.rank == 5
    assert all(record.role == "own" for record in joined.records)
    assert off(joined.factors[NAME], make("b"), NAME) < 1e-5


def with_key_of(pack, other, cosine=1.0):
    """The pack with the other's row 0 as its own row 0, turned by an angle."""
    factors = {}
    for name, delta in pack.factors.items():
        A, key = delta.A.clone(), other.factors[name].A[0]
        across = delta.A[0] - (delta.A[0] @ key) / (key @ key) * key
        across = across * key.norm() / across.norm()
        A[0] = cosine * key + (1 - cosine**2) ** 0.5 * across
        factors[name] = LowRankDelta(A, delta.B)
    return dataclasses.replace(pack, factors=factors)


@pytest.mark.parametrize(("rule", "kept"), [("first", "a0"), ("last", "b0")])
def test_one_key_for_two_edits_is_settled_by_the_rule(make, rule, kept):
    a = make("a")
    b = with_key_of(make("b"), a, 0.9995)
    with pytest.raises(ValueError, match=r"a0 lives in.* of pack 1 .*b0 lives in.* have one key"):
        EditPack.join([a, b])
    joined = EditPack.join([a, b], on_conflict=rule)
    assert {e.subject for e in joined.edits} == {"a1", "a2", "b1", "b2", kept}
    assert len(EditPack.join([a, b], key_cosine=1.0, norm_guard=0).edits) == 6


def test_contradictions_by_text_are_settled_by_the_rule(make):
    a, b = make("a"), make("b")
    other = EditRecord(Edit("a1", "{}  lives in", "Elsewhere"), 0)
    b = dataclasses.replace(b, records=[other, *b.records[1:]])
    with pytest.raises(ValueError, match=r"a-town 1.*Elsewhere.* contradict each other"):
        EditPack.join([a, b])
    assert "a-town 1" in {e.target_new for e in EditPack.join([a, b], on_conflict="first").edits}
    found = join([a, b], JoinOptions(on_conflict="last"))
    assert "Elsewhere" in {e.target_new for e in found.pack.edits}
    (left,) = found.left_out
    assert (left.id, left.pack) == (a.edits[1].id, "pack 1")
    assert other.edit.id in left.reason


def test_a_row_that_lost_itself_takes_no_other_with_it(make):
    """a and b share a key, b and c a prompt: c beats b, which then cannot beat a."""
    a, c = make("a"), make("c")
    b = with_key_of(make("b"), a)
    other = EditRecord(dataclasses.replace(c.edits[1], target_new="Elsewhere", id="other"), 0)
    b = dataclasses.replace(b, records=[other, *b.records[1:]])
    found = join([a, b, c], JoinOptions(on_conflict="last", norm_guard=0))
    assert [left.id for left in found.left_out] == ["other"]
    found = join([a, b, c], JoinOptions(on_conflict="first", norm_guard=0))
    assert [left.id for left in found.left_out] == ["other"]


def test_what_is_said_of_the_outputs_is_true_of_the_factors_that_are_kept(make):
    packs = [make("a"), make("b", 4)]
    for name, joint in join(packs, JoinOptions(norm_guard=0)).solved.items():
        wanted = torch.cat([algebra.outputs(p.factors[name], p.factors[name].A) for p in packs])
        found = algebra.outputs(joint.delta, joint.delta.A)
        drift = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        torch.testing.assert_close(joint.drift, drift)
        assert float(drift.max()) > 1e-10  # they were rounded to float32


def test_one_prefix_is_one_key(make):
    a, b = make("a"), make("b")
    packs = [
        dataclasses.replace(p, records=[dataclasses.replace(p.records[0], prefix="Ada")])
        for p in (a, b)
    ]
    with pytest.raises(ValueError, match=r"have one key"):
        EditPack.join(packs)


def test_an_edit_of_both_is_kept_once(make):
    a, b = make("a"), make("b")
    same = dataclasses.replace(a.edits[1], id="another")
    b = dataclasses.replace(b, records=[EditRecord(same, 0), *b.records[1:]])
    assert len(EditPack.join([a, b]).edits) == 5
    assert a.edits[1] in EditPack.join([a, b]).edits
    assert same in EditPack.join([a, b], on_conflict="last").edits


def test_a_row_with_more_edits_of_one_key_wins(make):
    a, b = make("a"), make("b")
    more = Edit("a0", "{} works as", "nurse")
    b = with_key_of(b, a)
    b = dataclasses.replace(
        b, records=[EditRecord(a.edits[0], 0), EditRecord(more, 0), *b.records[1:]]
    )
    for packs in ([a, b], [b, a]):
        joined = EditPack.join(packs)
        assert len(joined.edits) == 6
        assert joined.rank == 5
        assert more in joined.edits


def test_an_own_edit_wins_over_a_parents_row(make):
    a = make("a")
    child = dataclasses.replace(
        make("b"), records=[EditRecord(a.edits[0], 0, "protected"), *make("b").records[1:]]
    )
    joined = EditPack.join([child, a])
    assert {(r.edit.subject, r.role) for r in joined.records} == {
        (name, "own") for name in ("a0", "a1", "a2", "b1", "b2")
    }


def test_one_id_for_two_edits_is_refused(make):
    a, b = make("a"), make("b")
    b = dataclasses.replace(
        b, records=[EditRecord(dataclasses.replace(b.edits[0], id=a.edits[0].id), 0)]
    )
    with pytest.raises(ValueError, match=rf"id '{a.edits[0].id}' names one edit in x and .* in y"):
        EditPack.join([a, b], names=["x", "y"])


def near(make, cosine):
    a = make("a")
    return a, with_key_of(make("b"), a, cosine)


def test_the_norm_guard_bounds_what_near_equal_keys_do(make):
    a, b = near(make, 0.999)
    free = join([a, b], JoinOptions(norm_guard=0, key_cosine=1.0)).solved
    assert max(joint.growth for joint in free.values()) > 3
    with pytest.warns(UserWarning, match=r"outputs differ by up to \d+% .*norm_guard=1.5"):
        guarded = join([a, b], JoinOptions(norm_guard=1.5, key_cosine=1.0)).solved
    for name, joint in guarded.items():
        bound = 1.5 * (a.factors[name].norm() ** 2 + b.factors[name].norm() ** 2) ** 0.5
        assert joint.growth <= 1.5
        assert joint.delta.norm() <= 1.001 * bound


def test_a_ridge_gives_up_exactness_evenly(make):
    packs = [make("a"), make("b")]
    for ridge, mode in ((0.1, "relative"), (1.0, "absolute")):
        with pytest.warns(UserWarning, match=r"outputs differ"):
            found = join(packs, JoinOptions(ridge=ridge, ridge_mode=mode, norm_guard=0))
        for name, joint in found.solved.items():
            rows = torch.cat([pack.factors[name].A for pack in packs])
            mean = float(rows.square().sum(1).mean())
            assert joint.ridge == pytest.approx(ridge * mean if mode == "relative" else ridge)
            assert (
                joint.delta.norm()
                < join(packs, JoinOptions(norm_guard=0)).solved[name].delta.norm()
            )


def with_base(pack, **changes):
    return dataclasses.replace(pack, base=BaseFingerprint(SHAPE | changes, "0" * 96, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": BaseFingerprint(SHAPE | {"hidden": 7}, "0" * 96, 10)}, r"hidden is 6 here, 7"),
        ({"base": BaseFingerprint(SHAPE, "1" + "0" * 95, 10)}, r"differ from the embeddings on"),
        ({"fan_in_fan_out": True}, r"one keeps its weights transposed"),
        ({"null_space": {"digest": "cd", "threshold": 0.02, "mode": "energy"}}, r"digest 'ab' and"),
        ({"null_space": {"digest": "ab", "threshold": 0.1, "mode": "energy"}}, r"threshold 0.02"),
        ({"null_space": None}, r"one does not say which null space"),
        ({"config": AlphaEditConfig(objective="memit")}, r"joined \(pack 2\).*edit\(\)"),
    ],
)
def test_packs_that_do_not_go_together(make, change, message):
    with pytest.raises(ValueError, match=message):
        EditPack.join([make("a"), make("b", **change)])


def test_bases_that_cannot_be_compared_are_warned_of(make):
    with pytest.warns(UserWarning, match=r"whether pack 1 and pack 2 are of one base") as told:
        EditPack.join([make("a", base=None), make("b", base=None)])
    assert [warning.filename for warning in told] == [__file__]


def one_layer(pack, name):
    return dataclasses.replace(
        pack,
        factors={name: pack.factors[name]},
        config=AlphaEditConfig(rewrite_layers=[int(name.split(".")[2])]),
    )


def test_unequal_layers_are_joined_when_asked(make):
    a, b = make("a"), one_layer(make("b"), NAME)
    with pytest.raises(ValueError, match=r"edit different modules.*layers='union'"):
        EditPack.join([a, b])
    joined = EditPack.join([b, a], layers="union")
    assert joined.modules == a.modules
    assert joined.config.rewrite_layers == [2, 10]
    assert off(joined.factors[NAME], b, NAME) < 1e-5
    upper = joined.factors[a.modules[1]]
    assert not upper.A[:3].any()
    torch.testing.assert_close(upper.dense(), a.factors[a.modules[1]].dense(), rtol=1e-4, atol=1e-4)


def test_shapes_must_agree(make):
    wide = {n: LowRankDelta(torch.randn(3, 13), torch.randn(6, 3)) for n in make("a").modules}
    with pytest.raises(ValueError, match=r"is \(6, 13\) in pack 2 and \(6, 12\) in another"):
        EditPack.join([make("a"), make("b", factors=wide)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_conflict": "x"}, r"on_conflict='x' is unknown"),
        ({"layers": "x"}, r"layers='x' is unknown"),
        ({"ridge_mode": "x"}, r"ridge_mode='x' is unknown"),
        ({"ridge": -1}, r"ridge=-1 must be"),
        ({"norm_guard": 0.5}, r"norm_guard=0.5 must be"),
        ({"key_cosine": 1.5}, r"key_cosine=1.5 must be"),
        ({"names": ["x"]}, r"names=\['x'\] are not one for each of the 2 packs"),
    ],
)
def test_unusable_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        EditPack.join([make("a"), make("b")], **settings)


def test_no_pack_at_all():
    with pytest.raises(ValueError, match=r"packs=\[\] holds no pack"):
        EditPack.join([])


def test_joining_warns_of_nothing_where_it_is_exact(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditPack.join([make("a"), make("b")], norm_guard=0)
