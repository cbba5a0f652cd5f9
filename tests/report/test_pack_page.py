"""The page of a pack: everything that the pack holds, and nothing that it does not know."""

import dataclasses
import html

import pytest
import torch

from alphaedit_peft.edits import Edit
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.card import PARENT, PLACE
from alphaedit_peft.report import pack_page
from tests.pack.conftest import D_IN, make_pack
from tests.report.test_page import HOSTILE, Tags


def shown(page):
    return " ".join("".join(Tags(page).text).split())


def a_null_space():
    """One that removes 4 of the 12 directions of the packs' layers, and keeps 8."""
    values = torch.arange(D_IN, dtype=torch.float32)
    part = LayerSpace(torch.eye(D_IN)[:, :8], values, False)
    return NullSpace({2: part, 10: part}, 4, "rank", 99, provenance={"corpus": HOSTILE})


def made_with(space, **changes):
    made = {
        "digest": space.digest(),
        "tokens": space.tokens,
        "threshold": space.threshold,
        "mode": space.threshold_mode,
    }
    return make_pack(null_space=made, **changes)


def test_it_shows_the_edits_the_base_and_the_parents():
    parent = {"operation": "beside", "name": "languages", "digest": "ab" * 20, "edits": 7}
    pack = make_pack(parents=(parent,))
    text = shown(pack_page(pack, title="Edit pack mine"))
    for fact in ("Edit pack mine", "changes 3 facts", "a/base", "2, 10", "rank", "0.900"):
        assert fact.lower() in text.lower()
    for edit in pack.edits:
        assert " ".join(edit.question.split()) in text
        assert edit.id in text
    assert "on top of languages, 7 edits, digest abababababab" in text
    assert "parent 1 is the pack languages, 7 edits, digest abababababab" in text
    assert 'AutoModelForCausalLM.from_pretrained("a/base")' in text
    assert "The median probability of the new targets was 0.100 before" in text


def test_the_code_of_a_pack_on_top_of_others_loads_them_first():
    parents = [{"operation": "beside", "name": n, "digest": n * 64, "edits": 1} for n in "ab"]
    code = html.unescape(pack_page(make_pack(parents=tuple(parents))).rpartition("<pre")[2])
    with_peft, own = code.split("# or with alphaedit_peft")
    for part, call in ((with_peft, "model.base_model.set_adapter"), (own, "model.set_adapter")):
        steps = [
            f'from_pretrained(base, "{PARENT}1", adapter_name="parent1")',
            f'model.load_adapter("{PARENT}2", "parent2")',
            f'{call}(["parent1", "parent2"])',
            f'model.load_adapter("{PLACE}", "edits")',
            f'{call}(["parent1", "parent2", "edits"])',
        ]
        assert sorted(steps, key=part.index) == steps


def test_hostile_texts_stay_text():
    edit = Edit(HOSTILE, "{} is" + HOSTILE.replace("{x}", ""), HOSTILE, HOSTILE, id=HOSTILE)
    records = [EditRecord(edit, 0), EditRecord(Edit("s", "{} is", "t", "u"), 1)]
    parents = ({"operation": HOSTILE, "name": HOSTILE, "digest": HOSTILE},)
    changes = {"contexts": (HOSTILE,), "versions": {HOSTILE: HOSTILE}, "parents": parents}
    space = a_null_space()
    found = Tags(pack_page(made_with(space, rows=2, records=records, **changes), space))
    assert found.names.count("script") == 1
    assert "img" not in found.names
    assert found.open == []


def test_columns_stand_only_where_there_is_something_to_show():
    plain = pack_page(make_pack())
    assert '<th scope="col">old target</th>' not in plain
    assert '<th scope="col">role</th>' not in plain
    edit = Edit("s", "{} is", "new", "old")
    records = [EditRecord(edit, 0, "superseded"), EditRecord(edit, 1, "own")]
    full = pack_page(make_pack(rows=2, records=records))
    assert '<th scope="col">old target</th>' in full
    assert '<th scope="col">role</th>' in full


def test_the_null_space_gives_the_room_and_the_spectrum():
    space = a_null_space()
    text = shown(pack_page(made_with(space), space))
    assert "8 of 12 kept" in text
    assert "37.5%" in text  # three rows of eight directions
    without = shown(pack_page(made_with(space)))
    assert "rows are set against all" in without
    assert "25.0%" in without
    assert space.digest() in without


def test_a_null_space_is_taken_at_the_packs_threshold():
    space = a_null_space()
    pack = made_with(space.with_threshold(7))
    assert "5 of 12 kept" in pack_page(pack, space)


def test_another_null_space_is_refused():
    space = a_null_space()
    pack = make_pack(null_space={"digest": "ab", "threshold": 4, "mode": "rank"})
    with pytest.raises(ValueError, match=f"digest {space.digest()}, and the pack was made with ab"):
        pack_page(pack, space)
    with pytest.raises(ValueError, match="does not say which null space"):
        pack_page(make_pack(null_space=None), space)


@pytest.mark.parametrize("rows", [0, 1, 2, 101])
def test_packs_of_any_size(rows):
    text = shown(pack_page(make_pack(rows=rows)))
    assert ("pairs of rows, by cosine" in text) == (rows == 101)
    assert ("cosines of the rows" in text) == (rows == 2)
    assert ("No edit has been made yet" in text) == (rows == 0)


def test_a_pack_of_mixed_rows_claims_nothing_of_its_keys():
    pack = make_pack(rows=5).compress(rank=3)
    text = shown(pack_page(pack))
    assert "its rows are mixtures of keys" in text
    assert "in common" not in text
    assert "from 5 rows" in text


def test_unmeasured_probabilities_are_not_made_up():
    records = [EditRecord(Edit("s", "{} is", "t"), 0)]
    text = shown(pack_page(make_pack(rows=1, records=records)))
    assert "were not measured" in text
    assert "0.000" not in text


def test_settings_chosen_by_measurement_have_their_reason():
    decision = {"name": "clamp", "value": "0.2", "reason": "spares <other> facts"}
    text = pack_page(make_pack(decisions=(decision,)))
    assert '<td data-name="reason">spares &lt;other&gt; facts</td>' in text
    assert "chosen by measurement" not in pack_page(make_pack())


def test_equal_packs_give_equal_pages():
    pack = make_pack()
    assert pack_page(pack) == pack_page(dataclasses.replace(pack))
